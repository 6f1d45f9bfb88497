"""Calls to an upstream at its pace, by a clock moved by hand, over the real batcher and route."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest
import pytest_asyncio
from redis import Redis

from app import tokens
from app.cache.shared_limits import PREFIX, SharedLimits
from app.catalog import ROLES, Model
from app.errors import GatewayError, InvalidRequest, RateLimited, UpstreamError
from app.limits import MAX_DEBT, Rates
from app.metrics import Metrics
from app.pipeline.adapt import Adapt
from app.pipeline.batcher import Batcher
from app.pipeline.deployment import CallLimits, Deployment, Slots
from app.pipeline.health import FAILURES, Health
from app.pipeline.pace import Pace
from app.pipeline.route import Route
from app.types import Batch, BatchResult, Caller, Embedding, EmbedRequest, Input, Lane, Params
from tests.cache.support import LIMIT, until
from tests.clock import HandClock, settle
from tests.redis_server import RedisServer


@dataclass
class Upstream:
    """An upstream that answers at once, and records the time and texts of each call."""

    clock: HandClock
    calls: list[tuple[float, list[str]]] = field(default_factory=list)
    billed: int = 1
    errors: list[GatewayError] = field(default_factory=list)
    wire_calls: int = 1

    async def __call__(self, batch: Batch) -> BatchResult:
        self.calls.append((self.clock.now, list(map(str, batch.inputs))))
        if self.errors:
            return BatchResult([self.errors.pop(0)] * len(batch.inputs))
        for _ in range(1, self.wire_calls):
            batch.on_further_call()
        return BatchResult([Embedding(b"v", self.billed) for _ in batch.inputs], self.wire_calls)

    @property
    def times(self) -> list[float]:
        """Seconds since the start."""
        return [round(at - 1000, 6) for at, _ in self.calls]

    def within(self, seconds: float) -> int:
        """The highest number of calls in any span of `seconds`."""
        return max(sum(start <= at < start + seconds - 1e-6 for at in self.times) for start in self.times)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def upstream(clock: HandClock) -> Upstream:
    return Upstream(clock)


def batcher(upstream: Upstream, *slots: Slots, rows: int = 1) -> Batcher:
    """A batcher over one deployment for each of these slots, all at one upstream."""
    clock, metrics = upstream.clock, Metrics()
    deployments = [
        Deployment(
            f"up{i}", Model("m", roles=ROLES), "s", each, CallLimits(rows),
            Health(clock, partial(metrics.show_deployment, f"up{i}", "m"), f"up{i}/m"), upstream, priority=i,
        )
        for i, each in enumerate(slots)
    ]  # fmt: skip
    return Batcher(Route(deployments, metrics, clock, jitter=lambda: 0.0), metrics, clock)


def paced(clock: HandClock, *, requests: int | None = None, tokens: int | None = None, slots: int = 8) -> Slots:
    return Slots(slots, Pace("up", Rates(requests, tokens), clock))


def request(*texts: str, lane: Lane | None = None, patience: float = 300) -> EmbedRequest:
    deadline = asyncio.get_running_loop().time() + patience
    return EmbedRequest("m", texts, Params(), deadline, Caller(lane=lane), keys=[text.encode() for text in texts])


async def run(clock: HandClock, seconds: float, step: float = 0.01) -> None:
    await settle()
    for _ in range(round(seconds / step)):
        await clock.advance(step)


async def test_calls_go_evenly_at_the_pace_and_nothing_fails(clock: HandClock, upstream: Upstream) -> None:
    embed = batcher(upstream, paced(clock, requests=600))
    asked = asyncio.create_task(embed(request(*(f"{i}" for i in range(42)))))
    await run(clock, 4.05)
    assert len((await asked).embeddings) == 42
    assert upstream.within(1.0) <= 12
    assert upstream.within(0.1) <= 3
    assert len([at for at in upstream.times if at < 2]) >= 20, "and no slower than that"
    await embed.aclose()


async def test_while_idle_nothing_is_slowed(clock: HandClock, upstream: Upstream) -> None:
    embed = batcher(upstream, paced(clock, requests=60, tokens=60))
    for i in range(5):
        await embed(request(f"{i}"))
        await run(clock, 1, step=1)
    assert upstream.times == [0, 1, 2, 3, 4]


async def test_what_waits_for_the_pace_goes_in_full_calls(clock: HandClock, upstream: Upstream) -> None:
    embed = batcher(upstream, paced(clock, requests=60), rows=10)
    first = asyncio.create_task(embed(request("first")))
    await settle()
    later = [asyncio.create_task(embed(request(f"{i}"))) for i in range(20)]
    await run(clock, 2, step=0.1)
    await asyncio.gather(first, *later)
    assert [len(texts) for _, texts in upstream.calls] == [1, 10, 10]
    await embed.aclose()


@pytest.mark.parametrize(("requests", "sent"), [(6000, [256, 128]), (None, [128, 128, 128])])
async def test_where_calls_are_counted_they_are_full_though_slots_are_free(
    clock: HandClock, upstream: Upstream, requests: int | None, sent: list[int]
) -> None:
    slots = paced(clock, requests=requests) if requests else Slots(8)
    embed = batcher(upstream, slots, rows=256)
    asked = [asyncio.create_task(embed(request(*(f"{n} {i}" for i in range(128))))) for n in range(3)]
    await run(clock, 0.1)
    await asyncio.gather(*asked)
    assert [len(texts) for _, texts in upstream.calls] == sent
    await embed.aclose()


async def test_tokens_are_kept_too_by_what_a_call_carried(clock: HandClock, upstream: Upstream) -> None:
    """600 a minute are 10 a second."""
    upstream.billed = 30
    embed = batcher(upstream, paced(clock, tokens=600))
    asked = asyncio.create_task(embed(request(*(letter * 120 for letter in "abc"))))
    await run(clock, 7)
    await asked
    first, second, third = upstream.times
    assert first == 0
    assert second == pytest.approx(2.9, abs=0.02), "in debt by 30 less a burst of 2, plus the one that must be there"
    assert third - second == pytest.approx(3.0, abs=0.02)
    await embed.aclose()


TEN = "x" * 40
"""A text of ten tokens by estimate, before anything is added to it."""


@pytest.mark.parametrize(("requests", "carried"), [(None, 20), (600, 20), (6, 100)])
async def test_a_call_carries_two_seconds_worth_of_tokens_or_its_part_where_calls_are_fewer(
    clock: HandClock, upstream: Upstream, requests: int | None, carried: int
) -> None:
    """6,000 a minute are 100 a second; with six calls a minute each has to carry ten seconds' worth."""
    upstream.billed = 10
    embed = batcher(upstream, paced(clock, requests=requests, tokens=6000), rows=256)
    asked = asyncio.create_task(embed(request(*(f"{i:03}{TEN[3:]}" for i in range(200)))))
    await run(clock, 20)
    await asked
    assert [len(texts) for _, texts in upstream.calls] == [carried] * (200 // carried)
    assert upstream.times[-1] == pytest.approx(20 - carried / 10, abs=0.2), "and no slower than the pace"
    await embed.aclose()


async def test_a_text_that_is_more_than_that_goes_alone(clock: HandClock, upstream: Upstream) -> None:
    embed = batcher(upstream, paced(clock, tokens=6000), rows=256)
    asked = asyncio.create_task(embed(request("small", "large" + 100 * TEN, "last")))
    await run(clock, 1)
    await asked
    assert [[text[:5] for text in texts] for _, texts in upstream.calls] == [["small"], ["large"], ["last"]]
    await embed.aclose()


async def test_a_query_waits_two_seconds_at_the_most_for_the_tokens_of_bulk_work(
    clock: HandClock, upstream: Upstream
) -> None:
    upstream.billed = 10
    embed = batcher(upstream, paced(clock, tokens=6000), rows=256)
    bulk = asyncio.create_task(embed(request(*(f"{i:03}{TEN[3:]}" for i in range(1000)))))
    await run(clock, 5)
    for number in range(5):
        began = clock.now
        query = asyncio.create_task(embed(request(f"query {number}", lane="query")))
        await run(clock, 2)
        assert query.done()
        assert upstream.calls[-1][0] <= began + 2
    bulk.cancel()
    await embed.aclose()


async def test_a_slower_pace_has_smaller_calls(clock: HandClock) -> None:
    """A call carries what one of several processes, or a pace cut by a rate limit, may send in two seconds."""
    pace = Pace("up", Rates(tokens=6000), clock, processes=2)
    assert pace.tokens_per_call() == 100
    Slots(8, pace).shrink()
    assert pace.tokens_per_call() == 50
    assert Pace("up", Rates(requests=60), clock).tokens_per_call() is None


async def test_an_estimate_is_put_right_by_the_bill(clock: HandClock, upstream: Upstream) -> None:
    upstream.billed = 10
    embed = batcher(upstream, paced(clock, tokens=600))
    asked = asyncio.create_task(embed(request(*(letter * 120 for letter in "ab"))))
    await run(clock, 2)
    await asked
    assert upstream.times == [0, pytest.approx(0.9, abs=0.02)]
    await embed.aclose()


async def test_calls_that_a_call_was_split_into_count(clock: HandClock, upstream: Upstream) -> None:
    upstream.wire_calls = 5
    embed = batcher(upstream, paced(clock, requests=60))
    asked = asyncio.create_task(embed(request("a", "b")))
    await run(clock, 6)
    await asked
    assert upstream.times[1] == pytest.approx(4.9, abs=0.02)
    await embed.aclose()


async def test_whose_deadline_comes_first_is_told_at_once_how_long_it_would_take(
    clock: HandClock, upstream: Upstream
) -> None:
    embed = batcher(upstream, paced(clock, requests=2))
    await embed(request("first"))
    with pytest.raises(RateLimited) as refused:
        await embed(request("second", patience=10))
    assert refused.value.retry_after is not None
    assert 29 < refused.value.retry_after <= 60
    patient = asyncio.create_task(embed(request("third")))
    await run(clock, 30, step=1)
    await patient
    await embed.aclose()


async def test_a_wait_that_is_stated_includes_those_who_are_before(clock: HandClock, upstream: Upstream) -> None:
    embed = batcher(upstream, paced(clock, requests=60))
    await embed(request("first"))
    patient = asyncio.create_task(embed(request(*(f"{i}" for i in range(40)))))
    await settle()
    with pytest.raises(RateLimited) as refused:
        await embed(request("hurried", patience=0.5))
    assert refused.value.retry_after == pytest.approx(40.9, abs=0.1)
    patient.cancel()
    await embed.aclose()


async def test_those_refused_together_are_told_waits_after_which_each_is_served(
    clock: HandClock, upstream: Upstream
) -> None:
    embed = batcher(upstream, paced(clock, requests=6))
    await embed(request("first"))
    refused = await asyncio.gather(*(embed(request(f"{i}", patience=3)) for i in range(3)), return_exceptions=True)
    waits = [error.retry_after for error in refused if isinstance(error, RateLimited) and error.retry_after]
    assert waits == pytest.approx([9.9, 19.9, 29.9], abs=0.01)
    for i, wait in enumerate(waits):
        await clock.advance(1000 + wait + 0.001 - clock.now)
        await embed(request(f"{i}", patience=3))
    assert upstream.times == pytest.approx([0, *waits], abs=0.01)
    await embed.aclose()


async def test_also_of_two_lanes_and_of_inputs_that_share_no_call(clock: HandClock, upstream: Upstream) -> None:
    embed = batcher(upstream, paced(clock, requests=6), rows=10)
    await embed(request("first"))
    others = [request("bulk", lane="bulk", patience=3), request("short", patience=3), request("shorter", patience=3)]
    for dimensions, other in enumerate(others[1:], 1):
        other.params = Params(dimensions=dimensions)
    refused = await asyncio.gather(*map(embed, others), return_exceptions=True)
    waits = sorted(error.retry_after or 0 for error in refused if isinstance(error, RateLimited))
    assert waits == pytest.approx([9.9, 19.9, 29.9], abs=0.01)
    await embed.aclose()


async def test_a_wait_is_stated_without_a_look_at_each_who_is_before(
    clock: HandClock, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand inputs of two tokens each, at ten tokens a second."""
    looks: list[Input] = []
    bound = tokens.upper_bound

    def watched(text: Input) -> int:
        looks.append(text)
        return bound(text)

    monkeypatch.setattr(tokens, "upper_bound", watched)
    upstream.billed = 2
    embed = batcher(upstream, paced(clock, tokens=600))
    patient = asyncio.create_task(embed(request(*(f"input{i:03}" for i in range(1001)))))
    await settle()
    assert len(upstream.calls) == 1
    del looks[:]
    with pytest.raises(RateLimited) as refused:
        await embed(request("hurried", patience=0.01))
    assert refused.value.retry_after == pytest.approx(200, abs=5)
    assert len(looks) < 300
    patient.cancel()
    await embed.aclose()


async def test_another_deployment_serves_what_would_wait(clock: HandClock, upstream: Upstream) -> None:
    embed = batcher(upstream, paced(clock, requests=60), Slots(8))
    result = await embed(request("a", "b", "c"))
    assert result.deployments == ("up0/m", "up1/m")
    assert upstream.times == [0, 0, 0]


async def test_a_paced_deployment_is_waited_for_though_another_one_is_ejected(
    clock: HandClock, upstream: Upstream
) -> None:
    embed = batcher(upstream, paced(clock, requests=60), Slots(8))
    eject(embed._rotation.deployments[1])
    asked = asyncio.create_task(embed(request("a", "b")))
    await run(clock, 1)
    assert (await asked).deployments == ("up0/m",)
    await embed.aclose()


async def test_one_that_is_ejected_is_waited_for_where_it_is_back_before_the_paced_one(
    clock: HandClock, upstream: Upstream
) -> None:
    """A pause of half a minute, against one of a minute."""
    embed = batcher(upstream, paced(clock, requests=1), Slots(8))
    eject(embed._rotation.deployments[1])
    await embed(request("first"))
    asked = asyncio.create_task(embed(request("patient", patience=40)))
    with pytest.raises(RateLimited):
        await embed(request("hurried", patience=20))
    await run(clock, 30, step=1)
    assert (await asked).deployments == ("up1/m",)
    await embed.aclose()


async def test_the_last_one_left_though_ejected_is_waited_for_as_long_as_its_rate_limit(
    clock: HandClock, upstream: Upstream
) -> None:
    embed = batcher(upstream, Slots(8))
    (only,) = embed._rotation.deployments
    eject(only)
    only.health.end(RateLimited("slowly", retry_after=5), only.health.begin())
    asked = asyncio.create_task(embed(request("a", patience=10)))
    await run(clock, 5, step=1)
    assert (await asked).embeddings
    await embed.aclose()


def eject(deployment: Deployment) -> None:
    for _ in range(FAILURES):
        deployment.health.end(UpstreamError("down"), deployment.health.begin())
    assert not deployment.health.available()


async def test_the_parts_of_a_call_count_when_they_are_made(clock: HandClock, upstream: Upstream) -> None:
    metrics, reached, released = Metrics(), asyncio.Event(), asyncio.Event()

    async def refuses_and_then_holds(batch: Batch) -> BatchResult:
        if len(batch.inputs) > 1:
            raise InvalidRequest("no")
        reached.set()
        await released.wait()
        return BatchResult([Embedding(b"v", 1)])

    slots, limits = paced(clock, requests=60), CallLimits(8)
    health = Health(clock, partial(metrics.show_deployment, "up", "m"), "up/m")
    chain = Adapt(refuses_and_then_holds, limits, "up/m", clock)
    deployment = Deployment("up", Model("m", roles=ROLES), "s", slots, limits, health, chain)
    embed = Batcher(Route([deployment], metrics, clock), metrics, clock)
    asked = asyncio.create_task(embed(request(*"abcdefgh")))
    await reached.wait()
    assert slots.wait() == pytest.approx(3.9), "with eight inputs, four, two and one"
    released.set()
    await asked
    assert slots.wait() == pytest.approx(14.9), "none is counted twice"
    await embed.aclose()


async def test_two_models_of_one_upstream_take_turns(clock: HandClock, upstream: Upstream) -> None:
    slots = paced(clock, requests=60)
    one, other = batcher(upstream, slots), batcher(upstream, slots)
    asked = [
        asyncio.create_task(embed(request(*(f"{name}{i}" for i in range(6)))))
        for embed, name in ((one, "a"), (other, "b"))
    ]
    await run(clock, 12, step=0.1)
    await asyncio.gather(*asked)
    order = "".join(texts[0][0] for _, texts in upstream.calls)
    assert sorted(order[:4]) == sorted("aabb")
    assert sorted(order) == sorted("aaaaaabbbbbb")
    await one.aclose()
    await other.aclose()


async def test_a_query_goes_next_whatever_bulk_work_waits_for_the_pace(clock: HandClock, upstream: Upstream) -> None:
    embed = batcher(upstream, paced(clock, requests=60))
    bulk = asyncio.create_task(embed(request(*(f"bulk {i}" for i in range(5)), lane="bulk")))
    await settle()
    query = asyncio.create_task(embed(request("query", lane="query")))
    await run(clock, 1)
    await query
    assert [texts[0] for _, texts in upstream.calls] == ["bulk 0", "query"]
    bulk.cancel()
    await embed.aclose()


async def test_a_rate_limit_halves_the_pace_and_successes_restore_it(clock: HandClock, upstream: Upstream) -> None:
    pace = Pace("up", Rates(requests=60), clock)
    pace.slow_down()
    pace.charge(1, 0)
    assert pace.wait() == pytest.approx(1.9)
    for _ in range(10):
        pace.slow_down()
    assert pace.time_for(1, 0) - pace.wait() == pytest.approx(8)
    for _ in range(20):
        pace.recover()
    assert pace.time_for(1, 0) - pace.wait() == pytest.approx(1)


async def test_a_retry_goes_ahead_and_is_paid_back_by_who_comes_later(clock: HandClock, upstream: Upstream) -> None:
    upstream.errors = [UpstreamError("once")]
    embed = batcher(upstream, paced(clock, requests=60))
    asked = asyncio.create_task(embed(request("a", "b")))
    await run(clock, 3)
    await asked
    assert [(at, texts) for at, (_, texts) in zip(upstream.times, upstream.calls, strict=True)] == [
        (0, ["a"]),
        (0.01, ["a"]),
        (pytest.approx(1.9, abs=0.02), ["b"]),
    ]
    await embed.aclose()


# --- shared over Redis ----------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


Replica = Callable[..., tuple[Batcher, Slots, SharedLimits]]


@pytest_asyncio.fixture
async def replica(server: RedisServer, clock: HandClock, upstream: Upstream) -> AsyncIterator[Replica]:
    """Builds another gateway's pace for the same upstream, and everything above it."""
    built: list[tuple[Batcher, Slots, SharedLimits]] = []

    def build(**rates: int) -> tuple[Batcher, Slots, SharedLimits]:
        shared = SharedLimits(server.url, LIMIT, clock, Metrics())
        slots = Slots(8, Pace("up", Rates(**rates), clock, shared))
        built.append((batcher(upstream, slots), slots, shared))
        return built[-1]

    yield build
    for embed, slots, shared in built:
        await embed.aclose()
        assert slots.pace is not None
        await slots.pace.aclose()
        await shared.close()


async def test_replicas_keep_one_pace_together(clock: HandClock, upstream: Upstream, replica: Replica) -> None:
    """One call a minute: the first to ask Redis gets it, and the other waits for a minute by the server's clock."""
    (one, *_), (other, _, _) = replica(requests=1), replica(requests=1)
    await one(request("a"))
    with pytest.raises(RateLimited) as refused:
        await other(request("b", patience=20))
    assert refused.value.retry_after is not None
    assert 20 < refused.value.retry_after <= 120
    assert len(upstream.calls) == 1


async def test_tokens_used_by_one_are_known_to_all(clock: HandClock, upstream: Upstream, replica: Replica) -> None:
    upstream.billed = 1000
    (one, slots, _), (other, _, _) = replica(tokens=60), replica(tokens=60)
    await one(request("a"))
    await until(lambda: _is(slots.wait() > 100))
    with pytest.raises(RateLimited):
        await other(request("b", patience=200))
    assert len(upstream.calls) == 1


@pytest.mark.parametrize(("limited", "rate", "billed", "wire_calls"), [("tokens", 60, 1000, 1), ("requests", 1, 1, 5)])
async def test_and_are_told_once_as_soon_as_they_are_used(
    upstream: Upstream, replica: Replica, limited: str, rate: int, billed: int, wire_calls: int
) -> None:
    upstream.billed, upstream.wire_calls = billed, wire_calls
    (one, slots, _), (_, others, _) = replica(**{limited: rate}), replica(**{limited: rate})
    await one(request("a"))
    assert slots.pace is not None
    lease = slots.pace._lease
    assert lease is not None
    await until(lambda: _is(not lease.in_debt()))
    await until(lambda: _is(others.wait() > 100))


async def _is(so: bool) -> bool:
    return so


async def test_a_lease_saves_round_trips(clock: HandClock, replica: Replica) -> None:
    """6,000 a minute are 100 a second, leased ten at a time."""
    embed, slots, shared = replica(requests=6000)
    await shared.open()
    await embed(request("first"))
    pace = slots.pace
    assert pace is not None
    assert pace._lease is not None
    assert pace._lease.requests == pytest.approx(9)


async def test_without_redis_each_replica_keeps_its_part(
    server: RedisServer, clock: HandClock, upstream: Upstream, replica: Replica
) -> None:
    (one, slots, shared), (_, _, second) = replica(requests=120), replica(requests=120)
    await second.open()
    await one(request("first"))
    assert shared.replicas == 2
    server.kill()
    asked = asyncio.create_task(one(request(*(f"{i}" for i in range(6)))))
    await until(lambda: _is(len(upstream.calls) >= 2))
    for _ in range(60):
        await clock.advance(0.1)
        if asked.done():
            break
    await asked
    assert len(upstream.calls) == 7
    assert upstream.times[-1] >= 3.8, "one a second, which is half of the limit"
    assert slots.wait() > 0


async def test_redis_that_is_back_is_asked_again(server: RedisServer, clock: HandClock, replica: Replica) -> None:
    embed, slots, shared = replica(requests=1)
    server.kill()
    await embed(request("alone"))
    server.start()
    pace = slots.pace
    assert pace is not None
    await clock.advance(2)
    assert slots.wait() > 0
    await until(lambda: _is(pace._alone_until is None))
    assert slots.wait() == 0, "Redis knows of no call: it is another server"
    assert shared.replicas == 1


async def test_debt_that_somebody_left_in_redis_is_forgotten_once_it_is_deleted_there(
    server: RedisServer, clock: HandClock, replica: Replica
) -> None:
    _, slots, _ = replica(requests=600)
    with Redis.from_url(server.url) as client:
        name = PREFIX + b"upstream:up"
        client.hset(name, "requests", "-1e15")
        slots.wait()
        await until(lambda: _is(slots.wait() > 1))
        client.delete(name)
        assert slots.wait() > 1, "it is not asked"
        await clock.advance(60 * (MAX_DEBT + 1))
        await until(lambda: _is(slots.wait() == 0))


async def test_without_limits_redis_is_never_asked(server: RedisServer, clock: HandClock, upstream: Upstream) -> None:
    metrics = Metrics()
    shared = SharedLimits(server.url, LIMIT, clock, metrics)
    await batcher(upstream, Slots(8))(request("a"))
    labels = {"tier": "redis", "operation": "limit", "result": "ok"}
    assert not metrics.registry.get_sample_value("embedding_gateway_cache_operations_total", labels)
    await shared.close()
