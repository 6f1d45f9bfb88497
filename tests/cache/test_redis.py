"""The Redis tier with a healthy server; test_redis_faults.py has the others."""

import asyncio
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis.asyncio

from app.cache.link import connections
from app.cache.redis import PREFIX, RedisStore
from app.cache.shared_limits import Demand, SharedLimits
from app.cache.shared_tokens import SharedTokens
from app.cache.tiers import Tiers
from app.limits import Bucket, Limit
from app.metrics import Metrics
from tests.cache.support import LIMIT, Clock, count, embedding, entries, key, listening
from tests.harness import no_descriptors
from tests.processes import free_port
from tests.redis_server import RedisServer

README = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def running() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest_asyncio.fixture
async def admin(running: RedisServer) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(running.url) as client:
        await client.flushall()
        await client.config_resetstat()
        yield client


@pytest_asyncio.fixture
async def store(
    running: RedisServer, admin: redis.asyncio.Redis, clock: Clock, metrics: Metrics
) -> AsyncIterator[RedisStore]:
    built = RedisStore(running.url, LIMIT, 60, clock, metrics)
    yield built
    await built.close()


async def calls(admin: redis.asyncio.Redis, command: str) -> int:
    stats = await admin.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))


async def test_what_was_put_in_comes_out_bit_for_bit(store: RedisStore, metrics: Metrics) -> None:
    await store.put(entries(range(100), dimensions=1024))
    found = await store.get([key(99), key(100), key(0), key(99)])
    assert found == [embedding(99, 1024), None, embedding(0, 1024), embedding(99, 1024)]
    assert count(metrics, "redis", "set", "ok") == 100
    assert (count(metrics, "redis", "get", "hit"), count(metrics, "redis", "get", "miss")) == (3, 1)
    size = metrics.registry.get_sample_value("embedding_gateway_cache_bytes", {"tier": "redis"})
    assert size is None, "which the server tells, and not 0"
    assert store.status == "up"


@pytest.mark.parametrize("size", [1, 16, 2048])
async def test_a_look_up_is_one_mget(store: RedisStore, admin: redis.asyncio.Redis, size: int) -> None:
    await store.get([key(number) for number in range(size)])
    assert await calls(admin, "mget") == 1
    assert await calls(admin, "get") == 0


async def test_no_keys_are_no_look_up(store: RedisStore, admin: redis.asyncio.Redis) -> None:
    assert await store.get([]) == []
    assert await calls(admin, "mget") == 0


