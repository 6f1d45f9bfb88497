"""The batcher over a real route, with deployments whose calls end when the test says so."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import pytest
from msgspec.structs import replace

from app.catalog import ROLES, Model
from app.clock import SystemClock
from app.errors import (
    ContextLengthExceeded,
    GatewayError,
    InvalidRequest,
    Overloaded,
    RateLimited,
    UnsupportedDimensions,
    UpstreamAuth,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from app.metrics import Metrics
from app.pipeline.adapt import Adapt
from app.pipeline.batcher import Batcher
from app.pipeline.deployment import CallLimits, Deployment, Slots
from app.pipeline.health import Health
from app.pipeline.outcome import MAX_NAMED, deadline_error
from app.pipeline.queue import BULK_STALL, LANES, CallRecord, Job
from app.pipeline.route import Route
from app.types import Batch, BatchResult, Caller, Embedding, EmbedRequest, EmbedResult, Lane, Params, Source
from tests.clock import HandClock, settle
from tests.counting import counting_calls


def healthy() -> Health:
    return Health(SystemClock(), partial(Metrics().show_deployment, "up", "m"), "up/m")


def vector(text: str) -> bytes:
    return text.encode()


@dataclass
class Calls:
    """A deployment's calls: recorded, and held until `release`."""

    batches: list[list[str]] = field(default_factory=list)
    held: asyncio.Event | None = None
    most: int = 0
    now: int = 0
    errors: dict[str, GatewayError] = field(default_factory=dict)

    def release(self) -> None:
        assert self.held
        self.held.set()

    async def __call__(self, batch: Batch) -> BatchResult:
        self.batches.append(list(map(str, batch.inputs)))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if self.held:
                await self.held.wait()
            await asyncio.sleep(0)
        finally:
            self.now -= 1
        return BatchResult([self.errors.get(text) or Embedding(vector(text), 1) for text in map(str, batch.inputs)])


def batcher(calls: Calls, *, rows: int = 10, slots: int = 2, tokens: int | None = None) -> Batcher:
    model = Model("m", roles=ROLES, instruct=True)
    deployment = Deployment("up", model, "up/m", Slots(slots), CallLimits(rows, tokens), healthy(), calls)
    metrics = Metrics()
    return Batcher(Route([deployment], metrics, SystemClock(), jitter=lambda: 0.0), metrics, SystemClock())


def request(*texts: str, lane: Lane | None = None, params: Params | None = None) -> EmbedRequest:
    deadline = asyncio.get_running_loop().time() + 30
    return EmbedRequest("m", texts, params or Params(), deadline, Caller(lane=lane), keys=[t.encode() for t in texts])


def texts_of(result: EmbedResult) -> list[str]:
    return [embedding.vector.decode() for embedding in result.embeddings]


async def test_64_concurrent_one_text_requests_make_at_most_16_calls_of_10_rows_over_2_slots() -> None:
    calls = Calls()
    embed = batcher(calls)
    results = await asyncio.gather(*(embed(request(f"text {i}")) for i in range(64)))
    assert [texts_of(result) for result in results] == [[f"text {i}"] for i in range(64)]
    assert len(calls.batches) <= 16
    assert max(map(len, calls.batches)) <= 10
    assert calls.most <= 2


async def test_a_lone_request_is_sent_at_once_and_alone() -> None:
    calls = Calls()
    result = await batcher(calls)(request("alone"))
    assert texts_of(result) == ["alone"]
    assert calls.batches == [["alone"]]
    assert result.calls == 1
    assert result.deployments == ("up/m",)


async def test_a_call_begins_in_the_turn_of_the_event_loop_after_its_inputs_came() -> None:
    calls = Calls()
    asked = asyncio.create_task(batcher(calls)(request("alone")))
    await asyncio.sleep(0)
    assert not calls.batches
    await asyncio.sleep(0)
    assert calls.batches == [["alone"]]
    await asked


async def test_what_comes_turn_after_turn_without_end_does_not_keep_a_call_from_beginning() -> None:
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls)
    asked = [asyncio.create_task(embed(request(f"{number}"))) for number in range(2)]
    await settle()
    calls.release()
    await asyncio.gather(*asked)  # from now on the batcher expects others
    for number in range(2, 10):
        asked.append(asyncio.create_task(embed(request(f"{number}"))))
        await asyncio.sleep(0)
    assert len(calls.batches) > 1
    await asyncio.gather(*asked)


