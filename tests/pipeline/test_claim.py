"""Replicas over a real Redis, whose upstream calls end when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial

import pytest
import pytest_asyncio
import redis.asyncio
from msgspec.structs import replace

from app.cache import keys
from app.cache.memory import MemoryStore
from app.cache.redis import RedisStore
from app.cache.store import CLAIM_TTL, Store
from app.cache.tiers import Tiers
from app.catalog import Model
from app.clock import SystemClock
from app.errors import ContextLengthExceeded, GatewayError, UpstreamAuth, UpstreamError
from app.metrics import Metrics
from app.pipeline.batcher import Batcher
from app.pipeline.cache_fill import CacheFill
from app.pipeline.cache_read import CacheRead
from app.pipeline.claim import Claim
from app.pipeline.deployment import CallLimits, Deployment, Slots
from app.pipeline.health import Health
from app.pipeline.route import Route
from app.types import (
    NO_EMBEDDING,
    Batch,
    BatchResult,
    Caller,
    Embedding,
    EmbedRequest,
    EmbedResult,
    Params,
    Source,
)
from tests.clock import settle
from tests.redis_server import RedisServer

LIMIT = 20.0


class Replica:
    """The cache stages over calls that are recorded, held until `go` is set, and fail where `errors` says so."""

    def __init__(self, url: str, *, memory: bool = False, write_buffer: int = 2**20) -> None:
        self.metrics, clock = Metrics(), SystemClock()
        stores: list[Store] = [MemoryStore(2**20, 60, clock, self.metrics)] if memory else []
        stores.append(RedisStore(url, LIMIT, 60, clock, self.metrics))
        self.cache = Tiers(stores, self.metrics, clock, write_buffer=write_buffer)
        self.embed = CacheRead(Claim(self._embed, self.cache), self.cache, "space")
        self.asked: list[list[str]] = []
        self.positions: list[Sequence[int] | None] = []
        self.go = asyncio.Event()
        self.go.set()
        self.errors: dict[str, GatewayError] = {}
        self.cache.embedders.add(self)

    @property
    def busy(self) -> bool:
        return not self.go.is_set()

    def in_flight(self, key: bytes) -> bool:
        return False

    async def _embed(self, request: EmbedRequest) -> EmbedResult:
        texts = list(map(str, request.inputs))
        self.asked.append(texts)
        self.positions.append(request.positions)
        await self.go.wait()
        errors = {i: self.errors[text] for i, text in enumerate(texts) if text in self.errors}
        if errors and not request.collect_too_long:
            raise errors[0]
        embeddings = [NO_EMBEDDING if i in errors else vector(text) for i, text in enumerate(texts)]
        if request.write_cache:
            pairs = zip(request.keys, embeddings, strict=True)
            self.cache.put([pair for pair in pairs if pair[1] is not NO_EMBEDDING])
        return EmbedResult(embeddings, [Source.UPSTREAM] * len(texts), 1, ("up/m",), errors)

    async def begins(self, *texts: str) -> asyncio.Task[EmbedResult]:
        """Starts a request; returns once its call has begun, which is held until `go` is set."""
        self.go.clear()
        asked = len(self.asked)
        task = asyncio.create_task(self.embed(request(*texts)))
        while len(self.asked) == asked:
            await asyncio.sleep(0.001)
        return task

    async def waits(self) -> None:
        """Returns once a request of this replica has found another replica's claim."""
        while not self.count("get", "held"):
            await asyncio.sleep(0.001)

    def count(self, operation: str, result: str) -> float:
        labels = {"tier": "redis", "operation": operation, "result": result}
        return self.metrics.registry.get_sample_value("embedding_gateway_cache_operations_total", labels) or 0.0


def vector(text: str) -> Embedding:
    return Embedding(text.encode().ljust(8), 1)


def request(*texts: str, seconds: float = 60.0) -> EmbedRequest:
    return EmbedRequest("m", texts, Params(), asyncio.get_running_loop().time() + seconds)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest_asyncio.fixture
async def replica(server: RedisServer) -> AsyncIterator[Callable[[], Replica]]:
    built: list[Replica] = []

    def build() -> Replica:
        built.append(Replica(server.url))
        return built[-1]

    yield build
    for each in built:
        await each.cache.close()


