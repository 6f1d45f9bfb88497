"""The Redis tier with a faulty server: it costs hits, never a request."""

import asyncio
import logging
import time
from collections.abc import Iterator

import pytest
import redis.asyncio

from app.cache.redis import RedisStore
from app.cache.shared_limits import Demand, SharedLimits
from app.limits import Limit
from app.metrics import Metrics
from tests.cache.support import LIMIT, Clock, count, embedding, entries, key, listening, until
from tests.processes import free_port
from tests.redis_server import RedisServer


@pytest.fixture
def server() -> Iterator[RedisServer]:
    built = RedisServer()
    yield built
    built.close()


def build(
    server: RedisServer, clock: Clock, metrics: Metrics, timeout: float = LIMIT, url: str | None = None
) -> RedisStore:
    return RedisStore(url or server.url, timeout, 60, clock, metrics)


async def test_down_at_start_it_connects_by_itself_once_the_server_is_up(
    server: RedisServer, clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    store = build(server, clock, metrics)
    with caplog.at_level(logging.WARNING):
        await store.open()
        assert store.status.startswith("down: ConnectionError")
        for _ in range(10):
            assert await store.get([key(1)]) == [None]
        assert len(caplog.records) == 1
    await store.put(entries([1]))
    assert count(metrics, "redis", "set", "skipped") == 1
    server.start()
    clock.advance(1)
    assert await store.get([key(1)]) == [None]
    assert store.status == "up"
    assert "works again" in caplog.text
    await store.put(entries([1]))
    assert await store.get([key(1)]) == [embedding(1)]
    await store.close()


async def test_a_server_that_comes_and_goes_is_logged_once_a_minute_and_in_full_once_it_stays_away(
    server: RedisServer, clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    store = build(server.start(), clock, metrics)
    for _ in range(3):
        server.kill()
        await store.get([key(1)])
        assert store.status.startswith("down: ConnectionError")
        server.start()
        await store.get([key(1)])
        assert store.status == "up"
    assert logged(caplog) == ["get fails", "get works again"]
    server.kill()
    await store.get([key(1)])
    clock.advance(60)
    await store.get([key(1)])
    assert logged(caplog) == ["get fails", "get works again", "get fails"]
    server.start()
    clock.advance(1)
    await store.get([key(1)])
    assert logged(caplog) == ["get fails", "get works again", "get fails", "get works again"]
    await store.close()


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().removeprefix("redis cache: ").partition(",")[0] for record in caplog.records]


async def test_killed_while_in_use_it_is_a_miss_and_used_again_when_it_is_back(
    server: RedisServer, clock: Clock, metrics: Metrics
) -> None:
    store = build(server.start(), clock, metrics)
    await store.put(entries([1]))
    await asyncio.gather(*(store.get([key(1)]) for _ in range(8)))
    server.kill()
    for _ in range(5):
        assert await store.get([key(1)]) == [None]
    assert store.status.startswith("down: ")
    assert count(metrics, "redis", "get", "error") == 3
    assert count(metrics, "redis", "get", "skipped") == 2
    server.start()
    clock.advance(1)
    assert await store.get([key(1)]) == [None]
    await store.put(entries([1]))
    assert await store.get([key(1)]) == [embedding(1)]
    await store.close()


async def test_restarted_between_two_look_ups_it_costs_no_error(
    server: RedisServer, clock: Clock, metrics: Metrics
) -> None:
    store = build(server.start(), clock, metrics)
    await asyncio.gather(*(store.get([key(1)]) for _ in range(8)))
    server.kill()
    server.start()
    await asyncio.sleep(0)  # the event loop sees that the connections have ended
    await asyncio.sleep(0)
    await store.put(entries([1]))
    assert await store.get([key(1)]) == [embedding(1)]
    await store.close()


async def test_frozen_it_costs_three_time_limits_and_is_then_skipped(
    server: RedisServer, clock: Clock, metrics: Metrics
) -> None:
    store = build(server.start(), clock, metrics, timeout=0.05)
    server.pause()
    begun = time.monotonic()
    for _ in range(50):
        assert await store.get([key(1), key(2)]) == [None, None]
    # Fifty in sequence: the limit allows for a slow machine, not for fifty waits of a second.
    assert time.monotonic() - begun < 10
    assert count(metrics, "redis", "get", "timeout") == 6
    assert count(metrics, "redis", "get", "skipped") == 94
    assert store.status == "down: TimeoutError: no answer within 50 ms"
    server.resume()

    async def answered() -> bool:
        clock.advance(30)
        await store.put(entries([1]))
        return (await store.get([key(1)])) == [embedding(1)]

    await until(answered)
    assert store.status == "up"
    await store.close()


async def test_a_large_look_up_has_more_time(server: RedisServer, clock: Clock, metrics: Metrics) -> None:
    store = build(server.start(), clock, metrics, timeout=0.05)
    server.pause()
    for size, limit in ((256, 50), (1024, 200)):
        assert await store.get([key(number) for number in range(size)]) == [None] * size
        assert store.status == f"down: TimeoutError: no answer within {limit} ms"
    server.resume()
    await store.close()


async def test_frozen_many_at_once_all_come_back_within_the_limit(
    server: RedisServer, clock: Clock, metrics: Metrics
) -> None:
    store = build(server.start(), clock, metrics, timeout=0.05)
    server.pause()
    begun = time.monotonic()
    found = await asyncio.gather(*(store.get([key(number)]) for number in range(200)))
    assert time.monotonic() - begun < 10
    assert found == [[None]] * 200
    server.resume()
    await store.close()


async def test_a_handshake_slower_than_a_look_up_is_not_thrown_away(clock: Clock, metrics: Metrics) -> None:
    release_claims = asyncio.Event()
    greeted = 0

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal greeted
        while line := await reader.readline():
            if line == b"AUTH\r\n":
                greeted += 1
                await release_claims.wait()
                writer.write(b"+OK\r\n")
            elif line == b"MGET\r\n":
                writer.write(b"*1\r\n$-1\r\n")

    async with listening(slow) as port:
        store = RedisStore(f"redis://:x@127.0.0.1:{port}/0", 0.02, 60, clock, metrics)
        assert await store.get([key(1)]) == [None]
        assert count(metrics, "redis", "get", "timeout") == 1
        release_claims.set()

        async def answered() -> bool:
            clock.advance(30)
            await store.get([key(1)])
            return count(metrics, "redis", "get", "miss") > 0

        await until(answered)
        await store.close()
        assert greeted >= 1


async def test_full_without_eviction_it_drops_writes_and_goes_on_reading(
    clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer("--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as full:
        store = build(full, clock, metrics)
        with caplog.at_level(logging.WARNING):
            for start in range(0, 1000, 100):
                await store.put(entries(range(start, start + 100), dimensions=1024))
        written = count(metrics, "redis", "set", "ok")
        assert 0 < written < 1000
        assert count(metrics, "redis", "set", "dropped") == 1000 - written
        assert await store.get([key(0)]) == [embedding(0, 1024)]
        assert store.status.startswith("up; writes fail: OutOfMemoryError")
        assert len(caplog.records) == 1
        await store.close()


async def test_a_wrong_password_is_said_loudly_and_once(
    clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(password="right-0ne", port=free_port()) as server:
        urls = [server.url_with("wr0ng"), server.url_with(None)]
        urls += [f"{server.socket_url}?password=wr0ng", server.socket_url]
        for url in urls:
            caplog.clear()
            store = build(server, clock, metrics, url=url)
            with caplog.at_level(logging.DEBUG):
                for _ in range(5):
                    assert await store.get([key(1)]) == [None]
                    await store.put(entries([1]))
            errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
            assert {record.getMessage() for record in errors} <= {
                "redis cache: get fails, requests are served without it: the server refuses our credentials",
                "redis cache: set fails, requests are served without it: the server refuses our credentials",
            }
            assert 1 <= len(errors) <= 2
            assert store.status == "down: the server refuses our credentials"
            assert "wr0ng" not in caplog.text + repr(store)
            await store.close()


async def test_a_password_that_is_missing_is_named_whatever_the_length_of_the_commands(
    clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    """Without one, Redis answers a command of more than ten parts with a protocol error, and hangs up."""
    with RedisServer(password="right-0ne", port=free_port()) as server:
        store = build(server, clock, metrics, url=server.url_with(None))
        with caplog.at_level(logging.DEBUG):
            for count_of_keys in (1, 12, 1, 12):
                assert await store.get([key(number) for number in range(count_of_keys)]) == [None] * count_of_keys
                assert store.status == "down: the server refuses our credentials"
                clock.advance(60)
        assert {record.getMessage() for record in caplog.records} == {
            "redis cache: get fails, requests are served without it: the server refuses our credentials"
        }
        await store.close()


async def test_a_refusal_that_ends_no_connection_is_not_what_broke_it(clock: Clock, metrics: Metrics) -> None:
    """A script that the server does not have is sent again: nobody need hear of it."""

    async def breaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(2**16)
        writer.write(b"-NOSCRIPT No matching script. Please use EVAL.\r\n")

    async with listening(breaks) as port:
        store = RedisStore(f"redis://127.0.0.1:{port}", LIMIT, 60, clock, metrics)
        assert await store.get_or_claim([key(1)]) == ([None], ())
        assert store.status.startswith("down: ConnectionError")
        await store.close()


async def test_a_right_that_our_user_lacks_is_named(
    clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(port=free_port()) as server, caplog.at_level(logging.ERROR):
        async with redis.asyncio.Redis.from_url(server.url) as admin:
            await admin.acl_setuser(
                "gw", True, passwords="+s3cret", keys="eg:*", commands=["+mget", "+set", "+evalsha"]
            )
            store = build(server, clock, metrics, url=server.url.replace("//", "//gw:s3cret@"))
            await store.put(entries([1]))
            assert store.status.startswith("up; writes fail: NoPermissionError: ")
            assert "'del'" in store.status  # the value is stored, but claims cannot be deleted
            assert count(metrics, "redis", "set", "ok") == 1
            await admin.acl_setuser("gw", True, commands=["+del"], reset_passwords=False)
            await store.put(entries([1]))
            assert store.status == "up"
            await store.get_or_claim([key(1)])
            assert store.status.startswith("up; claims fail: NoPermissionError: ")
            assert "'eval'" in store.status
            await admin.acl_setuser("gw", True, commands=["-mget"], reset_passwords=False)
            await store.get([key(1)])
            assert store.status.startswith("down: NoPermissionError: ")
            assert "'mget'" in store.status
        await store.close()
        store = build(server, clock, metrics, url=f"{server.socket_url}?username=gw&password=s3cret&db=1")
        await store.get([key(1)])
        assert store.status.startswith("down: NoPermissionError: ")
        assert "'select'" in store.status
        await store.close()
    assert len(caplog.records) == 4
    assert "s3cret" not in caplog.text


async def test_a_password_that_the_server_quotes_is_not_said(
    clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer("--rename-command", "AUTH", "") as server, caplog.at_level(logging.DEBUG):
        url = server.url_with("canary-passw0rd")
        store, limits = build(server, clock, metrics, url=url), SharedLimits(url, LIMIT, clock, metrics)
        assert await store.get([key(1)]) == [None]
        await limits.open()
        assert store.status.endswith("Error: unknown command 'AUTH'")
        assert [line for line in caplog.messages if "limits" in line and line.endswith("Error: unknown command 'AUTH'")]
        assert "canary" not in caplog.text + store.status
        await store.close()
        await limits.close()


async def test_a_replica_that_takes_no_writes_is_asked_again_on_a_new_connection_and_still_read(
    server: RedisServer, clock: Clock, metrics: Metrics
) -> None:
    store = build(server.start(), clock, metrics)
    await store.put(entries([1]))
    async with redis.asyncio.Redis.from_url(server.url) as admin:
        await admin.config_set("replica-serve-stale-data", "yes")
        await admin.replicaof("127.0.0.1", "1")
        before = (await admin.info("stats"))["total_connections_received"]
        await store.put(entries([2, 3]))
        assert (await admin.info("stats"))["total_connections_received"] == before + 1
        assert count(metrics, "redis", "set", "error") == 2
        assert await store.get([key(1)]) == [embedding(1)]
        assert store.status.startswith("up; writes fail: ReadOnlyError")
        await admin.replicaof("NO", "ONE")
        await store.put(entries([2]))
        assert store.status == "up"
    assert await store.get([key(2)]) == [embedding(2)]
    await store.close()


async def test_a_node_of_a_cluster_is_said_to_be_one(
    clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer("--cluster-enabled", "yes") as node, caplog.at_level(logging.WARNING):
        store = build(node, clock, metrics)
        await store._connections.exchange([(b"CLUSTER", b"ADDSLOTSRANGE", b"0", b"16383")])
        assert await store.get([key(1), key(2)]) == [None, None]
        assert store.status.startswith("down: the server is a node of a Redis Cluster")
        assert len(caplog.records) == 1
        await store.close()


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"-MOVED 1 10.0.0.1:6379\r\n", "the server is a node of a Redis Cluster"),
        (b"-LOADING Redis is loading the dataset in memory\r\n", "BusyLoadingError"),
        (b"-MASTERDOWN Link with MASTER is down\r\n", "MasterDownError"),
        (b"-ERR max number of clients reached\r\n", "ConnectionError"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "InvalidResponse"),
        (b":7\r\n", None),
        (b"*0\r\n", None),
        (b"*1\r\n:7\r\n", None),
        (b"+OK\r\n", None),
    ],
)
async def test_a_server_that_answers_something_else_is_a_miss(
    clock: Clock, metrics: Metrics, reply: bytes, error: str | None
) -> None:
    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line == b"MGET\r\n":
                writer.write(reply)

    async with listening(odd) as port:
        store = RedisStore(f"redis://127.0.0.1:{port}", LIMIT, 60, clock, metrics)
        assert await store.get([key(1)]) == [None]
        if error:
            assert store.status.startswith(f"down: {error}")
        else:
            assert count(metrics, "redis", "get", "corrupt") == 1
        await store.close()


@pytest.mark.parametrize("reply", [b"*1\r\n$3\r\nabc\r\n", b"*1\r\n:7\r\n", b"*4\r\n$3\r\nnan\r\n:0\r\n:0\r\n:1\r\n"])
async def test_a_script_that_answers_nonsense_is_as_none(clock: Clock, metrics: Metrics, reply: bytes) -> None:
    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line == b"EVALSHA\r\n":
                writer.write(reply)
            if line == b"MGET\r\n":
                writer.write(b"*1\r\n$-1\r\n")

    async with listening(odd) as port:
        url = f"redis://127.0.0.1:{port}"
        store, limits = RedisStore(url, LIMIT, 60, clock, metrics), SharedLimits(url, LIMIT, clock, metrics)
        assert await store.get_or_claim([key(1)]) == ([None], set())
        assert store.status == "up; claims fail: ValueError: not a script's reply"
        assert await limits.ask(b"x", Limit(None, None), Demand((0, 0), (0, 0), (0, 0))) is None
        await store.close()
        await limits.close()


async def test_an_error_without_end_is_not_told_to_its_end(clock: Clock, metrics: Metrics) -> None:
    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line == b"MGET\r\n":
                writer.write(b"-ERR " + b"x" * 10_000 + b"\r\n")

    async with listening(odd) as port:
        store = RedisStore(f"redis://127.0.0.1:{port}", LIMIT, 60, clock, metrics)
        assert await store.get([key(1)]) == [None]
        assert len(store.status) < 300
        await store.close()