async def test_look_ups_of_many_requests_at_once_are_one_mget(
    store: RedisStore, admin: redis.asyncio.Redis, clock: Clock, metrics: Metrics
) -> None:
    await store.put(entries(range(30)))
    tiers = Tiers([store], metrics, clock)
    found = await asyncio.gather(*(tiers.get([key(number), key(number // 2)]) for number in range(32)))
    expected = [[embedding(number) if number < 30 else None, embedding(number // 2)] for number in range(32)]
    assert found == expected
    assert await calls(admin, "mget") == 1
    assert (count(metrics, "redis", "get", "hit"), count(metrics, "redis", "get", "miss")) == (30, 2)


async def test_every_value_is_written_with_its_time_to_live(store: RedisStore, admin: redis.asyncio.Redis) -> None:
    await store.put(entries(range(200)))
    names = await admin.keys("*")
    assert sorted(names) == sorted(PREFIX + key(number) for number in range(200))
    left = [await admin.pttl(name) for name in names]
    assert all(0 < each <= 60_000 for each in left)
    assert await calls(admin, "set") == 200
    assert await calls(admin, "multi") == 0


async def test_connecting_without_a_password_says_nothing_but_the_command(
    store: RedisStore, admin: redis.asyncio.Redis
) -> None:
    await store.get([key(1)])
    for chatter in ("hello", "ping", "client|setinfo", "select"):
        assert await calls(admin, chatter) == 0


async def test_many_look_ups_at_once_share_a_bounded_number_of_connections(
    running: RedisServer, admin: redis.asyncio.Redis, clock: Clock, metrics: Metrics
) -> None:
    store = RedisStore(running.url, LIMIT, 60, clock, metrics, max_connections=4)
    await store.put(entries(range(50)))
    before = (await admin.info("stats"))["total_connections_received"]
    found = await asyncio.gather(*(store.get([key(number)]) for number in range(50)))
    assert found == [[embedding(number)] for number in range(50)]
    assert (await admin.info("stats"))["total_connections_received"] - before <= 4
    await store.close()


@pytest.mark.parametrize(
    "value", [b"", b"garbage", b"EGV", b"[0.1, 0.2]", b"EGV\x00" + bytes(60), b"\x80\x04pickle" * 100]
)
async def test_a_value_that_is_none_of_ours_is_a_miss_and_is_overwritten(
    store: RedisStore, admin: redis.asyncio.Redis, metrics: Metrics, value: bytes
) -> None:
    await store.put(entries([2]))
    await admin.set(PREFIX + key(1), value)
    assert await store.get([key(1), key(2), key(3)]) == [None, embedding(2), None]
    assert count(metrics, "redis", "get", "corrupt") == 1
    assert count(metrics, "redis", "get", "miss") == 1
    assert store.status == "up"
    await store.put(entries([1]))
    assert await store.get([key(1)]) == [embedding(1)]


async def test_another_keys_value_is_a_miss(store: RedisStore, admin: redis.asyncio.Redis, metrics: Metrics) -> None:
    await store.put(entries([1]))
    await admin.set(PREFIX + key(2), await admin.get(PREFIX + key(1)) or b"")
    assert await store.get([key(2)]) == [None]
    assert count(metrics, "redis", "get", "corrupt") == 1
    assert count(metrics, "redis", "get", "miss") == 0


async def test_a_key_of_another_type_is_a_miss(store: RedisStore, admin: redis.asyncio.Redis) -> None:
    await admin.lpush(PREFIX + key(1), "element")
    assert await store.get([key(1)]) == [None]
    assert store.status == "up"


async def test_an_idle_connection_is_probed_before_a_firewall_or_balancer_forgets_it(clock: Clock) -> None:
    """They do after minutes, silently, and lookups on it would time out."""
    with RedisServer(port=free_port()) as server:
        pool = connections(server.url, 1, clock.monotonic)
        assert await pool.exchange([(b"PING",)]) == [b"PONG"]
        connection: Any = pool._slots.get_nowait()
        sock = connection._writer.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
        await connection.disconnect(nowait=True)


async def test_a_numbered_database_over_tcp_with_a_password_works(clock: Clock, metrics: Metrics) -> None:
    with RedisServer(port=free_port(), password="s3cret-p4ss") as server:
        store = RedisStore(server.url.replace("/0", "/3"), LIMIT, 60, clock, metrics)
        await store.put(entries([1]))
        assert await store.get([key(1)]) == [embedding(1)]
        async with redis.asyncio.Redis.from_url(server.url) as admin:
            assert list(await admin.info("keyspace")) == ["db3"]
        await store.close()


@pytest.mark.parametrize(
    "url", ["http://:s3cret@host", "redis://:s3cret#x@host:port", "redis://h/0?s3cret=1", "s3cret", ""]
)
async def test_a_url_that_is_none_is_refused_without_being_quoted(clock: Clock, metrics: Metrics, url: str) -> None:
    with pytest.raises(ValueError, match="not a Redis URL") as refused:
        RedisStore(url, 1, 60, clock, metrics)
    assert "s3cret" not in str(refused.value)
    assert refused.value.__suppress_context__


async def test_the_password_is_in_no_log_and_no_repr(
    clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        store = RedisStore(f"redis://user:s3cret@127.0.0.1:{closed.getsockname()[1]}/0", LIMIT, 60, clock, metrics)
        with caplog.at_level(logging.DEBUG):
            await store.open()
    assert caplog.records
    assert "s3cret" not in caplog.text + repr(store) + str(vars(store)) + store.status
    await store.close()


async def test_a_tls_url_is_spoken_to_in_tls(clock: Clock, metrics: Metrics) -> None:
    first = asyncio.Future[bytes]()

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not first.done():
            first.set_result(await reader.readexactly(3))

    async with listening(server) as port:
        store = RedisStore(f"rediss://127.0.0.1:{port}/0", LIMIT, 60, clock, metrics)
        assert await store.get([key(1)]) == [None]
        assert (await first)[:2] == b"\x16\x03"  # a TLS handshake record
        await store.close()


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[ssl.SSLContext]:
    """The SSL contexts made from the system's certificates."""
    made: list[ssl.SSLContext] = []
    create = ssl.create_default_context

    def made_as_well() -> ssl.SSLContext:
        made.append(create())
        return made[-1]

    monkeypatch.setattr(ssl, "create_default_context", made_as_well)
    return made


async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def test_connections_in_tls_read_the_certificates_once_in_a_while(
    clock: Clock, contexts: list[ssl.SSLContext]
) -> None:
    async with listening(hang_up) as port:
        shared = connections(f"rediss://127.0.0.1:{port}/0", 8, clock.monotonic)
        for seen in (1, 2):
            asked = [shared.exchange([(b"PING",)]) for _ in range(8)]
            assert all(
                isinstance(end, redis.exceptions.ConnectionError)
                for end in await asyncio.gather(*asked, return_exceptions=True)
            )
            assert len(contexts) == seen
            clock.advance(60)
        await shared.close()


async def test_certificates_that_cannot_be_read_for_want_of_a_descriptor_are_read_for_the_next_connection(
    clock: Clock, contexts: list[ssl.SSLContext]
) -> None:
    async with listening(hang_up) as port:
        shared = connections(f"rediss://127.0.0.1:{port}/0", 8, clock.monotonic)
        with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
            await shared.exchange([(b"PING",)])
        assert not contexts  # one made now would trust no certificate
        with pytest.raises(redis.exceptions.ConnectionError):
            await shared.exchange([(b"PING",)])
        assert len(contexts) == 1
        await shared.close()


async def test_the_rights_that_readme_names_are_enough_and_none_is_too_many(
    clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    found = re.search(r"^ *(~eg:.*)$", README, re.MULTILINE)
    assert found
    rights = found[1].split()
    with RedisServer(port=free_port()) as server, caplog.at_level(logging.WARNING):
        async with redis.asyncio.Redis.from_url(server.url) as admin:
            for left_out in (None, *rights):
                caplog.clear()
                keys = [right[1:] for right in rights if right[0] == "~" and right != left_out]
                commands = [right for right in rights if right[0] == "+" and right != left_out]
                await admin.acl_setuser("gw", True, passwords="+pw", keys=keys, commands=commands, reset=True)
                await admin.flushdb()
                await admin.script_flush()
                await use_all(server.url.replace("//", "//gw:pw@"), clock, metrics)
                assert bool(caplog.messages) == (left_out is not None), left_out


async def use_all(url: str, clock: Clock, metrics: Metrics) -> None:
    """Uses everything that a gateway needs of Redis."""
    store, limits = RedisStore(url, LIMIT, 60, clock, metrics), SharedLimits(url, LIMIT, clock, metrics)
    tokens = SharedTokens(url, LIMIT, clock, metrics)
    await store.open()
    await store.get_or_claim([key(1), key(2)])
    await store.put(entries([1]))
    await store.release_claims([key(2)])
    await limits.ask(b"a", Limit(Bucket(60, 60, 0), None), Demand((0, 0), (1, 0), (1, 0)))
    assert await tokens.claim(b"a", 60)
    await tokens.put(b"a", b"sealed", 60)
    await tokens.get(b"a")
    await tokens.release(b"a")
    for each in (store, limits, tokens):
        await each.close()