async def test_what_one_embeds_the_others_wait_for(replica: Callable[[], Replica]) -> None:
    one, other = replica(), replica()
    first = await one.begins("a", "b")
    second = asyncio.create_task(other.embed(request("b", "c", "b", "a", "d")))
    await other.waits()
    while not other.asked:
        await asyncio.sleep(0.001)
    assert other.asked == [["c", "d"]], "what nobody else embeds does not wait"
    assert not second.done()
    one.go.set()
    result = await second
    assert result.embeddings == [vector(text) for text in ("b", "c", "b", "a", "d")]
    assert result.sources == [Source.CACHE, Source.UPSTREAM, Source.CACHE, Source.CACHE, Source.UPSTREAM]
    assert (result.calls, result.deployments) == (1, ("up/m",))
    assert (await first).embeddings == [vector("a"), vector("b")]
    assert other.asked == [["c", "d"]]
    assert other.count("claim", "expired") == 0


async def test_requests_of_one_replica_do_not_wait_for_each_other_here(replica: Callable[[], Replica]) -> None:
    one = replica()
    one.go.clear()
    both = [asyncio.create_task(one.embed(request("a"))) for _ in range(2)]
    async with asyncio.timeout(LIMIT):
        while len(one.asked) < 2:  # merging them is the next stage's job
            await asyncio.sleep(0.001)
    one.go.set()
    await asyncio.gather(*both)
    assert one.count("get", "held") == 0


async def test_what_one_fails_to_embed_the_next_one_tries_at_once(replica: Callable[[], Replica]) -> None:
    one, other = replica(), replica()
    one.errors["a"] = UpstreamError("no")
    first = await one.begins("a")
    second = asyncio.create_task(other.embed(request("a")))
    await other.waits()
    one.go.set()
    async with asyncio.timeout(CLAIM_TTL - 1):
        assert (await second).embeddings == [vector("a")]
    assert other.asked == [["a"]]
    assert other.count("claim", "expired") == 1
    with pytest.raises(UpstreamError):
        await first


async def test_of_what_is_too_long_the_claim_is_let_go(replica: Callable[[], Replica]) -> None:
    one, other = replica(), replica()
    one.errors["long"] = ContextLengthExceeded("too long")
    result = await one.embed(replace(request("a", "long", "b"), collect_too_long=True))
    assert set(result.too_long) == {1}
    async with asyncio.timeout(CLAIM_TTL - 1):
        again = await other.embed(request("a", "long", "b"))
    assert again.embeddings == [vector(text) for text in ("a", "long", "b")]
    assert other.asked == [["long"]]


async def test_places_of_what_is_too_long_are_the_whole_requests(replica: Callable[[], Replica]) -> None:
    one, other = replica(), replica()
    first = await one.begins("a")
    other.errors["long"] = ContextLengthExceeded("too long")
    second = asyncio.create_task(other.embed(replace(request("a", "b", "long"), collect_too_long=True)))
    await other.waits()
    one.go.set()
    result = await second
    assert set(result.too_long) == {2}
    assert result.embeddings == [vector("a"), vector("b"), NO_EMBEDDING]
    assert other.asked == [["b", "long"]], "what is too long and not cached is not asked again"
    await first


async def test_a_claim_holds_for_who_hung_up(replica: Callable[[], Replica]) -> None:
    one, other = replica(), replica()
    first = await one.begins("a")
    first.cancel()
    second = asyncio.create_task(other.embed(request("a")))
    await other.waits()
    one.cache.put([(keys.derive("space", Params(), ["a"])[0], vector("a"))])  # as the call does when it ends
    assert (await second).embeddings == [vector("a")]
    assert other.asked == []


async def test_waiting_leaves_half_of_the_time(replica: Callable[[], Replica]) -> None:
    one, other = replica(), replica()
    first = await one.begins("a")
    began = asyncio.get_running_loop().time()
    result = await other.embed(request("a", seconds=1.0))
    assert result.sources == [Source.UPSTREAM]
    assert 0.4 < asyncio.get_running_loop().time() - began < 0.9
    assert other.count("get", "held") < 50, "Redis is not asked all the time"
    one.go.set()
    await first


async def test_what_has_come_while_the_rest_took_its_time_is_not_asked_again(replica: Callable[[], Replica]) -> None:
    one, other = replica(), replica()
    first = await one.begins("a")
    other.go.clear()
    second = asyncio.create_task(other.embed(request("a", "b", seconds=0.2)))
    await other.waits()
    one.go.set()
    await first
    await asyncio.sleep(0.15)  # more than half of the claim's time
    other.go.set()
    assert (await second).sources == [Source.CACHE, Source.UPSTREAM]
    assert other.asked == [["b"]]


