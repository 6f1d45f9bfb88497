"""The route, and the stages above and below it, when calls fail: deadlines, retries elsewhere, verdicts."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import threading
import time
from collections import Counter
from functools import partial
from itertools import product, starmap
from typing import cast

import pytest
from msgspec.structs import replace

from app.cache.memory import MemoryStore
from app.cache.tiers import Tiers
from app.catalog import ANY, ROLES, Model, Role
from app.clock import SystemClock
from app.errors import (
    ExceedsTokensPerMinute,
    GatewayError,
    InvalidRequest,
    Overloaded,
    QuotaExhausted,
    RateLimited,
    Shortage,
    UpstreamAuth,
    UpstreamError,
    UpstreamIgnoredDimensions,
    UpstreamInvalidVector,
    UpstreamMisconfigured,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from app.limits import Rates
from app.metrics import Metrics
from app.pipeline import build
from app.pipeline.adapt import Adapt
from app.pipeline.batcher import Batcher
from app.pipeline.call import Call
from app.pipeline.deployment import CallLimits, Deployment, Slots, honours, requirements
from app.pipeline.health import EJECTION, FAILURES, LONGEST_REST, Health
from app.pipeline.pace import Pace
from app.pipeline.prepare import Prepare
from app.pipeline.queue import LANES
from app.pipeline.rotation import Slot
from app.pipeline.route import BACKOFF, SHARE, Route
from app.types import Batch, BatchEmbedder, BatchResult, Embedding, EmbedRequest, EmbedResult, Media, Params, Source
from tests.clock import HandClock, settle

QUEUED = "embedding_gateway_queued_inputs"


def deployment(
    name: str,
    embed: BatchEmbedder,
    *,
    model: Model | None = None,
    slots: Slots | None = None,
    limits: CallLimits | None = None,
) -> Deployment:
    health = Health(SystemClock(), partial(Metrics().show_deployment, name, "m"), f"{name}/m")
    model, limits = model or Model("m", roles=ROLES), limits or CallLimits(10)
    adapt = Adapt(embed, limits, name, SystemClock())
    return Deployment(name, model, "s", slots or Slots(4), limits, health, adapt)


def route(*deployments: Deployment) -> Route:
    return Route(deployments, Metrics(), SystemClock(), jitter=lambda: 0.0)


def batcher(*deployments: Deployment) -> Batcher:
    return Batcher(route(*deployments), Metrics(), SystemClock())


def request(*texts: str, seconds: float = 30.0, params: Params | None = None) -> EmbedRequest:
    deadline = asyncio.get_running_loop().time() + seconds
    return EmbedRequest("m", texts, params or Params(), deadline, keys=[text.encode() for text in texts])


def batch(*texts: str, seconds: float = 30.0) -> Batch:
    deadline = asyncio.get_running_loop().time() + seconds
    return Batch("m", texts, [text.encode() for text in texts], Params(), True, deadline)


async def run(route: Route, batch: Batch) -> BatchResult:
    slot = route.rotation.take("query", batch.params)
    assert slot is not None
    return await route.run(batch, slot, "query")


async def answers(batch: Batch) -> BatchResult:
    return BatchResult([Embedding(str(text).encode(), 1) for text in batch.inputs])


def failing(error: GatewayError) -> BatchEmbedder:
    async def fails(batch: Batch) -> BatchResult:
        assert batch.inputs
        raise error

    return fails


def eject(one: Deployment) -> None:
    for _ in range(FAILURES):
        one.health.end(UpstreamError("down"), one.health.begin())
    assert not one.health.available()


def held(begun: asyncio.Event, end: asyncio.Event) -> BatchEmbedder:
    async def answers_at_the_end(batch: Batch) -> BatchResult:
        begun.set()
        await end.wait()
        return await answers(batch)

    return answers_at_the_end


def after(seconds: float) -> BatchEmbedder:
    async def answers_late(batch: Batch) -> BatchResult:
        await asyncio.sleep(seconds)  # beside deadlines: time is the subject
        return await answers(batch)

    return answers_late


# --- elsewhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [UpstreamAuth("no"), QuotaExhausted("used up"), UpstreamMisconfigured("who?"), Overloaded("no room here")]
)
async def test_trouble_of_one_deployment_alone_is_asked_of_another(error: GatewayError) -> None:
    result = await run(route(deployment("bad", failing(error)), deployment("good", answers)), batch("x"))
    assert [type(each) for each in result.outcomes] == [Embedding]
    assert result.calls == 2


@pytest.mark.parametrize("error", [UpstreamAuth("no"), QuotaExhausted("used up")])
async def test_and_not_again_of_itself(error: GatewayError) -> None:
    only = await run(route(deployment("bad", failing(error))), batch("x"))
    both = await run(route(deployment("bad", failing(error)), deployment("worse", failing(error))), batch("x"))
    assert (only.calls, both.calls) == (1, 2)
    assert [type(each) for each in (*only.outcomes, *both.outcomes)] == [type(error)] * 2


@pytest.mark.parametrize("error", [UpstreamAuth("no"), QuotaExhausted("used up")])
async def test_and_of_one_that_rests_when_it_is_back_if_there_is_time(error: GatewayError) -> None:
    for rest, calls, outcome in ((0.1, 2, Embedding), (20, 1, type(error))):
        rest_times = deployment("rests", answers)
        rest_times.health.end(RateLimited("slowly", retry_after=rest), rest_times.health.begin())
        both = route(deployment("bad", failing(error)), rest_times)
        result = await asyncio.wait_for(run(both, batch("x", seconds=10)), 5)
        assert ([type(each) for each in result.outcomes], result.calls) == ([outcome], calls)


async def test_one_that_rests_is_waited_for_and_no_ejected_one_asked_in_its_place() -> None:
    limited = [RateLimited("slowly", retry_after=0.1)]
    asked: list[str] = []

    async def fails_once(batch: Batch) -> BatchResult:
        if limited:
            raise limited.pop()
        return await answers(batch)

    async def dead(batch: Batch) -> BatchResult:
        asked.extend(map(str, batch.inputs))
        raise UpstreamError("down")

    ejected, rest_times = deployment("ejected", dead), deployment("rests", fails_once)
    eject(ejected)
    embed = batcher(ejected, rest_times)
    first = asyncio.create_task(embed(request("first")))
    while limited:
        await asyncio.sleep(0)
    second = await embed(request("second"))
    assert [(await first).deployments, second.deployments] == [("rests/m",)] * 2
    assert not asked


async def test_where_the_others_come_to_rest_meanwhile_for_longer_than_there_is_time_it_is_told_at_once() -> None:
    limit = RateLimited("slowly", retry_after=60)
    one, other = (deployment(name, failing(limit)) for name in ("one", "other"))
    clock = HandClock()
    both = Route([one, other], Metrics(), clock, jitter=lambda: 1.0)
    running = asyncio.create_task(run(both, batch("x", seconds=20)))
    await settle()
    assert clock.sleepers == 1, "it pauses before it calls the other"
    other.health.end(limit, other.health.begin())
    await clock.advance(BACKOFF)
    result = await asyncio.wait_for(running, 5)
    assert (result.outcomes, result.calls) == ([limit], 1)


async def test_an_ejected_one_is_asked_where_the_others_rest_for_long() -> None:
    ejected, rest_times = deployment("ejected", answers), deployment("rests", answers)
    eject(ejected)
    rest_times.health.end(RateLimited("slowly", retry_after=60), rest_times.health.begin())
    result = await run(route(ejected, rest_times), batch("x", seconds=20))
    assert result.deployments == ("ejected/m",)


async def test_and_where_the_only_other_one_leaves_with_trouble_of_its_own() -> None:
    bad, ejected = deployment("bad", failing(UpstreamAuth("no"))), deployment("ejected", answers)
    ejected.priority = 2
    for _ in range(FAILURES - 1):
        bad.health.end(UpstreamAuth("no"), bad.health.begin())
    eject(ejected)
    result = await run(route(bad, ejected), batch("x"))
    assert bad.health.ejected
    assert (result.deployments, result.calls) == (("ejected/m",), 2)


async def test_where_it_fails_too_callers_are_told_to_wait() -> None:
    ejected, rest_times = deployment("ejected", failing(UpstreamError("down"))), deployment("rests", answers)
    eject(ejected)
    rest_times.health.end(RateLimited("slowly", retry_after=60), rest_times.health.begin())
    [outcome] = (await run(route(ejected, rest_times), batch("x", seconds=20))).outcomes
    assert isinstance(outcome, UpstreamUnavailable)
    assert outcome.retry_after


async def test_a_retry_goes_to_one_in_rotation_before_one_that_is_to_tell_whether_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.pipeline.health.EJECTION", 0.0)
    monkeypatch.setattr("app.pipeline.health.SUSPECT", 0.0)
    fails, ejected, good = (
        deployment("a", failing(UpstreamError("no"))),
        deployment("b", answers),
        deployment("c", answers),
    )
    good.priority = 2
    for _ in range(FAILURES):
        ejected.health.end(UpstreamError("down"), ejected.health.begin())
    assert ejected.health.available()
    all_three = route(fails, ejected, good)
    slot = Slot(fails, fails.health.begin())
    fails.slots.busy += 1
    assert (await all_three.run(batch("x"), slot, "query")).deployments == ("c/m",)


@pytest.mark.parametrize(
    "error",
    [
        UpstreamAuth("no"),
        QuotaExhausted("used up"),
        UpstreamMisconfigured("who?"),
        ExceedsTokensPerMinute("an account's own"),
    ],
)
async def test_trouble_of_one_alone_is_asked_of_another_however_much_has_failed_of_late(error: GatewayError) -> None:
    both = route(deployment("bad", failing(error)), deployment("good", answers))
    while both._budget.spend(on_credit=False):
        pass
    slot = Slot(both.rotation.deployments[0], both.rotation.deployments[0].health.begin())
    both.rotation.deployments[0].slots.busy += 1
    assert (await both.run(batch("x"), slot, "query")).outcomes == [Embedding(b"x", 1)]


async def test_trouble_of_one_alone_is_soon_earned_however_many_calls_meet_it() -> None:
    """Many calls may be in flight there when its key is refused; a passing error elsewhere must still be
    retried."""
    troubles = iter([*[None] * 65, UpstreamError("for once")])

    async def good(batch: Batch) -> BatchResult:
        if trouble := next(troubles, None):
            raise trouble
        return await answers(batch)

    both = route(deployment("bad", failing(UpstreamAuth("no"))), deployment("good", good))
    bad = both.rotation.deployments[0]
    for _ in range(40):
        slot = Slot(bad, bad.health.begin())
        bad.slots.busy += 1
        assert (await both.run(batch("x"), slot, "query")).outcomes == [Embedding(b"x", 1)]
    assert bad.health.ejected
    for _ in range(26):
        assert (await run(both, batch("x"))).outcomes == [Embedding(b"x", 1)]
    assert next(troubles, None) is None, "it was met"


async def test_where_none_is_in_rotation_trouble_of_one_alone_is_asked_of_another_within_the_budget() -> None:
    asked = 0

    async def refuses(batch: Batch) -> BatchResult:
        nonlocal asked
        asked += 1
        return await failing(UpstreamAuth("no"))(batch)

    both = route(deployment("bad", refuses), deployment("worse", refuses))
    for _ in range(100):
        await run(both, batch("x"))
    assert 100 < asked <= 100 * (1 + SHARE)


async def test_callers_are_told_to_stay_away_only_where_no_other_can_be_asked() -> None:
    down = UpstreamError("down")
    for others, no_client_retry in (((), True), ((deployment("good", answers),), False)):
        bad = deployment("bad", failing(down))
        found = route(bad, *others)
        while found._budget.spend(on_credit=False):
            pass
        [outcome] = (await run(found, batch("x"))).outcomes
        assert isinstance(outcome, GatewayError)
        assert outcome.no_client_retry == no_client_retry
        down = UpstreamError("down")


async def test_where_all_hang_callers_are_told_to_wait() -> None:
    one = deployment("one", failing(UpstreamTimeout("the upstream did not answer")))
    eject(one)
    [outcome] = (await run(route(one), batch("x"))).outcomes
    assert isinstance(outcome, UpstreamUnavailable)


async def test_what_one_says_is_told_as_it_is_while_another_is_in_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.pipeline.route.SHARE", 0.0)
    fails, ejected = (
        deployment("fails", failing(UpstreamError("no"))),
        deployment("ejected", failing(UpstreamError("no"))),
    )
    eject(ejected)
    [outcome] = (await run(route(fails, ejected), batch("x"))).outcomes
    assert type(outcome) is UpstreamError


async def test_a_deadline_is_told_as_one_where_all_are_down_as_well() -> None:
    one = deployment("one", held(asyncio.Event(), asyncio.Event()))
    eject(one)
    [outcome] = (await run(route(one), batch("x", seconds=0))).outcomes
    assert isinstance(outcome, UpstreamTimeout)


async def test_of_those_that_are_all_ejected_whichever_is_back_is_found_soon() -> None:
    dead = [deployment(name, failing(UpstreamError("down"))) for name in "ab"]
    back = deployment("back", answers)
    back.priority = 2
    for each in (back, *dead):
        eject(each)
    all_three = route(*dead, back)
    results = [await run(all_three, batch("x")) for _ in range(3)]
    assert [type(each) for each in results[-1].outcomes] == [Embedding]
    assert results[-1].deployments == ("back/m",)


async def test_where_all_are_ejected_one_that_rests_as_well_keeps_no_other_from_being_asked() -> None:
    rests, back = deployment("rests", answers), deployment("back", answers)
    for each in (rests, back):
        eject(each)
    rests.health.end(RateLimited("slowly", retry_after=3), rests.health.begin())
    assert (await run(route(rests, back), batch("x"))).deployments == ("back/m",)


async def test_parts_of_a_batch_that_fail_in_two_ways_are_both_asked_again() -> None:
    """Even if the other goes down meanwhile: an error that may pass here is retried here as well."""
    other = deployment("other", answers)
    calls = 0

    async def fails_twice(batch: Batch) -> BatchResult:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise UpstreamError("down")
        if calls == 2:
            asyncio.get_running_loop().call_later(0.02, other.standing.take_out, "another model")
            raise UpstreamAuth("no")
        return await answers(batch)

    limits = CallLimits(1)
    up = deployment("up", fails_twice, limits=limits)
    both = Route([up, other], Metrics(), SystemClock(), jitter=lambda: 0.5)
    result = await run(both, batch("x", "y"))
    assert [type(each) for each in result.outcomes] == [Embedding] * 2


async def test_dimensions_that_one_does_not_heed_are_asked_of_another() -> None:
    deaf = deployment("deaf", failing(UpstreamIgnoredDimensions("768, not 256")))
    result = await run(route(deaf, deployment("hears", answers)), batch("x"))
    assert [type(each) for each in result.outcomes] == [Embedding]
    assert deaf.health.available()
    alone = await run(route(deaf), batch("x"))
    assert ([type(each) for each in alone.outcomes], alone.calls) == ([UpstreamIgnoredDimensions], 1)


@pytest.mark.parametrize("error", [UpstreamError("down"), UpstreamAuth("no")])
async def test_what_another_does_not_heed_is_not_refused_for_the_one_that_was_down(error: GatewayError) -> None:
    deaf = deployment("deaf", failing(UpstreamIgnoredDimensions("768, not 256")))
    result = await run(route(deployment("down", failing(error)), deaf), batch("x"))
    assert ([type(each) for each in result.outcomes], result.calls) == ([type(error)], 2)


@pytest.mark.parametrize(
    "own",
    [
        UpstreamAuth("no"),
        QuotaExhausted("used up"),
        UpstreamMisconfigured("who?"),
        ExceedsTokensPerMinute("an account's own"),
    ],
)
@pytest.mark.parametrize(
    "passing", [RateLimited("slowly", retry_after=2), UpstreamError("down"), Overloaded("no room here")]
)
async def test_what_may_pass_is_told_and_not_what_another_lacks_for_good(
    passing: GatewayError, own: GatewayError
) -> None:
    result = await run(route(deployment("passing", failing(passing)), deployment("bad", failing(own))), batch("x"))
    assert (result.outcomes, result.calls) == ([passing], 2)


async def test_a_refused_input_is_asked_nowhere_else() -> None:
    result = await run(route(deployment("one", failing(InvalidRequest("no"))), deployment("two", answers)), batch("x"))
    assert isinstance(result.outcomes[0], InvalidRequest)


@pytest.mark.parametrize("error", [UpstreamAuth("no"), UpstreamError("down")])
async def test_one_that_has_shown_nothing_is_asked_only_where_no_other_may_be(error: GatewayError) -> None:
    bad, unverified = deployment("bad", failing(error)), deployment("unproved", answers)
    unverified.standing.unverified = True
    both = route(bad, unverified)
    for text in "abcdef":
        failed = await run(both, batch(text))
        assert isinstance(failed.outcomes[0], GatewayError), "its vectors may be others"
        assert failed.deployments == ("bad/m",)
    assert bad.health.ejected
    bad.standing.take_out("it has another model")
    assert (await run(both, batch("x"))).deployments == ("unproved/m",)


async def test_of_those_that_have_not_been_looked_at_one_is_asked() -> None:
    """They may be in different spaces. If all were checked and none gave a vector, all may be called: they are down."""
    first, served, silent = (deployment(name, answers) for name in ("first", "served", "silent"))
    for each in (first, served, silent):
        each.standing.unverified = True
    silent.standing.silent = "it has not shown its vectors"

    async def asked(*some: Deployment) -> set[str]:
        results = [await run(route(*some), batch(text)) for text in "abcdefgh"]
        return {name for result in results for name in result.deployments}

    assert await asked(silent, first) == {"first/m"}
    assert await asked(first, deployment("proved", answers)) == {"proved/m"}
    served.health.answered = True
    first.health.answered = False
    assert await asked(first, served, silent) == {"served/m"}
    first.standing.silent = served.standing.silent = "it neither"
    both = route(first, served)
    slots = [both.rotation.take("query", Params()) for _ in range(2)]
    assert {slot.deployment for slot in slots if slot} == {first, served}


async def test_and_another_one_once_that_one_has_been_ejected() -> None:
    """If the first hangs, its check may wait for other models'. One that has answered callers is still called."""
    first, second = deployment("first", answers), deployment("second", answers)
    for each in (first, second):
        each.standing.unverified = True
    eject(first)
    assert (await run(route(first, second), batch("x"))).deployments == ("second/m",)
    first.health.answered, second.health.answered = True, False
    assert (await run(route(first, second), batch("x"))).deployments == ("first/m",)