@pytest.mark.parametrize(
    ("count", "rows", "sent"), [(50, 500, [2, 100]), (128, 500, [2, 128, 128]), (128, 127, [2, 127, 127, 2])]
)
async def test_a_large_request_that_one_call_takes_whole_waits_for_no_others(
    count: int, rows: int, sent: list[int]
) -> None:
    calls = Calls()
    embed = batcher(calls, rows=rows, slots=8)
    await asyncio.gather(embed(request("one")), embed(request("two")))  # from now on the batcher expects others
    asked = []
    for number in range(2):
        asked.append(asyncio.create_task(embed(request(*(f"{number} {i}" for i in range(count))))))
        await asyncio.sleep(0)
    await asyncio.gather(*asked)
    assert [len(batch) for batch in calls.batches] == sent


@pytest.mark.parametrize(
    ("sizes", "sent"),
    [
        ([128, 128, 128], [128, 128, 128]),
        ([16] * 16, [128, 128]),
        ([100, 28, 1, 128], [101, 28, 128]),  # the single one is a query, and goes first
        ([100, 29, 29], [100, 58]),
        ([300, 5], [5, 300]),
        ([129], [129]),
        ([600], [500, 100]),
    ],
)
async def test_while_there_are_slots_requests_share_calls_up_to_what_is_enough_and_none_is_split(
    sizes: list[int], sent: list[int]
) -> None:
    calls = Calls()
    embed = batcher(calls, rows=500, slots=8)
    asked = [request(*(f"{number} {i}" for i in range(size))) for number, size in enumerate(sizes)]
    results = await asyncio.gather(*map(embed, asked))
    assert [texts_of(result) for result in results] == [list(each.inputs) for each in asked]
    assert [len(batch) for batch in calls.batches] == sent
    own = [sum(not set(each.inputs).isdisjoint(batch) for batch in calls.batches) for each in asked]
    assert [result.calls for result in results] == own


async def test_an_input_that_others_want_too_splits_no_request() -> None:
    calls = Calls()
    embed = batcher(calls, rows=500, slots=8)
    large, small = [str(i) for i in range(200)], ["100", "0"]
    await asyncio.gather(embed(request(*large)), embed(request(*small)))
    assert [len(batch) for batch in calls.batches] == [200]


async def test_the_last_slot_takes_all_that_fits() -> None:
    calls = Calls()
    embed = batcher(calls, rows=500, slots=2)
    await asyncio.gather(*(embed(request(*(f"{n} {i}" for i in range(128)), lane="query")) for n in range(4)))
    assert [len(batch) for batch in calls.batches] == [128, 384]


async def test_what_queues_while_slots_are_busy_goes_in_the_fewest_calls() -> None:
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls, rows=10, slots=1)
    first = asyncio.create_task(embed(request("first")))
    await settle()
    later = [asyncio.create_task(embed(request(f"later {i}"))) for i in range(20)]
    await settle()
    assert calls.batches == [["first"]]
    calls.release()
    await asyncio.gather(first, *later)
    assert [len(batch) for batch in calls.batches] == [1, 10, 10]


async def test_equal_inputs_in_and_across_requests_are_embedded_once() -> None:
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls)
    one = asyncio.create_task(embed(request("a", "b", "a")))
    await settle()
    other = asyncio.create_task(embed(request("b", "c")))
    await settle()
    calls.release()
    first, second = await asyncio.gather(one, other)
    assert texts_of(first) == ["a", "b", "a"]
    assert first.sources == [Source.UPSTREAM, Source.UPSTREAM, Source.INFLIGHT]
    assert texts_of(second) == ["b", "c"]
    assert second.sources == [Source.INFLIGHT, Source.UPSTREAM]
    assert sorted(chain.from_iterable(calls.batches)) == ["a", "b", "c"]


async def test_inputs_with_different_parameters_never_share_a_call() -> None:
    calls = Calls()
    embed = batcher(calls, slots=1)
    query = request("q", params=Params(input_type="query"))
    await asyncio.gather(embed(query), embed(request("d")), embed(request("e")))
    assert sorted(map(sorted, calls.batches)) == [["d", "e"], ["q"]]