async def test_what_a_request_of_this_replica_has_brought_is_not_asked_again_though_redis_is_gone(
    server: RedisServer, replica: Callable[[], Replica]
) -> None:
    one, other = replica(), Replica(server.url, memory=True)
    await one.embed(request("warm"))
    first = await one.begins("a")
    second = asyncio.create_task(other.embed(request("a")))
    await other.waits()
    await other.embed(replace(request("a"), read_cache=False))
    server.kill()
    assert (await second).embeddings == [vector("a")]
    assert other.asked == [["a"]], "for the other request"
    one.go.set()
    await first
    await other.cache.close()


async def test_who_waits_no_longer_for_what_is_too_long_asks_for_it_once(replica: Callable[[], Replica]) -> None:
    one, other = replica(), replica()
    first = await one.begins("long")
    other.errors["long"] = ContextLengthExceeded("too long")
    async with asyncio.timeout(LIMIT):
        result = await other.embed(replace(request("long", seconds=0.2), collect_too_long=True))
    assert set(result.too_long) == {0}
    assert other.asked == [["long"]]
    one.go.set()
    await first


async def test_nobody_waits_for_a_claim_longer_than_it_lasts(
    replica: Callable[[], Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = replica(), replica()
    monkeypatch.setattr("app.pipeline.claim.CLAIM_TTL", 0.2)  # in place of a claim that its owner renews for ever
    first = await one.begins("a")
    async with asyncio.timeout(CLAIM_TTL - 1):
        assert (await other.embed(request("a"))).sources == [Source.UPSTREAM]
    one.go.set()
    await first


async def test_bulk_work_waits_for_as_long_as_the_other_is_at_it_and_a_query_for_three_seconds(
    replica: Callable[[], Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = replica(), replica()
    for name, seconds in (("redis.CLAIM_TTL", 0.3), ("tiers._RENEWAL_INTERVAL", 0.1)):
        monkeypatch.setattr(f"app.cache.{name}", seconds)
    monkeypatch.setattr("app.pipeline.claim.CLAIM_TTL", 0.3)
    first = await one.begins("a", "b")
    bulk = asyncio.create_task(other.embed(replace(request("a"), caller=Caller(lane="bulk"))))
    query = await other.embed(request("b"))
    assert query.sources == [Source.UPSTREAM]
    await asyncio.sleep(0.6)  # with the time before, three times as long as a claim lasts
    assert other.asked == [["b"]]
    one.go.set()
    assert (await bulk).sources == [Source.CACHE]
    assert other.asked == [["b"]]
    await first


async def test_who_dies_holds_up_no_bulk_work(replica: Callable[[], Replica], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = replica(), replica()
    monkeypatch.setattr("app.cache.redis.CLAIM_TTL", 0.3)
    first = await one.begins("a")
    one.cache.embedders.clear()  # so that nothing renews its claims
    async with asyncio.timeout(LIMIT):
        bulk = await other.embed(replace(request("a"), caller=Caller(lane="bulk")))
    assert bulk.sources == [Source.UPSTREAM]
    one.go.set()
    await first


@pytest.mark.parametrize("without", ["read_cache", "write_cache"])
async def test_who_reads_or_writes_no_cache_neither_waits_nor_holds_up(
    replica: Callable[[], Replica], without: str
) -> None:
    one, other = replica(), replica()
    plain = await one.begins("a")
    odd = await other.embed(replace(request("a", "b"), **{without: False}))
    assert odd.sources == [Source.UPSTREAM] * 2
    other.errors["c"] = UpstreamError("no")
    with pytest.raises(UpstreamError):
        await other.embed(replace(request("c"), **{without: False}))
    one.go.set()
    await plain
    assert (await one.embed(request("c"))).sources == [Source.UPSTREAM]
    assert one.count("get", "held") == other.count("get", "held") == 0


async def test_who_claims_nothing_lets_go_of_nothing(replica: Callable[[], Replica]) -> None:
    one, other = replica(), replica()
    (key,) = keys.derive("space", Params(), ["a"])
    await one.cache.get_or_claim([key])  # for a request in progress
    one.errors["a"] = UpstreamError("no")
    with pytest.raises(UpstreamError):
        await one.embed(replace(request("a"), read_cache=False))
    result = await one.embed(replace(request("a"), read_cache=False, collect_too_long=True))
    assert set(result.too_long) == {0}
    await one.cache.close()  # then released claims have been deleted
    assert await other.cache.get_or_claim([key]) == ([None], {key})


async def test_a_part_of_a_part_knows_where_the_caller_has_its_inputs(replica: Callable[[], Replica]) -> None:
    one, other = replica(), replica()
    await one.embed(request("b"))
    first = await one.begins("d")
    asked = replace(request("a", "b", "c", "d"), positions=[7, 7, 8, 9])
    second = asyncio.create_task(other.embed(asked))
    await other.waits()
    one.go.set()
    assert (await second).embeddings == [vector(text) for text in "abcd"]
    assert other.positions == [[7, 8]]
    await first


class Calls:
    """An upstream that takes one text per call, holds each call until its event is set, and always refuses `bad`."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = {text: asyncio.Event() for text in ("bad", "a", "b")}

    async def __call__(self, batch: Batch) -> BatchResult:
        (text,) = map(str, batch.inputs)
        self.begun.append(text)
        await self.go[text].wait()
        error = UpstreamAuth("no") if text == "bad" else UpstreamError("lost") if text == "b" else None
        return BatchResult([error or vector(text)])

    async def begin(self, count: int) -> None:
        async with asyncio.timeout(LIMIT):
            while len(self.begun) < count:
                await asyncio.sleep(0.001)


def over(calls: Calls, replica: Replica) -> tuple[Batcher, CacheRead]:
    """A public model of the replica over this upstream, built as the registry builds it."""
    fill = CacheFill(calls, replica.cache)
    health = Health(SystemClock(), partial(replica.metrics.show_deployment, "up", "m"), "up/m")
    deployment = Deployment("up", Model("m"), "up/m", Slots(3), CallLimits(1, None), health, fill)
    route = Route([deployment], replica.metrics, SystemClock())
    batcher = Batcher(route, replica.metrics, SystemClock(), replica.cache.release_claims)
    replica.cache.embedders.add(batcher)
    return batcher, CacheRead(Claim(batcher, replica.cache), replica.cache, "space")


async def claimed(cache: Tiers, text: str) -> bool:
    """Whether the replica with this cache claims the text; otherwise it would wait for another's claim."""
    return bool((await cache.get_or_claim(keys.derive("space", Params(), [text])))[1])


async def test_claims_last_as_long_as_somebody_here_embeds_the_text_and_no_longer(
    server: RedisServer, replica: Callable[[], Replica]
) -> None:
    one, other, calls = replica(), replica(), Calls()
    batcher, embed = over(calls, one)
    asking = asyncio.create_task(embed(request("bad", "a", "b")))
    await calls.begin(3)
    calls.go["bad"].set()
    with pytest.raises(GatewayError):
        await asking
    async with asyncio.timeout(CLAIM_TTL - 1):
        while await claimed(other.cache, "bad"):
            await asyncio.sleep(0.001)
    assert await claimed(other.cache, "a"), "its call goes on, and what it brings is cached"
    assert await claimed(other.cache, "b")
    calls.go["b"].set()
    async with asyncio.timeout(CLAIM_TTL - 1):
        while await claimed(other.cache, "b"):
            await asyncio.sleep(0.001)
    assert await claimed(other.cache, "a")
    calls.go["a"].set()
    await batcher.aclose()


@pytest.mark.parametrize("write_buffer", [2**20, 0], ids=["queued", "only its key queued"])
async def test_what_waits_to_be_written_stays_claimed_when_its_request_fails(
    server: RedisServer, replica: Callable[[], Replica], write_buffer: int
) -> None:
    one, other, calls = Replica(server.url, memory=True, write_buffer=write_buffer), replica(), Calls()
    batcher, embed = over(calls, one)
    asking = asyncio.create_task(embed(request("bad", "a")))
    await calls.begin(2)
    async with redis.asyncio.Redis.from_url(server.url) as admin, asyncio.timeout(LIMIT):
        await admin.config_set("min-replicas-to-write", 1)  # as in a failover
        calls.go["a"].set()
        while not one.cache._writers[0]._away:
            await asyncio.sleep(0.001)
        await admin.config_set("min-replicas-to-write", 0)  # which the writer notices later
    calls.go["bad"].set()
    with pytest.raises(GatewayError):
        await asking
    async with asyncio.timeout(CLAIM_TTL - 1):
        while await claimed(other.cache, "bad"):
            await asyncio.sleep(0.001)
    found, held = await other.cache.get_or_claim(keys.derive("space", Params(), ["a"]))
    assert held or found == [vector("a")], "or else the other replica would pay for it too"
    await batcher.aclose()
    await one.cache.close()


async def test_the_claim_on_what_is_never_written_ends(server: RedisServer, replica: Callable[[], Replica]) -> None:
    one, other, calls = Replica(server.url, write_buffer=0), replica(), Calls()
    batcher, embed = over(calls, one)
    calls.go["a"].set()
    await embed(request("a"))
    assert one.count("set", "dropped") == 1
    async with asyncio.timeout(CLAIM_TTL - 1):
        while await claimed(other.cache, "a"):
            await asyncio.sleep(0.001)
    await batcher.aclose()
    await one.cache.close()


async def test_who_hangs_up_holds_no_claim_of_what_is_still_queued(
    server: RedisServer, replica: Callable[[], Replica]
) -> None:
    one, other, calls = replica(), replica(), Calls()
    batcher, embed = over(calls, one)
    first = asyncio.create_task(embed(request("bad", "a", "b", *"defg")))  # three calls begin, four texts queue
    await calls.begin(3)
    second = asyncio.create_task(embed(request("b", "g", "h")))
    while not batcher.in_flight(keys.derive("space", Params(), ["h"])[0]):
        await asyncio.sleep(0.001)
    second.cancel()
    async with asyncio.timeout(CLAIM_TTL - 1):
        while await claimed(other.cache, "h"):
            await asyncio.sleep(0.001)
    assert await claimed(other.cache, "b")
    assert await claimed(other.cache, "g"), "the first request waits for it"
    first.cancel()
    async with asyncio.timeout(CLAIM_TTL - 1):
        while await claimed(other.cache, "g"):
            await asyncio.sleep(0.001)
    assert await claimed(other.cache, "b"), "its call goes on"
    for event in calls.go.values():
        event.set()
    await batcher.aclose()


async def test_who_hangs_up_while_redis_is_asked_ends_no_claim_of_what_is_under_way(
    server: RedisServer, replica: Callable[[], Replica]
) -> None:
    one, other, calls = replica(), replica(), Calls()
    batcher, embed = over(calls, one)
    first = asyncio.create_task(embed(request("a")))
    await calls.begin(1)
    server.pause()
    second = asyncio.create_task(embed(request("a")))
    await settle()
    second.cancel()
    server.resume()
    async with asyncio.timeout(LIMIT):
        while one.count("get", "miss") < 2:
            await asyncio.sleep(0.001)
    await settle()  # its lookup has ended
    await one.cache.close()  # then released claims have been deleted
    assert await claimed(other.cache, "a")
    calls.go["a"].set()
    await first
    await batcher.aclose()


async def test_who_hangs_up_while_redis_is_asked_leaves_the_claim_to_who_asks_as_well(
    server: RedisServer, replica: Callable[[], Replica]
) -> None:
    one, other, calls = replica(), replica(), Calls()
    batcher, embed = over(calls, one)

    async def ask(text: str) -> list[asyncio.Task[EmbedResult]]:
        """Two requests, each with a lookup and a connection of its own."""
        server.pause()
        asking = []
        for _ in range(2):
            asking.append(asyncio.create_task(embed(request(text))))
            await settle()
        return asking

    calls.go["b"].set()
    warm = await ask("b")  # from now on both connections are open, and the server knows the script
    server.resume()
    await asyncio.wait(warm)
    stays, leaves = await ask("a")
    leaves.cancel()
    server.resume()  # it answers the last first
    async with asyncio.timeout(LIMIT):
        while one.count("get", "miss") < 4:
            await asyncio.sleep(0.001)
    await settle()  # both lookups have ended
    await one.cache.close()  # then released claims have been deleted
    assert await claimed(other.cache, "a")
    calls.go["a"].set()
    await stays
    await batcher.aclose()


async def test_of_two_who_hang_up_while_redis_is_asked_neither_leaves_the_claim_to_the_other(
    server: RedisServer, replica: Callable[[], Replica]
) -> None:
    one, other = replica(), replica()
    await one.embed(request("x"))  # so that it is connected
    server.pause()
    both = [asyncio.create_task(one.embed(request("a"))) for _ in range(2)]
    await settle()
    for each in both:
        each.cancel()
    server.resume()
    async with asyncio.timeout(CLAIM_TTL - 1):
        while one.count("get", "miss") < 2 or await claimed(other.cache, "a"):
            await asyncio.sleep(0.001)