async def test_and_not_where_they_are_busy() -> None:
    one, other, unverified = (deployment(name, answers, slots=Slots(1)) for name in ("one", "other", "unproved"))
    unverified.standing.unverified = True
    all_three = route(one, other, unverified)
    first, second = (all_three.rotation.take("query", Params()) for _ in range(2))
    assert first
    assert second
    assert {first.deployment, second.deployment} == {one, other}
    assert all_three.rotation.take("query", Params()) is None
    assert all_three.rotation.take("query", Params(), avoid=one) is None, "nor for a retry"
    assert all_three.rotation.rest_times(Params()) == []


def test_an_error_told_of_an_input_keeps_what_it_says_of_retries() -> None:
    error = UpstreamError("the certificate was refused")
    error.retryable = False
    assert not error.at_input(3).retryable


async def test_it_is_told_who_embedded_it() -> None:
    bad = deployment("bad", failing(UpstreamError("down")))
    assert (await batcher(bad, deployment("good", answers))(request("x"))).deployments == ("good/m",)
    calls = 0

    async def fails_once(batch: Batch) -> BatchResult:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise UpstreamError("down")
        return await answers(batch)

    limits = CallLimits(1)
    half = deployment("half", fails_once, limits=limits)
    whole = deployment("whole", answers, limits=limits)
    result = await run(route(half, whole), batch("x", "y"))
    assert result.deployments == ("half/m", "whole/m")