@pytest.mark.parametrize("lane", LANES)
async def test_parameters_take_turns_whatever_they_ask_for(lane: Lane) -> None:
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls, rows=1, slots=1)
    asked = [asyncio.create_task(embed(request("first")))]
    await settle()
    for name, params in (("a", Params(instruct="a")), ("b", Params()), ("c", Params(instruct="c"))):
        asked.append(asyncio.create_task(embed(request(*(f"{name}{i}" for i in range(2)), lane=lane, params=params))))
        await settle()
    calls.release()
    await asyncio.gather(*asked)
    assert [batch[0] for batch in calls.batches] == ["first", "a0", "b0", "c0", "a1", "b1", "c1"]


async def test_queries_go_before_bulk_work_with_other_parameters() -> None:
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls, rows=1, slots=1)
    asked = [asyncio.create_task(embed(request("first")))]
    await settle()
    for i in range(3):
        lane: Lane = "query" if i == 2 else "bulk"
        asked.append(asyncio.create_task(embed(request(f"{lane} {i}", lane=lane, params=Params(instruct=f"{i}")))))
        await settle()
    calls.release()
    await asyncio.gather(*asked)
    assert [batch[0] for batch in calls.batches] == ["first", "query 2", "bulk 0", "bulk 1"]


async def test_what_waits_for_a_deployment_that_is_busy_holds_up_nothing_that_another_can_do() -> None:
    busy, free = Calls(held=asyncio.Event()), Calls()
    deployments = [
        Deployment(
            name, Model("m", instruct=instruct), "m", Slots(1), CallLimits(10), healthy(), calls, priority=priority
        )
        for priority, (name, instruct, calls) in enumerate([("busy", True, busy), ("free", False, free)])
    ]
    metrics = Metrics()
    embed = Batcher(Route(deployments, metrics, SystemClock()), metrics, SystemClock())
    waiting = [asyncio.create_task(embed(request(f"{i}", params=Params(instruct=f"{i}")))) for i in range(3)]
    await settle()
    assert texts_of(await embed(request("plain"))) == ["plain"]
    assert (busy.batches, free.batches) == ([["0"]], [["plain"]])
    busy.release()
    await asyncio.gather(*waiting)


@pytest.mark.parametrize("lane", LANES)
async def test_twice_as_many_requests_with_parameters_of_their_own_are_twice_the_work(lane: Lane) -> None:
    """Counted in function calls, from the first request to the last answer."""

    async def work(count: int) -> int:
        embed = batcher(Calls())
        requests = [request(f"{i}", lane=lane, params=Params(instruct=f"{i}")) for i in range(count)]
        with counting_calls() as counted:
            await asyncio.gather(*map(embed, requests))
        return counted.calls

    await work(10)
    assert await work(200) < 2.5 * await work(100)


async def test_callers_of_the_same_inputs_who_all_hang_up_are_no_more_work_each_than_a_few() -> None:
    """Counted in function calls."""

    async def work(count: int) -> int:
        embed = batcher(Calls(held=asyncio.Event()))
        asked = [asyncio.create_task(embed(request(*map(str, range(10))))) for _ in range(count)]
        await settle()
        for each in asked:
            each.cancel()
        with counting_calls() as counted:
            await asyncio.wait(asked)
        return counted.calls

    assert await work(200) < 2.5 * await work(100)


async def test_a_caller_that_hangs_up_fails_nobody_who_waits_for_the_same_input() -> None:
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls)
    leaving = asyncio.create_task(embed(request("shared")))
    await settle()
    staying = asyncio.create_task(embed(request("shared")))
    await settle()
    leaving.cancel()
    await settle()
    calls.release()
    assert texts_of(await staying) == ["shared"]
    assert calls.batches == [["shared"]]
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_inputs_nobody_waits_for_any_more_are_not_sent() -> None:
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls, slots=1)
    first = asyncio.create_task(embed(request("first")))
    await settle()
    leaving = asyncio.create_task(embed(request(*(f"gone {i}" for i in range(30)), "wanted")))
    staying = asyncio.create_task(embed(request("wanted")))
    await settle()
    leaving.cancel()
    await settle()
    calls.release()
    await asyncio.gather(first, staying)
    assert calls.batches == [["first"], ["wanted"]]


@pytest.mark.parametrize("leaves", ["during the call", "before the retry", "never"])
async def test_a_call_that_failed_is_made_again_only_while_somebody_waits_for_it(leaves: str) -> None:
    calls = Calls(held=asyncio.Event(), errors={"down": UpstreamUnavailable("no room", retry_after=0.1)})
    assert calls.held
    embed = batcher(calls)
    asked = [asyncio.create_task(embed(request("down"))) for _ in range(2)]
    await settle()
    asked[0].cancel()
    if leaves == "during the call":
        asked[1].cancel()
        await settle()
    calls.release()
    await settle()
    if leaves == "before the retry":
        asked[1].cancel()
    await embed.aclose()
    assert calls.batches == [["down"]] * (2 if leaves == "never" else 1)
    assert not embed.busy
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(answers[1], UpstreamUnavailable if leaves == "never" else asyncio.CancelledError)


async def test_an_abandoned_input_that_is_wanted_again_before_it_was_sent_is_sent_once() -> None:
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls, slots=1)
    first = asyncio.create_task(embed(request("first")))
    await settle()
    leaving = asyncio.create_task(embed(request("again")))
    await settle()
    leaving.cancel()
    await settle()
    back = asyncio.create_task(embed(request("again")))
    await settle()
    calls.release()
    await first
    assert texts_of(await back) == ["again"]
    assert calls.batches == [["first"], ["again"]]


@pytest.mark.parametrize("leaves", ["before", "after"])
@pytest.mark.parametrize("slots", [1, 2], ids=["queued", "under way"])
async def test_what_a_caller_who_has_hung_up_had_asked_for_is_the_next_ones_to_pay(leaves: str, slots: int) -> None:
    calls = Calls(held=asyncio.Event())
    assert calls.held
    embed = batcher(calls, slots=slots)
    asking = []
    for texts in (["other"], ["shared"], ["shared", "other", "shared"], ["shared"]):
        asking.append(asyncio.create_task(embed(request(*texts, lane="query"))))
        await settle()
        if len(asking) == (2 if leaves == "before" else 4):
            asking[1].cancel()
            await settle()
    calls.release()
    _, _, second, third = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(second, EmbedResult)
    assert isinstance(third, EmbedResult)
    assert calls.batches == [["other"], ["shared"]]
    assert second.sources == [Source.UPSTREAM, Source.INFLIGHT, Source.INFLIGHT]
    assert third.sources == [Source.INFLIGHT]


async def test_batches_respect_tokens_as_well_as_rows() -> None:
    calls = Calls()
    embed = batcher(calls, rows=10, tokens=100)
    long = [f"{i}" * 40 for i in range(1, 6)]
    result = await embed(request(*long, "x" * 300))
    assert texts_of(result) == [*long, "x" * 300]
    for batch in calls.batches:
        assert len(batch) == 1 or sum(map(len, batch)) <= 100
    assert len(calls.batches) == 4


async def test_a_query_goes_before_bulk_work_that_came_earlier_and_bulk_fills_its_call() -> None:
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls, rows=10, slots=1)
    bulk = asyncio.create_task(embed(request(*(f"bulk {i}" for i in range(40)), lane="bulk")))
    await settle()
    query = asyncio.create_task(embed(request("query", lane="query")))
    await settle()
    calls.release()
    await asyncio.gather(bulk, query)
    assert calls.batches[1][0] == "query"
    assert len(calls.batches[1]) == 10