# --- what no deployment can do ----------------------------------------------------------------------------


async def test_what_only_a_deployment_that_is_out_could_do_is_refused_at_once() -> None:
    able, other = deployment("able", answers), deployment("other", answers, model=Model("m", roles=("document",)))
    embed = batcher(able, other)
    able.standing.take_out("another model")
    with pytest.raises(UpstreamUnavailable, match="another model"):
        await embed(request("x", params=Params(input_type="query")))
    assert (await embed(request("x"))).embeddings


async def test_and_so_is_what_waits_when_the_last_one_is_taken_out() -> None:
    begun, end = asyncio.Event(), asyncio.Event()
    only = deployment("only", held(begun, end), slots=Slots(1))
    embed = batcher(only)
    under_way = asyncio.create_task(embed(request("x")))
    await begun.wait()
    waiting = asyncio.create_task(embed(request("y")))
    await settle()
    only.standing.take_out("another model")
    end.set()
    assert (await under_way).embeddings
    with pytest.raises(UpstreamUnavailable, match="another model"):
        await asyncio.wait_for(waiting, 5)


def test_what_is_honoured_of_one_kind_of_parameters_is_of_all() -> None:
    answers: dict[object, set[bool]] = {}
    flags = (False, True)
    kinds = [Model("m"), Model("m", roles=("document",)), Model("m", roles=ROLES), WITHIN, FIXED]
    for kind, instruct, sparse in product(kinds, flags, flags):
        model = dataclasses.replace(kind, instruct=instruct, sparse=sparse)
        for params in starmap(Params, product([None, 8], [None, *ROLES], ["dense", "sparse"], [None, "a", "b"])):
            answers.setdefault((model, requirements(params)), set()).add(honours(model, params))
    assert {len(each) for each in answers.values()} == {1}