@pytest.mark.parametrize("asked", [1, 40])
async def test_what_a_query_joins_no_longer_waits_with_bulk_work(asked: int) -> None:
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls, rows=10, slots=1)
    texts = [f"bulk {i}" for i in range(100)]
    bulk = asyncio.create_task(embed(request(*texts, lane="bulk")))
    await settle()
    # A caller whose key says "query" may ask for many, under another name for the same deployments, or uncached.
    joins = replace(request(*reversed(texts[100 - asked :]), lane="query"), model="alias", write_cache=False)
    query = asyncio.create_task(embed(joins))
    await settle()
    calls.release()
    await asyncio.gather(bulk, query)
    assert sorted(chain(*calls.batches)) == sorted(texts)
    assert set(texts[-asked:]) <= set(chain(*calls.batches[1 : 1 + max(1, asked // 10)]))
    assert query.result().sources == [Source.INFLIGHT] * asked


async def test_a_query_that_joins_bulk_work_in_flight_does_not_wait_with_bulk_work_once_that_is_cut_off() -> None:
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls, rows=1, slots=1)
    soon = asyncio.get_running_loop().time() + 0.05
    first = asyncio.create_task(embed(replace(request("x", lane="bulk"), deadline=soon)))
    await settle()
    backlog = asyncio.create_task(embed(request(*(f"bulk {i}" for i in range(10)), lane="bulk")))
    query = asyncio.create_task(embed(request("x")))
    async with asyncio.timeout(10):
        while len(calls.batches) < 2:
            await asyncio.sleep(0)
    calls.release()
    await asyncio.gather(first, backlog, query, return_exceptions=True)
    assert calls.batches[:2] == [["x"], ["x"]]


async def bulk_work_over_four_slots() -> tuple[Calls, Batcher, asyncio.Task[EmbedResult]]:
    """Ten inputs, `bulk 0` to `bulk 9`, one a call, of which three are held: the fourth slot is for queries."""
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls, rows=1, slots=4)
    bulk = asyncio.create_task(embed(request(*(f"bulk {i}" for i in range(10)), lane="bulk")))
    await settle()
    assert calls.now == 3
    return calls, embed, bulk


async def test_what_a_query_joins_is_sent_at_once_where_bulk_work_leaves_a_slot() -> None:
    calls, embed, bulk = await bulk_work_over_four_slots()
    queries = [asyncio.create_task(embed(request(text))) for text in ("bulk 0", "bulk 9", "bulk 9")]
    await settle()
    assert calls.batches[3:] == [["bulk 9"]]
    calls.release()
    await asyncio.gather(bulk, *queries)
    assert len(calls.batches) == 10


async def test_a_query_has_its_call_to_itself_while_bulk_work_has_calls_of_its_own() -> None:
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls, rows=10, slots=4)
    bulk = asyncio.create_task(embed(request(*(f"bulk {i}" for i in range(60)), lane="bulk")))
    await settle()
    query = asyncio.create_task(embed(request("query", lane="query")))
    await settle()
    assert [len(batch) for batch in calls.batches] == [10, 10, 10, 1]
    calls.release()
    await asyncio.gather(bulk, query)
    assert len(calls.batches) == 7


async def test_bulk_work_whose_calls_hang_fills_up_those_of_queries() -> None:
    calls, clock = Calls(held=asyncio.Event()), HandClock()
    deployment = Deployment("up", Model("m"), "m", Slots(4), CallLimits(2), healthy(), calls)
    embed = Batcher(Route([deployment], Metrics(), clock), Metrics(), clock)
    asked = [asyncio.create_task(embed(request(*"abcdefgh", lane="bulk")))]
    await settle()
    assert calls.batches == [["a", "b"], ["c", "d"], ["e", "f"]]
    clock.now += BULK_STALL
    asked.append(asyncio.create_task(embed(request("query", lane="query"))))
    await settle()
    assert calls.batches[3:] == [["query", "g"]]
    calls.release()
    await asyncio.gather(*asked)


async def test_bulk_work_that_only_a_busy_deployment_can_do_fills_up_its_calls_whatever_others_do() -> None:
    sparse, dense = Calls(held=asyncio.Event()), Calls(held=asyncio.Event())
    deployments = [
        Deployment("up", Model("m", sparse=True), "m", Slots(1), CallLimits(10), healthy(), sparse),
        Deployment("up", Model("m"), "m", Slots(4), CallLimits(10), healthy(), dense),
    ]
    embed = Batcher(Route(deployments, Metrics(), SystemClock()), Metrics(), SystemClock())
    both = Params(output_type="dense&sparse")
    wanted: list[tuple[str, Lane, Params]] = [
        ("first", "query", both),
        ("dense", "bulk", Params()),
        ("bulk", "bulk", both),
        ("second", "query", both),
    ]
    asked = []
    for text, lane, params in wanted:
        asked.append(asyncio.create_task(embed(request(text, lane=lane, params=params))))
        await settle()
    assert (sparse.batches, dense.batches) == ([["first"]], [["dense"]])
    sparse.release()
    await settle()
    assert sparse.batches[1:] == [["second", "bulk"]]
    dense.release()
    await asyncio.gather(*asked)


async def test_bulk_work_leaves_slots_to_queries() -> None:
    calls, embed, bulk = await bulk_work_over_four_slots()
    query = asyncio.create_task(embed(request("query", lane="query")))
    await settle()
    assert calls.batches[-1] == ["query"]
    calls.release()
    await asyncio.gather(bulk, query)


async def test_a_refused_input_is_named_by_its_place_and_the_others_are_embedded() -> None:
    calls = Calls(errors={"bad": InvalidRequest("too rude")})
    embed = batcher(calls, rows=2, slots=1)
    innocent = asyncio.create_task(embed(request("innocent")))
    with pytest.raises(InvalidRequest, match="too rude") as refused:
        await embed(request("a", "b", "bad", "c"))
    assert refused.value.param == "input[2]"
    assert texts_of(await innocent) == ["innocent"]
    assert sorted(chain.from_iterable(calls.batches)) == ["a", "b", "bad", "c", "innocent"]


async def test_several_refused_inputs_are_all_named() -> None:
    calls = Calls(errors={"x": InvalidRequest("no"), "y": InvalidRequest("no")})
    with pytest.raises(InvalidRequest, match=r"no \(inputs 1, 3\)"):
        await batcher(calls)(request("a", "x", "b", "y"))


async def test_a_refusal_is_told_rather_than_a_failure_of_an_earlier_input() -> None:
    calls = Calls(errors={"down": UpstreamError("down"), "x": InvalidRequest("no"), "y": InvalidRequest("no")})
    with pytest.raises(InvalidRequest, match=r"^no \(inputs 1, 3\)$") as refused:
        await batcher(calls)(request("down", "x", "b", "y"))
    assert refused.value.param == "input[1]"


@pytest.mark.parametrize("collects", [False, True])
async def test_once_more_are_refused_than_are_named_the_rest_is_not_sent(collects: bool) -> None:
    bad = [f"bad {i}" for i in range(100)]
    calls = Calls(errors=dict.fromkeys(bad, InvalidRequest("no")))
    embed = batcher(calls, rows=10, slots=1)
    neighbour = asyncio.create_task(embed(request(*bad[20:30], "good", lane="bulk")))
    named = ", ".join(map(str, range(MAX_NAMED)))
    with pytest.raises(InvalidRequest, match=rf"no \(inputs {named} …\)$"):
        await embed(replace(request(*bad), collect_too_long=collects))
    with pytest.raises(InvalidRequest, match=r"no \(inputs 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\)$"):
        await neighbour
    await settle()
    assert calls.batches[-1] == ["good"]
    assert len(calls.batches) == 5, "three, the one that had begun, and what somebody else waits for"
    assert not embed.busy


async def test_inputs_that_are_too_long_do_not_end_a_request_that_collects_them() -> None:
    long = [f"long {i}" for i in range(50)]
    calls = Calls(errors=dict.fromkeys(long, ContextLengthExceeded("too long")))
    embed = batcher(calls, rows=10, slots=1)
    result = await embed(replace(request(*long, "good"), collect_too_long=True))
    assert len(result.too_long) == 50
    assert result.embeddings[50].vector == b"good"
    with pytest.raises(ContextLengthExceeded):
        await embed(request(*long, "another"))
    assert len(calls.batches) == 6 + 4


@pytest.mark.parametrize(("count", "retries_suffice"), [(15, True), (16, True), (24, False), (31, False)])
async def test_an_input_in_a_call_with_many_that_are_refused_is_not_refused_for_them(
    count: int, retries_suffice: bool
) -> None:
    """To isolate each of these takes more calls than one batch may cause."""

    async def refuses(batch: Batch) -> BatchResult:
        await asyncio.sleep(0)
        if any(str(text).startswith("bad") for text in batch.inputs):
            raise InvalidRequest("no")
        return BatchResult([Embedding(vector(str(text)), 1) for text in batch.inputs])

    limits, metrics = CallLimits(32), Metrics()
    chain = Adapt(refuses, limits, "up/m", SystemClock())
    deployment = Deployment("up", Model("m"), "up/m", Slots(1), limits, healthy(), chain)
    embed = Batcher(Route([deployment], metrics, SystemClock(), jitter=lambda: 0.0), metrics, SystemClock())
    refused = asyncio.create_task(embed(request(*(f"bad {i}" for i in range(count)), lane="bulk")))
    good = asyncio.create_task(embed(request("good", lane="bulk")))
    with pytest.raises(InvalidRequest):
        await refused
    if not retries_suffice:
        with pytest.raises(UpstreamUnavailable, match="try again"):
            await good
        good = asyncio.create_task(embed(request("good")))
    assert texts_of(await good) == ["good"]


async def test_inputs_that_would_be_cut_are_not_named_beside_one_that_is_refused() -> None:
    calls = Calls(errors={"long": ContextLengthExceeded("too long"), "bad": InvalidRequest("no")})
    with pytest.raises(InvalidRequest, match=r"^no$") as refused:
        await batcher(calls)(replace(request("long", "bad"), collect_too_long=True))
    assert refused.value.param == "input[1]"


async def test_a_refusal_of_something_else_names_none() -> None:
    calls = Calls(errors={"x": UnsupportedDimensions("no 7"), "y": UnsupportedDimensions("no 7")})
    with pytest.raises(UnsupportedDimensions, match=r"no 7$"):
        await batcher(calls)(request("x", "y"))


@pytest.mark.parametrize("failing", [1, MAX_NAMED + 1])
async def test_a_passing_failure_waits_for_the_rest_so_that_a_repeat_pays_only_for_it(failing: int) -> None:
    texts = [f"text {i}" for i in range(2 * failing + 20)]
    calls = Calls(errors=dict.fromkeys(texts[: 2 * failing : 2], UpstreamError("down")))
    embed = batcher(calls, rows=1, slots=1)  # every other one, for it would be ejected for several failures in a row
    with pytest.raises(UpstreamError):
        await embed(request(*texts))
    assert {batch[0] for batch in calls.batches} == set(texts)


async def test_a_failure_that_every_batch_would_meet_ends_the_request_and_the_rest_is_not_sent() -> None:
    calls = Calls(errors={"text 0": UpstreamAuth("wrong key")})
    embed = batcher(calls, rows=1, slots=1)
    with pytest.raises(UpstreamAuth):
        await embed(request(*(f"text {i}" for i in range(50))))
    await settle()
    assert len(calls.batches) <= 3


async def test_and_so_it_does_where_a_text_is_there_twice() -> None:
    embed = batcher(Calls(errors={"bad": UpstreamAuth("wrong key")}), rows=1, slots=1)
    with pytest.raises(UpstreamAuth):
        await embed(request("bad", "twice", "twice"))


async def test_a_bug_below_leaves_nobody_waiting() -> None:
    async def broken(batch: Batch) -> BatchResult:
        raise ZeroDivisionError

    deployment = Deployment("up", Model("m"), "up/m", Slots(1), CallLimits(10), healthy(), broken)
    metrics = Metrics()
    embed = Batcher(Route([deployment], metrics, SystemClock()), metrics, SystemClock())
    seen: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context["exception"]))
    with pytest.raises(GatewayError, match="internal error"):
        await embed(request("a"))
    await settle()


async def test_the_queue_gauge_is_true_and_ends_at_zero() -> None:
    calls = Calls(held=asyncio.Event())
    deployment = Deployment("up", Model("m"), "up/m", Slots(1), CallLimits(10), healthy(), calls)
    metrics = Metrics()
    embed = Batcher(Route([deployment], metrics, SystemClock()), metrics, SystemClock())

    def queued(lane: str) -> float | None:
        labels = {"upstream": "up", "lane": lane}
        return metrics.registry.get_sample_value("embedding_gateway_queued_inputs", labels)

    first = asyncio.create_task(embed(request("first")))
    await settle()
    bulk = asyncio.create_task(embed(request(*(f"b{i}" for i in range(20)))))
    query = asyncio.create_task(embed(request("q1", "q2")))
    await settle()
    assert (queued("query"), queued("bulk")) == (2, 20)
    joins = asyncio.create_task(embed(request("b7", "q1")))
    await settle()
    assert (queued("query"), queued("bulk")) == (3, 19)
    calls.release()
    await asyncio.gather(first, bulk, query, joins)
    assert (queued("query"), queued("bulk")) == (0, 0)


async def test_what_may_be_cached_does_not_join_what_may_not() -> None:
    calls = Calls(held=asyncio.Event())
    embed = batcher(calls)
    private = asyncio.create_task(embed(replace(request("x"), write_cache=False)))
    await settle()
    storing = [asyncio.create_task(embed(request("x"))) for _ in range(2)]
    await settle()
    joins = asyncio.create_task(embed(replace(request("x"), write_cache=False)))
    await settle()
    calls.release()
    results = await asyncio.gather(private, *storing, joins)
    assert calls.batches == [["x"], ["x"]]
    assert [result.sources[0] for result in results] == ["upstream", "upstream", "inflight", "inflight"]