async def test_what_no_deployment_can_do_together_is_refused_at_once() -> None:
    models = [Model("m", roles=ROLES), Model("m", sparse=True)]
    prepare = Prepare(_reached, "m", models, None)
    for params in (Params(input_type="query"), Params(output_type="sparse")):
        assert await prepare(request("x", params=params))
    with pytest.raises(InvalidRequest, match="this combination of"):
        await prepare(request("x", params=Params(input_type="query", output_type="sparse")))


TOLD, PLAIN = Model("told", roles=ROLES, default_role="document", instruct=True), Model("plain")
WITHIN = Model("within", roles=ROLES, prefixes=("{instruct}: ", ""), instruct=True, instruction="find")
FIXED = Model("fixed", roles=ROLES, prefixes=("query: ", "document: "))


@pytest.mark.parametrize(
    ("one", "other", "role", "instruct", "served"),
    [
        (PLAIN, WITHIN, None, "X", []),
        (PLAIN, WITHIN, "document", "X", []),
        (PLAIN, WITHIN, "query", "X", ["within"]),
        (PLAIN, WITHIN, "query", None, ["within"]),
        (TOLD, WITHIN, None, "X", ["told"]),
        (TOLD, WITHIN, "document", "X", ["told"]),
        (TOLD, WITHIN, "query", "X", ["told", "within"]),
        (TOLD, FIXED, "query", "X", ["told"]),
        (TOLD, FIXED, "query", None, ["fixed", "told"]),
        # For one of them that is to say nothing, and the vectors of the other are the same.
        (PLAIN, WITHIN, "document", None, ["plain", "within"]),
        (PLAIN, TOLD, "document", None, ["plain", "told"]),
        (FIXED, TOLD, "document", None, ["fixed", "told"]),
    ],
)
async def test_roles_and_instructions_reach_the_deployments_that_honour_them_whichever_comes_first(
    one: Model, other: Model, role: Role | None, instruct: str | None, served: list[str]
) -> None:
    for models in ([one, other], [other, one]):
        prepare, params = Prepare(_reached, "m", models, None), Params(input_type=role, instruct=instruct)
        if served:
            canonical = prepare.canonical(params)
            assert sorted(each.name for each in models if honours(each, canonical)) == served
        else:
            with pytest.raises(InvalidRequest, match="for queries only; say input_type: query"):
                prepare.canonical(params)


async def test_an_image_that_is_too_large_for_one_deployment_is_too_large_whichever_comes_first() -> None:
    asked = replace(request("x"), inputs=[Media("image", "data:image/png;base64," + "A" * 40)], media=True)
    small, large = (Model("m", images=1, max_image_bytes=size) for size in (29, 31))
    for models in ([small, large], [large, small]):
        with pytest.raises(InvalidRequest, match="an image of 30 bytes; model 'm' takes at most 29"):
            await Prepare(_reached, "m", models, None)(asked)


async def test_what_clients_ask_for_fills_no_memory() -> None:
    prepare = Prepare(_reached, "m", [Model("m", None, ANY, instruct=True)], None)
    for number in range(300):
        assert await prepare(request("x", params=Params(dimensions=number + 1)))
        assert await prepare(request("x", params=Params(instruct=f"{number}")))
    assert len(prepare._canonical) == 256
    assert {params.instruct for params in prepare._canonical} == {None}


async def test_an_image_is_taken_where_every_deployment_takes_it() -> None:
    image = [Media("image", "https://example.com/x.png")]
    seeing, blind = Model("m", images=1), Model("m")
    asked = replace(request("x"), inputs=image, media=True)
    assert await Prepare(_reached, "m", [seeing, seeing], None)(asked)
    for models in ([seeing, blind], [blind, seeing]):
        with pytest.raises(InvalidRequest, match="text only"):
            await Prepare(_reached, "m", models, None)(asked)


async def _reached(request: EmbedRequest) -> EmbedResult:
    return EmbedResult([Embedding(b"1234", 1)] * len(request.inputs), [])


# --- deadlines --------------------------------------------------------------------------------------------


async def test_what_a_split_batch_has_paid_for_is_kept_when_time_is_up() -> None:
    memory = MemoryStore(2**20, 1000, SystemClock(), Metrics())
    calls = 0

    async def slower_and_slower(batch: Batch) -> BatchResult:
        nonlocal calls
        calls += 1
        await asyncio.sleep(30 if calls == 4 else 0)
        return await answers(batch)

    limits = CallLimits(2)
    tiers = Tiers([memory], Metrics(), SystemClock())
    call, clock = cast("Call", slower_and_slower), SystemClock()
    chain = build.chain(call, name="up/m", cache=tiers, limits=limits, model=Model("m"), clock=clock)
    result = await run(route(deployment("up", chain, limits=limits)), batch(*"abcdefgh", seconds=0.2))
    assert [type(each) for each in result.outcomes] == [Embedding] * 6 + [UpstreamTimeout] * 2
    assert len(memory) == 6


async def test_who_joins_a_call_has_time_of_his_own() -> None:
    started = 0

    async def first_hangs(batch: Batch) -> BatchResult:
        nonlocal started
        started += 1
        await asyncio.sleep(30 if started == 1 else 0)
        return await answers(batch)

    embed = batcher(deployment("up", first_hangs))
    first = asyncio.create_task(embed(request("x", "y", seconds=0.2)))
    await settle()
    second = asyncio.create_task(embed(request("x")))
    with pytest.raises(UpstreamTimeout):
        await first
    assert [each.vector for each in (await asyncio.wait_for(second, 5)).embeddings] == [b"x"]
    assert started == 2