async def test_what_failed_while_only_a_caller_who_then_hangs_up_waited_for_it_is_told() -> None:
    calls = Calls(errors={"bad": InvalidRequest("no")})
    dropped: list[bytes] = []
    deployment = Deployment("up", Model("m"), "up/m", Slots(1), CallLimits(1), healthy(), calls)
    embed = Batcher(Route([deployment], Metrics(), SystemClock()), Metrics(), SystemClock(), dropped.extend)
    asked = asyncio.create_task(embed(request("bad", "x")))
    while len(calls.batches) < 2:
        await asyncio.sleep(0)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await embed.aclose()
    assert asked.cancelled()
    assert dropped == [b"bad"]


async def test_what_is_dropped_is_told() -> None:
    calls = Calls(held=asyncio.Event())
    dropped: list[bytes] = []
    deployment = Deployment("up", Model("m"), "up/m", Slots(1), CallLimits(10), healthy(), calls)
    embed = Batcher(Route([deployment], Metrics(), SystemClock()), Metrics(), SystemClock(), dropped.extend)
    under_way = asyncio.create_task(embed(request("x")))
    await settle()
    queued = asyncio.create_task(embed(request("x", "y", "z")))
    await settle()
    under_way.cancel()
    queued.cancel()
    await asyncio.gather(under_way, queued, return_exceptions=True)
    calls.release()
    await embed.aclose()
    assert sorted(dropped) == [b"y", b"z"], "and not what was sent"
    assert calls.batches == [["x"]]