def slow_after_calls_of(usual: float) -> tuple[Batcher, list[Batch]]:
    """A batcher over one deployment whose calls used to take `usual` seconds and now take 0.3; and its calls."""
    got: list[Batch] = []

    async def slow(batch: Batch) -> BatchResult:
        got.append(batch)
        return await after(0.3)(batch)

    up = deployment("up", slow)
    up.health.record_duration(usual)
    return batcher(up), got


@pytest.mark.parametrize(("usual", "calls"), [(0.3, 1), (0.02, 2)], ids=["too little time", "it hangs"])
async def test_a_call_that_was_left_too_little_time_is_seen_to_its_end(usual: float, calls: int) -> None:
    embed, got = slow_after_calls_of(usual)
    with pytest.raises((TimeoutError, UpstreamTimeout)):
        await asyncio.wait_for(embed(request("x", seconds=0.1)), 0.15)
    assert [each.vector for each in (await embed(request("x"))).embeddings] == [b"x"]
    assert len(got) == calls


@pytest.mark.parametrize(("usual", "calls"), [(0.3, 1), (0.02, 2)], ids=["too little time", "it hangs"])
async def test_and_not_made_again_for_who_has_joined_it(usual: float, calls: int) -> None:
    embed, got = slow_after_calls_of(usual)
    first = asyncio.create_task(embed(request("x", seconds=0.1)))
    await settle()
    assert [each.vector for each in (await embed(request("x"))).embeddings] == [b"x"]
    assert len(got) == calls
    await asyncio.gather(first, return_exceptions=True)


async def test_and_who_has_joined_one_that_hangs_has_time_for_another() -> None:
    calls = 0

    async def hangs_once(batch: Batch) -> BatchResult:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.Event().wait()
        return await answers(batch)

    up = deployment("up", hangs_once)
    up.health.record_duration(2.0)
    embed = batcher(up)
    first = asyncio.create_task(embed(request("x", seconds=0.1)))
    await settle()
    async with asyncio.timeout(1.0):
        assert [each.vector for each in (await embed(request("x", seconds=1.0))).embeddings] == [b"x"]
    await asyncio.gather(first, return_exceptions=True)


async def test_one_whose_answers_come_too_late_for_those_who_ask_leaves_the_rotation() -> None:
    async def slow(batch: Batch) -> BatchResult:
        await asyncio.sleep(0.15)  # longer than they wait
        return await answers(batch)

    up = deployment("up", slow)
    up.health.record_duration(0.09)
    embed = batcher(up)
    for i in range(12):
        with pytest.raises((TimeoutError, UpstreamError, UpstreamUnavailable)):
            await asyncio.wait_for(embed(request(f"{i}", seconds=0.1)), 0.1)
        await asyncio.sleep(0.1)  # until its late answer is there
    assert up.health.ejected


async def test_one_that_was_left_too_little_time_again_and_again_stays() -> None:
    async def slow(batch: Batch) -> BatchResult:
        await asyncio.sleep(0.1)  # longer than they wait
        return await answers(batch)

    up = deployment("up", slow)
    up.health.record_duration(0.1)
    embed = batcher(up)
    for i in range(12):
        with pytest.raises((TimeoutError, UpstreamError)):
            await asyncio.wait_for(embed(request(f"{i}", seconds=0.03)), 0.03)
        await asyncio.sleep(0.1)  # until its late answer is there
    assert not up.health.ejected
    assert up.health.ample_time > 0.19


async def test_one_that_has_had_the_time_that_its_answers_take_is_waited_for_no_longer() -> None:
    async def hangs(batch: Batch) -> BatchResult:
        await asyncio.sleep(30)
        return await answers(batch)

    up, other = deployment("up", hangs), deployment("other", answers)
    other.priority = 2
    up.health.record_duration(0.4)
    embed = batcher(up, other)
    with pytest.raises((TimeoutError, UpstreamTimeout)):
        await asyncio.wait_for(embed(request("x", seconds=0.45)), 0.45)
    result = await asyncio.wait_for(embed(request("x", seconds=0.3)), 0.3)
    assert result.deployments == ("other/m",)


async def test_an_answer_that_came_while_this_process_had_no_turn_is_not_cut_off_by_the_deadline() -> None:
    loop, started = asyncio.get_running_loop(), asyncio.Event()

    async def call(batch: Batch) -> BatchResult:
        arrived = loop.create_future()
        threading.Timer(0.05, lambda: loop.call_soon_threadsafe(arrived.set_result, None)).start()
        started.set()
        await arrived
        return await answers(batch)

    embedding = asyncio.create_task(batcher(deployment("up", call))(request("x", seconds=0.2)))
    await started.wait()
    time.sleep(0.4)  # noqa: ASYNC251  # suspended, or without CPU time
    assert (await embedding).sources == [Source.UPSTREAM]


async def test_a_stop_does_not_wait_long_for_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(batch: Batch) -> BatchResult:
        await asyncio.sleep(60)
        return await answers(batch)

    monkeypatch.setattr("app.pipeline.route.LONGER", 0.2)
    up = deployment("up", hangs)
    up.health.record_duration(20)
    embed = batcher(up)
    with pytest.raises(UpstreamTimeout):
        await asyncio.wait_for(embed(request("x", seconds=0.1)), 0.15)
    await asyncio.wait_for(embed.aclose(), 5)


async def test_and_pays_only_for_what_the_first_ones_call_did_not_bring() -> None:
    sent: list[str] = []

    async def takes_one_and_hangs_at_the_third(batch: Batch) -> BatchResult:
        if len(batch.inputs) > 1:
            raise InvalidRequest("batch size is invalid, it should not be larger than 1")
        sent.append(str(batch.inputs[0]))
        await asyncio.sleep(30 if len(sent) == 3 else 0)
        return await answers(batch)

    limits = CallLimits(10)
    embed = batcher(deployment("up", takes_one_and_hangs_at_the_third, limits=limits))
    first = asyncio.create_task(embed(request(*"abcd", seconds=0.2)))
    await settle()
    second = asyncio.create_task(embed(request(*"abcd")))
    for result in await asyncio.wait_for(asyncio.gather(first, second), 5):
        assert [each.vector for each in result.embeddings] == [b"a", b"b", b"c", b"d"]
    assert sent == ["a", "b", "c", "c", "d"]


@pytest.mark.parametrize("short", ["of time for a pause", "of slots"])
async def test_and_a_second_attempt_of_his_own(short: str) -> None:
    """The first caller has no time for one."""
    calls: list[list[str]] = []

    async def first_fails(batch: Batch) -> BatchResult:
        calls.append([str(text) for text in batch.inputs])
        if len(calls) == 1:
            await asyncio.sleep(0.05)  # of the 0.2 s that the first caller waits
            raise UpstreamError("down")
        await asyncio.sleep(0.5 if "other" in batch.inputs else 0)
        return await answers(batch)

    up = deployment("up", first_fails, slots=Slots(1))
    pause = 1.0 if short == "of time for a pause" else 0.0  # out of 0.2 s
    embed = Batcher(Route([up], Metrics(), SystemClock(), jitter=lambda: pause), Metrics(), SystemClock())
    asking = [asyncio.create_task(embed(request("x", "y", seconds=0.2)))]
    await settle()
    asking += [asyncio.create_task(embed(request(text))) for text in ("x", "other")[: 2 if not pause else 1]]
    with pytest.raises(UpstreamError):
        await asking[0]
    await asyncio.wait_for(asyncio.gather(*asking[1:]), 5)
    assert calls[-1] == ["x"]


async def test_a_call_that_was_left_too_little_time_is_not_held_against_the_upstream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.pipeline.route.LONGER", 0.0)
    up = deployment("up", after(0.1))
    one = route(up)
    assert isinstance((await run(one, batch("x"))).outcomes[0], Embedding)
    for _ in range(FAILURES):
        assert isinstance((await run(one, batch("x", seconds=0.02))).outcomes[0], UpstreamTimeout)
    assert up.health.available()


async def test_one_that_has_time_enough_and_hangs_is() -> None:
    up = deployment("up", after(30))
    up.health.record_duration(0.01)
    one = route(up)
    for _ in range(FAILURES):
        await run(one, batch("x", seconds=0.05))
    assert not up.health.available()


def test_however_slow_it_is_there_is_a_time_in_which_it_should_have_answered() -> None:
    slow = health(HandClock())
    slow.record_duration(50)
    assert [slow.had_ample_time(seconds) for seconds in (20, 40)] == [False, True]


def test_short_calls_say_little_of_long_ones() -> None:
    up = health(HandClock())
    for seconds in (2.0, *[0.05] * 20):
        up.record_duration(seconds)
    assert [up.had_ample_time(seconds) for seconds in (1.0, 5.0)] == [False, True]


async def test_one_that_hangs_is_found_however_little_time_it_is_left() -> None:
    dead, good = deployment("dead", after(30)), deployment("good", answers)
    dead.health.record_duration(0.1)
    both = route(dead, good)
    first = await run(both, batch("x", seconds=0.15))
    assert isinstance(first.outcomes[0], UpstreamTimeout)
    assert isinstance((await run(both, batch("x", seconds=0.15))).outcomes[0], Embedding), "the other is asked first"
    alone = route(dead)
    for _ in range(3 * FAILURES):
        await run(alone, batch("x", seconds=0.05))
    assert not dead.health.available()


@pytest.mark.parametrize("gone", ["ejected", "out", "resting"])
async def test_trouble_is_told_at_once_when_the_other_goes_away_meanwhile(gone: str) -> None:
    other = deployment("other", answers)

    async def refuses(batch: Batch) -> BatchResult:
        assert batch.inputs
        asyncio.get_running_loop().call_later(0.02, goes)
        raise UpstreamAuth("no")

    def goes() -> None:
        if gone == "out":
            other.standing.take_out("another model")
        for _ in range(FAILURES if gone == "ejected" else 0):
            other.health.end(UpstreamError("down"), other.health.begin())
        if gone == "resting":
            other.health.end(RateLimited("slow", retry_after=0.2), other.health.begin())

    both = Route([deployment("bad", refuses), other], Metrics(), SystemClock(), jitter=lambda: 0.5)
    result = await asyncio.wait_for(run(both, batch("x", seconds=20)), 5)
    assert isinstance(result.outcomes[0], Embedding if gone == "resting" else UpstreamAuth)


@pytest.mark.parametrize("error", [UpstreamError("down"), RateLimited("slow", retry_after=0.1)])
async def test_trouble_is_told_at_once_when_the_last_one_is_taken_out_meanwhile(error: GatewayError) -> None:
    async def fails(batch: Batch) -> BatchResult:
        assert batch.inputs
        last.standing.take_out("another model")
        raise error

    last = deployment("last", fails)
    result = await asyncio.wait_for(run(route(last), batch("x", seconds=20)), 5)
    assert isinstance(result.outcomes[0], GatewayError)
    assert result.calls == 1


# --- verdicts -----------------------------------------------------------------------------------------------


async def test_a_rate_limit_within_a_split_batch_is_one() -> None:
    limits = CallLimits(2)
    up = deployment("up", failing(RateLimited("slow", retry_after=20)), limits=limits)
    await run(route(up), batch(*"abcd", seconds=1))
    assert up.health.cooldown_remaining() > 10


@pytest.mark.parametrize("error", [RateLimited("slow", retry_after=20), QuotaExhausted("used up")])
@pytest.mark.parametrize("first", ["answered", "refused", "failed"])
async def test_and_so_it_is_whatever_came_of_the_parts_before_it(first: str, error: GatewayError) -> None:
    before: dict[str, Embedding | GatewayError] = {
        "answered": Embedding(b"v", 1),
        "refused": InvalidRequest("no"),
        "failed": UpstreamInvalidVector("NaN"),
    }

    async def embed(batch: Batch) -> BatchResult:
        return BatchResult([error if text == "late" else before[first] for text in batch.inputs])

    up = deployment("up", embed, slots=Slots(4))
    await run(route(up), batch("early", "late", seconds=1))
    if isinstance(error, RateLimited):
        assert up.health.cooldown_remaining() > 10
    else:
        assert up.health.suspect
    free = sum(up.slots.take("query") for _ in range(4))
    assert free == (2 if isinstance(error, RateLimited) else 4), "half as many calls at once"


@pytest.mark.parametrize("last", [UpstreamAuth("no"), UpstreamIgnoredDimensions("768, not 256"), None])
async def test_of_who_is_asked_twice_the_last_word_is_told(last: GatewayError | None) -> None:
    outcomes: list[GatewayError | None] = [UpstreamInvalidVector("NaN"), last]

    async def embed(batch: Batch) -> BatchResult:
        outcome = outcomes.pop(0) or Embedding(b"v", 1)
        return BatchResult([outcome if text == "a" else Embedding(b"v", 1) for text in batch.inputs])

    only = deployment("only", embed)
    result = await run(route(only), batch(*"ab"))
    assert (result.outcomes[0], result.calls) == (last or Embedding(b"v", 1), 2)
    assert only.health.suspect is isinstance(last, UpstreamAuth), "nor is it doubted for what it made at last"


async def test_a_split_batch_that_failed_as_a_whole_is_a_failure() -> None:
    limits = CallLimits(2)
    up = deployment("up", failing(UpstreamAuth("no")), limits=limits)
    one = route(up)
    for _ in range(FAILURES):
        await run(one, batch(*"abcd"))
    assert not up.health.available()


def giving_none_for(*none: str) -> BatchEmbedder:
    """An upstream that gives no vector for these texts."""

    async def embed(batch: Batch) -> BatchResult:
        result = await answers(batch)
        for i, text in enumerate(batch.inputs):
            if text in none:
                result.outcomes[i] = UpstreamInvalidVector("the upstream returned a vector that holds NaN")
        return result

    return embed