@pytest.mark.parametrize(
    ("outcomes", "sent", "error"),
    [
        ([None, None], False, Overloaded("no upstream call was free before the request's deadline")),
        ([None, None], True, UpstreamTimeout("2 of the inputs had no answer before the request's deadline")),
        (
            [UpstreamTimeout("late"), None],
            True,
            UpstreamTimeout("2 of the inputs had no answer before the request's deadline"),
        ),
        (
            [UpstreamTimeout("late"), Embedding(b"v", 1)],
            True,
            UpstreamTimeout("1 of the inputs had no answer before the request's deadline"),
        ),
        ([None, UpstreamError("down")], True, UpstreamError("down")),
        ([UpstreamTimeout("late"), UpstreamError("down")], True, UpstreamError("down")),
        ([RateLimited("every upstream rests"), None], False, RateLimited("every upstream rests")),
        ([None, InvalidRequest("no")], True, InvalidRequest("no", param="input[7]")),
    ],
)
def test_whose_time_is_up_is_told_what_says_most(
    outcomes: list[Embedding | GatewayError | None], sent: bool, error: GatewayError
) -> None:
    record, keys = CallRecord(3, ("up/m",)) if sent else None, [b"a", b"b"]
    asked = EmbedRequest("m", ("a", "b"), Params(), 0.0, Caller(), keys=keys, positions=[3, 7])
    jobs = [
        Job(key, "text", 0.0, (), True, call_record=record, outcome=outcome)
        for key, outcome in zip(keys, outcomes, strict=True)
    ]
    told = deadline_error(jobs, asked)
    assert (type(told), told.message, told.param) == (type(error), error.message, error.param)
    assert told.calls == (3 if sent else 0)
    assert (told.retry_after is not None) == (type(told) is Overloaded)


def test_whose_time_is_up_just_as_all_was_answered_is_not_told_that_an_input_had_no_answer() -> None:
    record, request = CallRecord(1, ("up/m",)), EmbedRequest("m", ("a",), Params(), 0.0, Caller(), keys=[b"a"])
    job = Job(b"a", "a", 0.0, (), True, call_record=record, outcome=Embedding(b"v", 1))
    assert str(deadline_error([job], request)) == "no answer could be sent before the request's deadline"