@pytest.mark.parametrize("texts", ["a", "ab"])
async def test_one_of_which_every_vector_is_none_is_left_out(texts: str) -> None:
    up = deployment("up", giving_none_for(*"ab"))
    for _ in range(FAILURES):
        await run(route(up), batch(*texts))
    assert not up.health.available()


async def test_one_for_which_a_text_alone_is_too_much_is_not() -> None:
    up = deployment("up", giving_none_for("a"))
    for _ in range(FAILURES):
        await run(route(up), batch(*"ab"))
    assert up.health.available()


async def test_a_text_of_which_one_made_no_vector_speaks_against_no_other_that_makes_none_either() -> None:
    first, other = deployment("first", giving_none_for("a")), deployment("other", giving_none_for("a"))
    for _ in range(3 * FAILURES):
        slot = Slot(first, first.health.begin())
        assert first.slots.take("bulk")
        result = await route(first, other).run(batch(*"ab"), slot, "bulk")
        assert [type(each) for each in result.outcomes] == [UpstreamInvalidVector, Embedding]
        assert result.deployments == (first.name, other.name)
    assert other.health.available()


@pytest.mark.parametrize(
    ("first", "second", "doubted"),
    [
        (UpstreamInvalidVector("NaN"), None, True),
        (UpstreamInvalidVector("NaN"), UpstreamInvalidVector("NaN"), False),
        (UpstreamError("down"), None, False),
        (UpstreamError("down"), UpstreamInvalidVector("NaN"), False),
    ],
)
async def test_only_who_makes_no_vector_where_another_makes_one_is_asked_after_others(
    first: GatewayError, second: GatewayError | None, doubted: bool
) -> None:
    def embeds(error: GatewayError | None) -> BatchEmbedder:
        async def embed(batch: Batch) -> BatchResult:
            return BatchResult([error if error and text == "a" else Embedding(b"v", 1) for text in batch.inputs])

        return embed

    one, other = deployment("one", embeds(first)), deployment("other", embeds(second))
    slot = Slot(one, one.health.begin())
    assert one.slots.take("query")
    result = await route(one, other).run(batch(*"ab"), slot, "query")
    assert result.calls == 2
    assert one.health.suspect is doubted


def health(clock: HandClock) -> Health:
    return Health(clock, partial(Metrics().show_deployment, "up", "m"), "up/m")


async def test_calls_that_fail_together_are_one_ejection() -> None:
    clock = HandClock()
    one = health(clock)
    eras = [one.begin() for _ in range(4 * FAILURES)]
    for era in eras:
        one.end(UpstreamError("down"), era)
    await clock.advance(EJECTION)
    assert one.available()


async def test_a_call_from_before_an_ejection_says_nothing_after_it() -> None:
    clock = HandClock()
    one = health(clock)
    old = [one.begin() for _ in range(3)]
    for _ in range(FAILURES):
        one.end(UpstreamError("down"), one.begin())
    one.end(None, old[0])
    assert not one.available(), "an old answer does not end it"
    await clock.advance(EJECTION)
    probe = one.begin()
    one.end(UpstreamError("down"), old[1])
    assert not one.available(), "one call at a time, and that is still under way"
    one.end(None, probe)
    assert one.available()


async def test_one_that_came_back_and_fails_again_leaves_at_once() -> None:
    clock = HandClock()
    one = health(clock)
    for _ in range(3):
        for _ in range(FAILURES):
            one.end(UpstreamError("down"), one.begin())
        assert not one.available()
        one.end(None, one.begin())  # it is called all the same, since all were out
        assert one.available()


async def test_a_rest_that_an_upstream_asks_for_has_an_end() -> None:
    clock = HandClock()
    one = health(clock)
    one.end(RateLimited("slow", retry_after=1_764_243_333), one.begin())  # a date that is taken for seconds
    assert one.cooldown_remaining() == LONGEST_REST


# --- queues -------------------------------------------------------------------------------------------------


async def test_who_waits_for_a_short_rest_is_not_held_up_by_who_waits_for_a_long_one() -> None:
    clock, metrics = HandClock(), Metrics()
    plain, roles = (
        Deployment(name, Model("m", roles=able), "s", Slots(4), CallLimits(10), health(clock), answers)
        for name, able in (("plain", ()), ("roles", ROLES))
    )
    for each, seconds in ((plain, 1), (roles, 20)):
        each.health.end(RateLimited("slowly", retry_after=seconds), each.health.begin())
    embed = Batcher(Route([plain, roles], metrics, clock), metrics, clock)
    long = asyncio.create_task(embed(request("long", params=Params(input_type="query"))))
    await settle()
    short = asyncio.create_task(embed(request("short")))
    await settle()
    await clock.advance(1)
    assert (short.done(), long.done()) == (True, False)
    await clock.advance(19)
    assert long.done()


def rests_shortly(one: Deployment, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes it out for a twentieth of a second."""
    if why == "rate limit":
        one.health.end(RateLimited("slowly", retry_after=0.05), 0)
    if why == "ejection":
        monkeypatch.setattr("app.pipeline.health.EJECTION", 0.05)
        eject(one)


@pytest.mark.parametrize("why", ["rate limit", "ejection", "pace"])
async def test_one_that_has_rested_is_asked_while_another_is_busy(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, end = asyncio.Event(), asyncio.Event()
    busy = deployment("busy", held(begun, end), slots=Slots(1))
    pace = Pace("rests", Rates(requests=1200), SystemClock()) if why == "pace" else None
    rest_times = deployment("rests", answers, slots=Slots(1, pace))
    busy.priority, rest_times.priority = 0, 1
    embed = batcher(busy, rest_times)
    under_way = asyncio.create_task(embed(request("first")))
    await begun.wait()
    rests_shortly(rest_times, why, monkeypatch)
    for number in range(6):  # more than the pace lets through at once
        assert (await asyncio.wait_for(embed(request(f"{number}")), 5)).deployments == ("rests/m",)
    end.set()
    await under_way


@pytest.mark.parametrize("why", ["rate limit", "ejection"])
async def test_a_retry_does_not_wait_for_the_busy_one_either(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, end = asyncio.Event(), asyncio.Event()
    busy, rest_times = deployment("busy", held(begun, end), slots=Slots(1)), deployment("rests", answers)
    both = route(deployment("bad", failing(UpstreamAuth("no"))), busy, rest_times)
    slot = both.rotation.take("query", Params())
    assert slot is not None
    assert slot.deployment.name == "bad/m"
    under_way = asyncio.create_task(both.run(batch("x"), both.rotation.take("query", Params()) or slot, "query"))
    await begun.wait()
    rests_shortly(rest_times, why, monkeypatch)
    result = await asyncio.wait_for(both.run(batch("y"), slot, "query"), 5)
    assert result.deployments == ("rests/m",)
    end.set()
    await under_way


class WokenEarly(HandClock):
    """Wakes sleepers a moment too early, as uvloop does. The moment has passed after `readings` of the clock."""

    def __init__(self, readings: int) -> None:
        super().__init__()
        self._readings, self._left = readings, math.inf

    def monotonic(self) -> float:
        self._left -= 1
        return self.now if self._left >= 0 else self.now + 0.001

    async def sleep(self, seconds: float) -> None:
        self.now += seconds - 0.001
        self._left = self._readings


@pytest.mark.parametrize("readings", range(16))
async def test_a_retry_is_made_at_whichever_reading_of_the_clock_a_rest_ends(readings: int) -> None:
    clock, calls = WokenEarly(readings), iter([failing(RateLimited("slowly")), answers])
    one = deployment("one", lambda batch: next(calls)(batch))
    one.health = health(clock)
    result = await run(Route([one], Metrics(), clock, jitter=lambda: 0.0), batch("x"))
    assert result.outcomes == [Embedding(b"x", 1)]


async def test_a_retry_that_waited_leaves_nothing_behind() -> None:
    begun, end = asyncio.Event(), asyncio.Event()
    busy, out = deployment("busy", held(begun, end), slots=Slots(1)), deployment("out", answers)
    out.standing.take_out("another model")
    both = route(deployment("bad", failing(UpstreamAuth("no"))), busy, out)
    first, second = both.rotation.take("query", Params()), both.rotation.take("query", Params())
    assert first is not None
    assert second is not None
    under_way = asyncio.create_task(both.run(batch("x"), second, "query"))
    await begun.wait()
    retried = asyncio.create_task(both.run(batch("y"), first, "query"))
    while not out.slots._waiting:  # no event tells of it
        await asyncio.sleep(0)
    end.set()
    assert (await retried).deployments == ("busy/m",)
    assert not out.slots._waiting
    await under_way


async def test_a_bug_of_ours_says_nothing_of_a_deployment() -> None:
    async def fails(batch: Batch) -> BatchResult:
        raise AttributeError(batch)

    only = deployment("only", fails)
    for _ in range(FAILURES):
        only.health.end(UpstreamError("down"), 0)
    with pytest.raises(AttributeError):
        await run(route(only), batch("x"))
    assert only.health.trouble.lasting == "upstream_error: down"
    assert not only.health.available()


async def test_and_where_it_ends_the_call_that_was_to_tell_whether_one_is_back_the_next_one_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fails(batch: Batch) -> BatchResult:
        raise AttributeError(batch)

    monkeypatch.setattr("app.pipeline.health.EJECTION", 0.0)
    only = deployment("only", fails)
    for _ in range(FAILURES):
        only.health.end(UpstreamError("down"), only.health.begin())
    with pytest.raises(AttributeError):
        await run(route(only), batch("x"))
    assert only.health.ejected
    assert only.health.available()


async def test_two_models_of_one_upstream_take_turns() -> None:
    """Each call of the first model empties its queue, which fills again meanwhile."""
    slots = Slots(1)
    calls: list[str] = []

    def counted(name: str) -> BatchEmbedder:
        async def embed(batch: Batch) -> BatchResult:
            calls.append(name)
            await asyncio.sleep(0.01)  # time for others to come meanwhile
            return await answers(batch)

        return embed

    busy, patient = (batcher(deployment("up", counted(name), slots=slots)) for name in ("busy", "patient"))

    async def traffic(coming: asyncio.TaskGroup) -> None:
        for number in range(400):  # some are always waiting when a slot comes free, and never more than a call takes
            coming.create_task(busy(request(f"{number}")))
            await asyncio.sleep(0.002)

    async with asyncio.TaskGroup() as coming:
        always = coming.create_task(traffic(coming))
        while calls.count("busy") < 3:
            await asyncio.sleep(0)
        before = calls.count("busy")
        await asyncio.wait_for(patient(request(*(f"b{i}" for i in range(30)))), 5)
        assert calls.count("busy") - before < 12, "ten rows a call: three calls were needed"
        always.cancel()


@pytest.mark.parametrize(
    ("asking", "next_ones"), [("one other one other", "one other one"), ("one one other", "one other one")]
)
async def test_the_model_that_was_served_longest_ago_is_next_however_often_it_has_asked_since(
    asking: str, next_ones: str
) -> None:
    slots, clock, metrics, ends = Slots(1), HandClock(), Metrics(), asyncio.Semaphore(0)
    served: list[str] = []

    def held(name: str) -> BatchEmbedder:
        async def embed(batch: Batch) -> BatchResult:
            served.append(name)
            await ends.acquire()
            return await answers(batch)

        return embed

    def over(name: str) -> Batcher:
        return Batcher(Route([deployment("up", held(name), slots=slots)], metrics, clock), metrics, clock)

    models = {name: over(name) for name in ("one", "other")}
    asked = []
    for number, name in enumerate(asking.split()):
        asked.append(asyncio.create_task(models[name](request(f"{number}"))))
        await clock.advance(1)
    for _ in asked:
        ends.release()
    await asyncio.gather(*asked)
    assert served == next_ones.split()


async def test_inputs_nobody_waits_for_do_not_pile_up() -> None:
    held = asyncio.Event()

    async def waits(batch: Batch) -> BatchResult:
        await held.wait()
        return await answers(batch)

    metrics = Metrics()
    one = Batcher(Route([deployment("up", waits, slots=Slots(1))], metrics, SystemClock()), metrics, SystemClock())
    live = [asyncio.create_task(one(request("first")))]
    await settle()
    live.append(asyncio.create_task(one(request("second"))))
    await settle()
    for number in range(50):
        gone = asyncio.create_task(one(request(*(f"{number} {i}" for i in range(10)))))
        await settle()
        gone.cancel()
    await settle()
    waiting = [metrics.registry.get_sample_value(QUEUED, {"upstream": "up", "lane": lane}) for lane in LANES]
    assert sum(each or 0 for each in waiting) < 30, "some may be left of those that were dropped last"
    held.set()
    assert [len((await each).embeddings) for each in live] == [1, 1]


async def test_one_call_after_another_goes_where_the_weights_say() -> None:
    light, heavy = deployment("light", answers), deployment("heavy", answers)
    heavy.weight = 3
    both = Route([light, heavy], Metrics(), SystemClock(), jitter=random.Random(1).random)
    served = Counter([(await run(both, batch("x"))).deployments[0] for _ in range(1000)])
    assert 680 < served["heavy/m"] < 820
    assert served["light/m"] == 1000 - served["heavy/m"]


async def test_a_reply_that_there_was_no_memory_to_read_is_paid_for_nowhere_else() -> None:
    error = Shortage("the gateway is out of memory", retry_after=1)
    one, other = deployment("one", failing(error)), deployment("other", failing(error))
    for _ in range(FAILURES):
        result = await run(route(one, other), batch("x"))
        assert (result.calls, result.outcomes) == (1, [error])
        await run(route(one), batch("x"))
    assert one.health.available(), "it says nothing about the deployment"
