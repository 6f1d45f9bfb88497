"""A deployment whose model has changed, or differs from its siblings' model, never answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from app.cache.disk import DiskStore
from app.cache.redis import RedisStore
from app.cache.tiers import Tiers
from app.catalog import Model
from app.clock import SystemClock
from app.errors import RateLimited, UpstreamTimeout, UpstreamUnreachable
from app.metrics import Metrics
from app.pipeline import canary
from app.pipeline.batcher import Batcher
from app.pipeline.canary import CHECK_INTERVAL, RECHECK_INTERVAL, ReferenceVectors
from app.pipeline.deployment import CallLimits, Deployment, Slots
from app.pipeline.health import EJECTION, FAILURES, Health
from app.pipeline.route import Route
from app.types import Batch, BatchEmbedder, BatchResult, Embedding, EmbedRequest, Params
from tests.api.support import settled
from tests.clock import HandClock, settle
from tests.fakes import FakeOpenAI, Vector, faults
from tests.harness import Running, running, settings_of
from tests.redis_server import RedisServer

MODEL = "text-embedding-3-small"


class OtherModel(FakeOpenAI):
    """A server with another model under the same name, while `changed` is set."""

    changed = True

    def expected(self, model: str, text: Any, dimensions: int | None = None) -> Vector:
        size = dimensions or self.models[model]
        return super().expected(model, f"not {text}" if self.changed else text, size)


class RoundClock(SystemClock):
    """Hours pass by adding to `passed`; a task that sleeps between two rounds is woken by adding to `woken`."""

    def __init__(self) -> None:
        self.passed = 0.0
        self.woken = 0

    def monotonic(self) -> float:
        return super().monotonic() + self.passed

    async def sleep(self, seconds: float) -> None:
        before = self.woken
        while self.woken == before and seconds >= canary.ROUND:
            await asyncio.sleep(0.001)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


async def answers(batch: Batch) -> BatchResult:
    return BatchResult([Embedding(np.ones(4, "<f4").tobytes(), 1)] * len(batch.inputs))


async def answers_otherwise(batch: Batch) -> BatchResult:
    return BatchResult([Embedding((-np.ones(4, "<f4")).tobytes(), 1)] * len(batch.inputs))


async def hangs(batch: Batch) -> BatchResult:
    del batch
    await asyncio.Event().wait()
    raise AssertionError


async def late(batch: Batch) -> BatchResult:
    await asyncio.sleep(0.2)  # longer than it is waited for
    return await answers(batch)


async def refuses(batch: Batch) -> BatchResult:
    return BatchResult([UpstreamUnreachable("no connection")] * len(batch.inputs))


async def limited(batch: Batch) -> BatchResult:
    return BatchResult([RateLimited("slowly", retry_after=1)] * len(batch.inputs))


def healthy(clock: HandClock, name: str) -> Health:
    return Health(clock, partial(Metrics().show_deployment, name, "m"), f"{name}/m")


def config(*fakes: FakeOpenAI, **more: Any) -> dict[str, Any]:
    upstreams = {
        f"up{i}": {"type": "openai", "api_key": "sk-fake", "base_url": fake.url + "/v1"} for i, fake in enumerate(fakes)
    }
    deployments = [{"upstream": name, "model": MODEL} for name in upstreams]
    return {"upstreams": upstreams, "models": {"m": {"deployments": deployments}}, "cache": {"memory": None}, **more}


def until_out(gateway: Running, upstream: str) -> dict[str, str]:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        problem = gateway.get("/readyz").json()["upstreams"][upstream].get("out")
        if problem:
            return dict(problem)
    pytest.fail("nothing left the rotation")


def test_a_check_that_needs_no_more_answers_blames_no_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its upstream has longer than that: alerts must not count it as failing."""
    monkeypatch.setattr(canary, "FIRST_CHECK_TIMEOUT", 0.05)
    monkeypatch.setattr(canary, "PATIENCE", 0.05)
    with FakeOpenAI(api_key="sk-fake") as right, FakeOpenAI(api_key="sk-fake") as slow:
        slow.fail(faults.hang)
        with running(config(right, slow)) as gateway:
            settled(gateway, lambda: gateway.metric("upstream_request_duration_seconds_count", upstream="up1") == 1)
            assert gateway.metric("upstream_requests_total", upstream="up0", outcome="ok") == 1
            assert gateway.metric("upstream_requests_total", upstream="up1") == 0


def test_the_sibling_with_another_model_leaves_and_is_never_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    with FakeOpenAI(api_key="sk-fake") as right, OtherModel(api_key="sk-fake") as wrong:
        with running(config(right, wrong)) as gateway:
            assert "cosine" in until_out(gateway, "up1")[MODEL]
            asked = len(wrong.calls)
            for i in range(30):
                response = gateway.post({"model": "m", "input": f"text {i}"})
                vector = np.array(response.json()["data"][0]["embedding"], "<f4")
                assert np.array_equal(vector, right.expected(MODEL, f"text {i}"))
            assert len(wrong.calls) == asked
            assert gateway.metric("upstream_available", upstream="up1", model=MODEL) == 0
            alone = gateway.post({"model": f"up1/{MODEL}", "input": "x"})
            assert (alone.status_code, alone.json()["error"]["code"]) == (503, "upstream_unavailable")
    assert "leaves the rotation" in caplog.text


@pytest.mark.parametrize("first", ["right", "wrong"])
def test_an_upstream_that_merely_lists_a_configured_models_name_does_not_take_its_place(first: str) -> None:
    """Whoever comes first in the file, and although only the other one has been asked."""
    with FakeOpenAI(api_key="sk-fake") as right, OtherModel(api_key="sk-fake") as wrong:
        fakes = (right, wrong) if first == "right" else (wrong, right)
        values = config(*fakes)
        ours, other = (f"up{fakes.index(fake)}" for fake in (right, wrong))
        values["models"] = {"m": {"deployments": [{"upstream": ours, "model": MODEL}]}}
        clock = RoundClock()
        with running(values, clock=clock) as gateway:
            assert gateway.post({"model": f"{other}/{MODEL}", "input": "x"}).status_code == 200
            clock.woken += 1
            assert "cosine" in until_out(gateway, other)[MODEL]
            vector = np.array(gateway.post({"model": "m", "input": "y"}).json()["data"][0]["embedding"], "<f4")
            assert np.array_equal(vector, right.expected(MODEL, "y"))


def test_a_model_that_changes_between_two_runs_is_found_by_what_was_stored(tmp_path: Path) -> None:
    cache = {"cache": {"memory": None, "disk": {"path": str(tmp_path / "cache.sqlite3")}}}
    with OtherModel(api_key="sk-fake") as fake:
        fake.changed = False
        for changed in (False, True):
            fake.changed = changed
            fake.reset()
            clock = RoundClock()
            with running(config(fake, **cache), clock=clock) as gateway:
                response = gateway.post({"model": "m", "input": f"in use {changed}"})
                assert response.status_code == 200
                clock.woken += 1  # the next round checks it, since it has been used
                fake.wait_until(lambda: len(fake.calls) >= 2, 10)
                if changed:
                    assert "cosine" in until_out(gateway, "up0")[MODEL]
                    refused = gateway.post({"model": "m", "input": "new"})
                    assert refused.status_code == 503
                    fake.changed = False
                    clock.passed += CHECK_INTERVAL
                    clock.woken += 1
                    while gateway.post({"model": "m", "input": "back"}).status_code != 200:
                        pass


def test_a_deployment_that_does_not_answer_is_not_judged() -> None:
    with FakeOpenAI(api_key="sk-fake") as right, FakeOpenAI(api_key="sk-other") as refusing:
        with running(config(right, refusing)) as gateway:
            right.wait_for_calls(1)
            assert gateway.post({"model": "m", "input": "x"}).status_code == 200
            assert "out" not in gateway.get("/readyz").json()["upstreams"]["up1"]


def test_why_one_has_not_shown_its_vectors_is_told_until_it_has(caplog: pytest.LogCaptureFixture) -> None:
    clock = RoundClock()
    with FakeOpenAI(api_key="sk-fake") as right, FakeOpenAI(api_key="sk-fake") as refusing:
        refusing.fail(faults.http_error(401, b'{"error":{"message":"no such key"}}'), times=None)
        with running(config(right, refusing), clock=clock) as gateway:

            def trouble() -> str:
                return str(gateway.get("/readyz").json()["upstreams"]["up1"].get("trouble"))

            refusing.wait_until(lambda: "upstream_auth" in trouble(), 10)
            assert "no such key" in trouble()
            assert "no such key" in caplog.text
            refusing.heal()
            until_looked(clock, lambda: trouble() == "None")


def test_one_that_was_away_when_it_was_looked_at_answers_nobody_before_it_is_judged() -> None:
    with FakeOpenAI(api_key="sk-fake") as right, OtherModel(api_key="sk-fake") as wrong:
        wrong.fail(faults.vendor_error("unavailable"), times=None)
        clock = RoundClock()
        with running(config(right, wrong), clock=clock) as gateway:
            wrong.wait_for_calls(1)
            right.wait_for_calls(1)
            wrong.heal()
            for i in range(12):
                response = gateway.post({"model": "m", "input": f"text {i}"})
                assert response.headers["x-embedding-upstream"] == f"up0/{MODEL}"
            clock.woken += 1
            assert "cosine" in until_out(gateway, "up1")[MODEL]
            assert [c.texts[0] for c in right.calls].count(canary.TEXT) == 1, [c.texts for c in right.calls]


@pytest.mark.parametrize("name", ["m", MODEL])
def test_before_the_first_look_all_is_asked_of_the_first_one_only(name: str) -> None:
    """`m` is checked at once, which takes until both have answered; the upstream's own name once it is requested."""
    with FakeOpenAI(api_key="sk-fake") as right, OtherModel(api_key="sk-fake") as wrong:
        wrong.fail(faults.hang, times=1)
        with running(config(right, wrong), clock=RoundClock()) as gateway:
            for i in range(12):
                response = gateway.post({"model": name, "input": f"text {i}"})
                assert response.headers["x-embedding-upstream"] == f"up0/{MODEL}"


def test_a_model_has_one_right_vector_under_whatever_names_its_deployments_stand() -> None:
    with OtherModel(api_key="sk-fake") as first, FakeOpenAI(api_key="sk-fake") as second:
        prefers = [{"upstream": "up1", "model": MODEL}, {"upstream": "up0", "model": MODEL}]
        clock = RoundClock()
        with running({**config(first, second), "models": {"m": {"deployments": prefers}}}, clock=clock) as gateway:
            assert "cosine" in until_out(gateway, "up0")[MODEL]
            assert gateway.post({"model": MODEL, "input": "in use"}).status_code == 200
            asked = len(first.calls)
            clock.woken += 1  # the upstream's own name is in use now; in its order, the other deployment would be right
            first.wait_for_calls(asked + 1)
            second.wait_until(lambda: [call.texts for call in second.calls].count([canary.TEXT]) == 2, 10)
            for name in ("m", MODEL):
                for i in range(5):
                    response = gateway.post({"model": name, "input": f"{name} {i}"})
                    assert response.headers["x-embedding-upstream"] == f"up1/{MODEL}"


def test_a_new_sibling_is_held_to_the_one_that_serves_even_where_it_is_named_first() -> None:
    with OtherModel(api_key="sk-fake") as new, FakeOpenAI(api_key="sk-fake") as serves:
        both = config(new, serves)
        alone = config(new, serves)
        del alone["models"]["m"]["deployments"][0]
        clock = RoundClock()
        with running(alone, clock=clock) as gateway:
            assert gateway.post({"model": "m", "input": "in use"}).status_code == 200
            gateway.call(gateway.app._change_to(settings_of(both)))
            assert "cosine" in until_out(gateway, "up0")[MODEL]
            for i in range(5):
                response = gateway.post({"model": "m", "input": f"text {i}"})
                assert response.headers["x-embedding-upstream"] == f"up1/{MODEL}"


def test_one_that_has_left_does_not_come_back_by_a_change_of_configuration() -> None:
    with OtherModel(api_key="sk-fake") as drifts, FakeOpenAI(api_key="sk-fake") as stays:
        drifts.changed = False
        clock = RoundClock()
        with running(config(drifts, stays), clock=clock) as gateway:
            stays.wait_for_calls(1)
            drifts.wait_for_calls(1)
            drifts.changed = True
            clock.passed += CHECK_INTERVAL
            until_looked(clock, lambda: len(drifts.calls) == 2)
            assert "cosine" in until_out(gateway, "up0")[MODEL]
            heavier = config(drifts, stays)
            heavier["models"]["m"]["deployments"][1]["weight"] = 2
            gateway.call(gateway.app._change_to(settings_of(heavier)))  # other weights make another canary
            drifts.wait_for_calls(3)
            stays.wait_for_calls(3)
            for i in range(5):
                response = gateway.post({"model": "m", "input": f"text {i}"})
                assert response.headers["x-embedding-upstream"] == f"up1/{MODEL}"


def test_one_whose_vectors_have_another_length_is_passed_over_at_once_and_soon_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    known, lengths = [f"known {i}" for i in range(20)], {"own": 16}
    with (
        FakeOpenAI(models={"own": 16}, flavour="vllm", api_key="sk-fake") as stays,
        FakeOpenAI(models=lengths, flavour="vllm", api_key="sk-fake") as replaced,
    ):
        deployments = [{"upstream": f"up{i}", "model": "own", "space": "s"} for i in range(2)]
        both, clock = config(stays, replaced, models={"m": {"deployments": deployments}}), RoundClock()
        del both["cache"]
        with running(both, clock=clock) as gateway:
            stays.wait_for_calls(1)
            replaced.wait_for_calls(1)
            until_answered_by(gateway, "up1/own")
            until_answered_by(gateway, "up0/own")
            assert gateway.post({"model": "m", "input": known}).status_code == 200
            lengths["own"] = 8
            until_answered_by(gateway, "up1/own")
            for i in range(20):
                response = gateway.post({"model": "m", "input": [*known, f"new {i}"]})
                assert response.headers["x-embedding-upstream"] == "up0/own"
                assert {len(row["embedding"]) for row in response.json()["data"]} == {16}
            assert "8 dimensions, not 16" in gateway.get("/readyz").json()["upstreams"]["up1"]["trouble"]["own"]
            assert caplog.text.count("8 dimensions, not 16") == 1
            clock.woken += 1
            assert "cosine" in until_out(gateway, "up1")["own"]


def test_the_length_that_is_compared_with_outlives_a_change_of_configuration(caplog: pytest.LogCaptureFixture) -> None:
    lengths = {"own": 16}
    with FakeOpenAI(models=lengths, flavour="vllm", api_key="sk-fake") as fake:
        before = config(fake, models={"m": {"deployments": [{"upstream": "up0", "model": "own"}]}})
        after = {**before, "upstreams": {"up0": {**before["upstreams"]["up0"], "timeout": "29s"}}}
        with running(before, clock=RoundClock()) as gateway:
            assert gateway.post({"model": "m", "input": "before"}).status_code == 200
            gateway.call(gateway.app._change_to(settings_of(after)))
            lengths["own"] = 8
            assert gateway.post({"model": "m", "input": "after"}).status_code == 200
            assert "8 dimensions, not 16" in caplog.text
            assert gateway.post({"model": "m", "input": "of the new length"}).status_code == 200
            assert gateway.metric("upstream_length_changes_total", upstream="up0", model="own") == 1
            lengths["own"] = 16
            assert gateway.post({"model": "m", "input": "of the old length"}).status_code == 200
            assert gateway.metric("upstream_length_changes_total", upstream="up0", model="own") == 2


def until_answered_by(gateway: Running, name: str) -> None:
    for i in range(200):
        response = gateway.post({"model": "m", "input": f"by {name}: {time.monotonic()} {i}"})
        assert response.status_code == 200, response.text
        if response.headers["x-embedding-upstream"] == name:
            return
    pytest.fail("it was not asked")


def until_looked(clock: RoundClock, done: Callable[[], bool]) -> None:
    for _ in range(2000):
        if done():
            return
        clock.woken += 1
        time.sleep(0.005)
    pytest.fail("nobody looked")


@pytest.mark.parametrize("other", [FakeOpenAI, OtherModel])
@pytest.mark.parametrize("name", ["m", MODEL])
def test_one_that_has_shown_nothing_serves_once_it_has_however_the_others_fare(
    name: str, other: type[FakeOpenAI]
) -> None:
    clock = RoundClock()
    with FakeOpenAI(api_key="sk-fake") as failing, other(api_key="sk-fake") as late:
        late.fail(faults.vendor_error("unavailable"), times=None)
        with running(config(failing, late), clock=clock) as gateway:
            assert gateway.post({"model": name, "input": "in use"}).status_code == 200
            until_looked(clock, lambda: bool(failing.calls) and bool(late.calls))
            late.heal()
            failing.fail(faults.vendor_error("unavailable"), times=None)
            served = [gateway.post({"model": name, "input": f"text {i}"}) for i in range(12)]
            assert {each.status_code for each in served} <= {502, 503}
            assert gateway.metric("upstream_available", upstream="up1", model=MODEL) == 0
            assert gateway.get("/readyz").json()["upstreams"]["up1"]["trouble"][MODEL]
            asked = len(late.calls)
            until_looked(clock, lambda: len(late.calls) > asked)
            if other is OtherModel:
                assert "cosine" in until_out(gateway, "up1")[MODEL]
            available = other is FakeOpenAI
            settled(gateway, lambda: gateway.metric("upstream_available", upstream="up1", model=MODEL) == available)
            response = gateway.post({"model": name, "input": "served"})
            assert gateway.metric("upstream_available", upstream="up1", model=MODEL) == (other is FakeOpenAI)
            assert (response.status_code == 200) == (other is FakeOpenAI)
            assert response.headers.get("x-embedding-upstream") == (f"up1/{MODEL}" if other is FakeOpenAI else None)


def test_where_the_first_is_away_from_the_start_the_next_one_serves_once_it_is_asked_for() -> None:
    clock = RoundClock()
    with FakeOpenAI(api_key="sk-fake") as away, FakeOpenAI(api_key="sk-fake") as there:
        with running(config(away, there), clock=clock) as gateway:
            away.fail(faults.vendor_error("unavailable"), times=None)
            gateway.post({"model": MODEL, "input": "in use"})
            until_looked(clock, lambda: gateway.post({"model": MODEL, "input": "served"}).status_code == 200)


async def test_a_look_that_fails_for_a_bug_of_ours_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    looked: list[str] = []

    class Looks:
        waits, upstream, last_timeout = False, "up", 0.0

        def __init__(self, name: str) -> None:
            self._name = name

        def due(self, now: float) -> bool:
            return now > 0

        async def check(self, now: float, _mute: set[str]) -> None:
            looked.append(f"{self._name} at {now:.0f}")
            if self._name == "bad":
                raise ZeroDivisionError

    clock = HandClock()
    canaries = [cast("canary.Canary", Looks(name)) for name in ("bad", "good")]
    watching = asyncio.create_task(canary.watch(lambda: canaries, clock))
    await settle()
    await clock.advance(canary.ROUND)
    watching.cancel()
    assert looked == ["bad at 1000", "good at 1000", "bad at 1010", "good at 1010"]
    assert "ZeroDivisionError" in caplog.text


async def test_one_that_has_never_answered_is_looked_at_again_soon(clock: HandClock) -> None:
    up = False

    async def embed(batch: Batch) -> BatchResult:
        if not up:
            return await refuses(batch)
        return await answers(batch)

    def deployment(name: str) -> Deployment:
        return Deployment(name, Model("m"), "space", Slots(1), CallLimits(1), healthy(clock, name), embed)

    both = [deployment("one"), deployment("other")]
    canaries = [canary.Canary(both, ReferenceVectors(None), from_start=True)]
    watching = asyncio.create_task(canary.watch(lambda: canaries, clock))
    await settle()
    assert all(each.standing.unverified for each in both)
    up = True
    await clock.advance(canary.ROUND)
    assert not any(each.standing.unverified for each in both)
    watching.cancel()


@pytest.mark.parametrize("kept_from_it", ["unproved", "out"])
async def test_who_queues_is_told_of_one_that_may_be_asked_now(clock: HandClock, kept_from_it: str) -> None:
    ends = asyncio.Event()

    async def takes_long(batch: Batch) -> BatchResult:
        if batch.inputs != [canary.TEXT]:
            await ends.wait()
        return await answers(batch)

    metrics = Metrics()
    busy, other = (
        Deployment(name, Model("m"), "space", Slots(1), CallLimits(1), healthy(clock, name), embed, priority=priority)
        for name, embed, priority in (("busy", takes_long, 1), ("other", answers, 2))
    )
    if kept_from_it == "unproved":
        other.standing.unverified = True
    else:
        other.standing.take_out("its vectors are not those of space")
    embed = Batcher(Route([busy, other], metrics, clock), metrics, clock)
    deadline = asyncio.get_running_loop().time() + 30
    asking = []
    for text in ("under way", "queues"):
        asking.append(asyncio.create_task(embed(EmbedRequest("m", [text], Params(), deadline, keys=[text.encode()]))))
        await settle()
    await canary.Canary([busy, other], ReferenceVectors(None), from_start=True).check(clock.monotonic(), set())
    await settle()
    assert [task.done() for task in asking] == [False, True]
    assert (await asking[1]).deployments == ("other/m",)
    ends.set()
    await asking[0]


async def test_one_that_hangs_holds_up_no_look_at_another_models(clock: HandClock) -> None:
    def deployment(name: str, embed: BatchEmbedder) -> Deployment:
        return Deployment(name, Model("m"), "space", Slots(1), CallLimits(1), healthy(clock, name), embed)

    back = deployment("back", answers)
    back.standing.unverified = True
    canaries = [
        canary.Canary(
            [deployment("hangs", hangs), deployment("well", answers)], ReferenceVectors(None), from_start=True
        ),
        canary.Canary([deployment("other", answers), back], ReferenceVectors(None), from_start=True),
    ]
    watching = asyncio.create_task(canary.watch(lambda: canaries, clock))
    await settle()
    assert not back.standing.unverified
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert canaries[0].due(clock.monotonic()), "cut short with the watch, and so to be made again"


async def test_one_that_hangs_is_waited_for_once_a_round_by_those_whose_space_is_known(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "PATIENCE", 0.05)
    asked: list[str] = []

    async def counts_and_hangs(batch: Batch) -> BatchResult:
        asked.append(batch.model)
        return await hangs(batch)

    def deployment(upstream: str, model: str, embed: BatchEmbedder) -> Deployment:
        return Deployment(upstream, Model(model), model, Slots(9), CallLimits(1), healthy(clock, upstream), embed)

    expected, models = ReferenceVectors(None), "abc"
    for each in models:
        await expected.of(each, np.ones(4, "<f4").tobytes())
    pairs = [(deployment("well", each, answers), deployment("hangs", each, counts_and_hangs)) for each in models]
    for well, mute in pairs:
        well.standing.unverified = mute.standing.unverified = True
    canaries = [canary.Canary(pair, expected, from_start=True) for pair in pairs]
    watching = asyncio.create_task(canary.watch(lambda: canaries, clock))
    while pairs[-1][0].standing.unverified:
        await asyncio.sleep(0)
    assert asked == ["a"]
    assert [(well.standing.unverified, bool(mute.standing.silent)) for well, mute in pairs] == [(False, True)] * 3
    await clock.advance(canary.ROUND)
    assert asked == ["a", "b"]
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


@pytest.mark.parametrize("answered", [False, True])
async def test_one_that_let_another_look_wait_is_not_waited_for_as_long_though_it_is_named_first(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    """Unless callers have had its vectors, even if only during the check: then these are the reference."""
    monkeypatch.setattr(canary, "PATIENCE", 0.05)

    async def others(batch: Batch) -> BatchResult:
        first.health.answered = answered
        return await answers(batch)

    (first, second), looks = several(clock, late, others)
    second.standing.unverified = True
    await looks.check(clock.monotonic(), {first.upstream})
    assert first.standing.compared == answered
    assert bool(first.standing.silent) == (not answered)
    assert second.standing.compared
    assert looks.due(clock.monotonic()) == (not answered)


async def test_one_that_hangs_is_asked_in_the_next_round_by_those_who_wait_for_another(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise they would be last again, behind the checks in which it hangs."""
    monkeypatch.setattr(canary, "PATIENCE", 0.01)
    expected = ReferenceVectors(None)
    await expected.of("space", np.ones(4, "<f4").tobytes())
    _, before = several(clock, hangs, answers, expected=expected)
    (first, *_), looks = several(clock, answers, hangs, answers, expected=expected)
    first.standing.unverified = True
    await asyncio.wait_for(canary._check_in_turn([before, looks], clock), 5)
    assert first.standing.unverified
    clock.now += canary.ROUND
    round_two = asyncio.create_task(canary._check_in_turn([before, looks], clock))
    async with asyncio.timeout(5):
        while not first.standing.compared:
            await asyncio.sleep(0)
    round_two.cancel()
    await asyncio.gather(round_two, return_exceptions=True)


async def test_one_that_hangs_for_one_model_is_asked_for_the_others_in_the_next_round(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile it keeps its traffic for the models that have been compared."""
    monkeypatch.setattr(canary, "PATIENCE", 0.05)

    async def hangs_for_one(batch: Batch) -> BatchResult:
        return await (hangs if batch.model == "a" else answers)(batch)

    def deployment(upstream: str, model: str, embed: BatchEmbedder) -> Deployment:
        return Deployment(upstream, Model(model), model, Slots(9), CallLimits(1), healthy(clock, upstream), embed)

    expected, models = ReferenceVectors(None), "abcd"
    for each in models:
        await expected.of(each, np.ones(4, "<f4").tobytes())
    pairs = [(deployment("well", each, answers), deployment("half", each, hangs_for_one)) for each in models]
    halves = [half.standing for _, half in pairs]
    halves[0].unverified = halves[1].unverified = True
    halves[3].compared = True
    canaries = [canary.Canary(pair, expected, from_start=True) for pair in pairs]
    watching = asyncio.create_task(canary.watch(lambda: canaries, clock))
    while not pairs[-1][0].standing.compared:
        await asyncio.sleep(0)
    assert [each.unverified for each in halves] == [True, True, True, False]
    await clock.advance(canary.ROUND)
    await settle()
    assert [each.unverified for each in halves] == [True, False, False, False]
    assert halves[2].compared
    assert halves[3].shown
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_an_upstreams_models_are_looked_at_one_after_another(clock: HandClock) -> None:
    """Each model may have to be loaded first."""
    at_once = most = 0

    async def loads(batch: Batch) -> BatchResult:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1
        return await answers(batch)

    def deployment(name: str) -> Deployment:
        return Deployment("up", Model(name), "space", Slots(1), CallLimits(1), healthy(clock, name), loads)

    canaries = [canary.Canary([deployment(name)], ReferenceVectors(None), from_start=True) for name in "abcd"]
    watching = asyncio.create_task(canary.watch(lambda: canaries, clock))
    await settle()
    assert not any(each.due(clock.monotonic()) for each in canaries)
    assert most == 1
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_what_a_space_gives_is_kept_for_as_long_as_the_cache_has_vectors_of_it(tmp_path: Path) -> None:
    clock, ttl = HandClock(), 30 * 86400.0
    before, after = (np.eye(2, dtype="<f4")[i].tobytes() for i in (0, 1))

    def tiers() -> Tiers:
        metrics = Metrics()
        return Tiers([DiskStore(str(tmp_path / "cache.sqlite3"), 2**20, ttl, clock, metrics)], metrics, clock)

    cache = tiers()
    expected = ReferenceVectors(cache)
    for _ in range(3):
        assert await expected.of("space", before) == before
        clock.now += ttl / 2
    await cache.close()
    cache = tiers()  # after a restart the model is another
    assert await ReferenceVectors(cache).of("space", after) == before
    await cache.close()


async def test_a_cache_that_does_not_answer_is_asked_again_before_anything_is_taken_for_right() -> None:
    before, after = (np.eye(2, dtype="<f4")[i].tobytes() for i in (0, 1))
    clock = SystemClock()
    with RedisServer() as server:
        for now, pause in ((before, False), (after, True)):
            metrics = Metrics()
            cache = Tiers([RedisStore(server.url, 0.2, 60, clock, metrics)], metrics, clock)
            await cache.open()
            expected = ReferenceVectors(cache)
            if pause:
                server.pause()
            assert await expected.of("space", now) == now, "for this once"
            if pause:
                assert not expected.knows("space")
                assert not expected.readable
                server.resume()
                while await expected.of("space", now) != before:  # until Redis is tried again
                    await asyncio.sleep(0.05)
            assert expected.knows("space")
            await cache.close()


class Away(ReferenceVectors):
    """Reference vectors in a cache that does not answer until `up` is set."""

    up = False

    @property
    def readable(self) -> bool:
        return self.up


async def test_who_could_not_be_compared_is_looked_at_again_once_the_cache_can_be_read(clock: HandClock) -> None:
    expected = Away(None)
    deployment = Deployment("up", Model("m"), "space", Slots(1), CallLimits(1), healthy(clock, "up"), answers)
    looks = canary.Canary([deployment], expected, from_start=True)
    await looks.check(clock.monotonic(), set())
    assert not looks.due(clock.monotonic()), "each look is paid for"
    expected.up = True
    assert looks.due(clock.monotonic())
    await looks.check(clock.monotonic(), set())
    assert not looks.due(clock.monotonic())


def several(
    clock: HandClock, *embedders: BatchEmbedder, expected: ReferenceVectors | None = None
) -> tuple[list[Deployment], canary.Canary]:
    found = [
        Deployment(f"up{i}", Model("m"), "space", Slots(1), CallLimits(1), healthy(clock, f"up{i}"), embed)
        for i, embed in enumerate(embedders)
    ]
    return found, canary.Canary(found, expected or ReferenceVectors(None), from_start=True)


async def test_one_that_left_is_not_compared_with_itself_while_the_cache_cannot_be_read(clock: HandClock) -> None:
    """As it might be under the name for which it is the only deployment."""
    expected = Away(None)
    found, looks = several(clock, answers, answers_otherwise, expected=expected)
    await looks.check(clock.monotonic(), set())
    assert found[1].standing.out is not None
    alone = canary.Canary(found[1:], expected, from_start=False)
    for expected.up in (False, True):
        await alone.check(clock.monotonic(), set())
        assert found[1].standing.out is not None


async def test_while_the_cache_cannot_be_read_one_that_was_away_is_compared_without_the_one_that_serves(
    clock: HandClock,
) -> None:
    """The one that serves was compared when the other last was, so it is not asked again."""
    expected = Away(None)
    (first, second), looks = several(clock, answers, answers, expected=expected)
    await looks.check(clock.monotonic(), set())
    first.health.end(None, first.health.begin())
    for _ in range(FAILURES):
        second.health.end(UpstreamUnreachable("no"), second.health.begin())
    second.standing.mark_unverified("away")
    await looks.check(clock.monotonic(), set())
    assert not second.standing.unverified


async def test_one_that_hangs_keeps_nobody_else_from_being_compared(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "FIRST_CHECK_TIMEOUT", 0.05)
    monkeypatch.setattr(canary, "PATIENCE", 0.05)
    (first, second), looks = several(clock, hangs, answers)
    second.standing.unverified = True
    await asyncio.wait_for(looks.check(clock.monotonic(), set()), 5)
    assert (first.standing.unverified, second.standing.unverified) == (True, False)
    assert first.health.problem
    assert looks.due(clock.monotonic()), "the one that hangs is asked again"


async def test_one_that_answers_late_is_waited_for_where_nobody_else_does(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "FIRST_CHECK_TIMEOUT", 0.01)

    (first, second), looks = several(clock, refuses, late)
    await asyncio.wait_for(looks.check(clock.monotonic(), set()), 5)
    assert (first.standing.compared, second.standing.compared) == (False, True)


async def test_and_where_nobody_has_answered_in_time_whoever_does_first_is(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "FIRST_CHECK_TIMEOUT", 0.01)
    monkeypatch.setattr(canary, "PATIENCE", 0.01)

    (first, second), looks = several(clock, hangs, late)
    await asyncio.wait_for(looks.check(clock.monotonic(), set()), 5)
    assert (first.standing.compared, second.standing.compared) == (False, True)


async def test_whoever_counts_where_the_first_has_failed_is_not_kept_waiting_by_those_behind_it(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "PATIENCE", 0.05)
    (first, second, third), looks = several(clock, refuses, answers, hangs)
    second.standing.unverified = third.standing.unverified = True
    await asyncio.wait_for(looks.check(clock.monotonic(), set()), canary.FIRST_CHECK_TIMEOUT / 2)
    assert [each.standing.unverified for each in (first, second, third)] == [True, False, True]


async def test_whoever_has_answered_callers_counts_though_it_stands_behind_another_one_and_the_first_has_failed(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "PATIENCE", 0.05)
    (_, second, third), looks = several(clock, refuses, answers_otherwise, late)
    third.health.answered = True
    await looks.check(clock.monotonic(), set())
    assert (third.standing.compared, third.standing.out, bool(second.standing.out)) == (True, None, True)


@pytest.mark.parametrize("known", [False, True])
async def test_nobody_who_loads_its_model_is_hung_up_on_for_one_that_was_ejected(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """It may answer this text but no caller's, while the other would start loading again each time."""
    monkeypatch.setattr(canary, "PATIENCE", 0.05)
    expected = ReferenceVectors(None)
    if known:
        await expected.of("space", np.ones(4, "<f4").tobytes())
    (ejected, loads), looks = several(clock, answers, late, expected=expected)
    for _ in range(FAILURES):
        ejected.health.end(UpstreamUnreachable("no"), ejected.health.begin())
    await looks.check(clock.monotonic(), set())
    assert loads.standing.compared


async def test_who_comes_behind_the_first_one_has_time_to_load_its_model_too(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "PATIENCE", 0.05)
    (_, loads), looks = several(clock, answers, late)
    await looks.check(clock.monotonic(), set())
    assert loads.standing.compared


async def test_where_nothing_is_known_the_first_one_is_right_though_it_is_slow(clock: HandClock) -> None:
    async def slow(batch: Batch) -> BatchResult:
        await asyncio.sleep(0.2)  # slowness is the subject
        return BatchResult([Embedding(np.array([1, -1, 1, -1], "<f4").tobytes(), 1)] * len(batch.inputs))

    (first, second), looks = several(clock, slow, answers)
    await asyncio.wait_for(looks.check(clock.monotonic(), set()), 5)
    assert (first.standing.out, bool(second.standing.out)) == (None, True)


async def test_an_upstream_that_hangs_holds_up_no_look_at_another(clock: HandClock) -> None:
    looked: list[str] = []

    class Looks:
        last_timeout = 0.0

        def __init__(self, upstream: str) -> None:
            self.upstream = upstream

        def due(self, now: float) -> bool:
            return now > 0

        async def check(self, now: float, _mute: set[str]) -> None:
            looked.append(f"{self.upstream} at {now:.0f}")
            if self.upstream == "hangs":
                await asyncio.Event().wait()

    watching = asyncio.create_task(
        canary.watch(lambda: [cast("canary.Canary", Looks(name)) for name in ("hangs", "well")], clock)
    )
    await settle()
    await clock.advance(canary.ROUND)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert looked == ["hangs at 1000", "well at 1000", "well at 1010"]


async def test_one_that_was_ejected_takes_no_traffic_before_it_has_been_compared_again(clock: HandClock) -> None:
    up = True

    async def changes(batch: Batch) -> BatchResult:
        if not up:
            return await refuses(batch)
        return BatchResult([Embedding(np.array([1, -1, 1, -1], "<f4").tobytes(), 1)] * len(batch.inputs))

    (stays, restarts), looks = several(clock, answers, answers)
    await looks.check(clock.monotonic(), set())
    restarts.embed, up = changes, False
    for _ in range(FAILURES):
        restarts.health.end(UpstreamUnreachable("no connection"), restarts.health.begin())
    assert looks.due(clock.monotonic())
    await looks.check(clock.monotonic(), set())
    assert (stays.standing.unverified, restarts.standing.unverified) == (False, True)
    up = True
    clock.now += 2 * EJECTION
    await looks.check(clock.monotonic(), set())
    assert restarts.standing.out, "it has another model now"


async def test_one_whose_last_look_brought_no_answer_is_looked_at_again_soon(clock: HandClock) -> None:
    (first, _), looks = several(clock, answers, answers)
    await looks.check(clock.monotonic(), set())
    first.embed = limited
    clock.now += CHECK_INTERVAL
    await looks.check(clock.monotonic(), set())
    clock.now += RECHECK_INTERVAL
    assert looks._due_deployments(clock.monotonic()) == [first]


async def test_one_that_is_out_is_looked_at_again_soon(clock: HandClock) -> None:
    """Its model may have been corrected, and no request goes there to find out."""
    (_, second), looks = several(clock, answers, answers)
    await looks.check(clock.monotonic(), set())
    second.standing.take_out("its vectors were not those of the space")
    clock.now += RECHECK_INTERVAL
    assert looks._due_deployments(clock.monotonic()) == [second]
    await looks.check(clock.monotonic(), set())
    assert second.standing.out is None


async def test_one_that_is_back_is_looked_at_often_for_a_while(clock: HandClock) -> None:
    """Two models may alternate behind its address: after each right vector it would serve for hours."""
    (_, turns), looks = several(clock, answers, answers)

    async def passes(seconds: float, embed: BatchEmbedder) -> str | None:
        turns.embed = embed
        clock.now += seconds
        await looks.check(clock.monotonic(), set())
        return turns.standing.out

    assert await passes(0, answers_otherwise)
    assert not await passes(RECHECK_INTERVAL, answers)
    assert await passes(RECHECK_INTERVAL, answers_otherwise)
    assert not await passes(RECHECK_INTERVAL, answers)
    assert not await passes(CHECK_INTERVAL, answers)
    assert not await passes(RECHECK_INTERVAL, answers_otherwise), "it is not asked any more"
    assert await passes(CHECK_INTERVAL, answers_otherwise)


async def test_one_that_stands_in_for_nobody_is_not_asked_every_round_while_it_is_down(clock: HandClock) -> None:
    (alone,), looks = several(clock, answers)
    await looks.check(clock.monotonic(), set())
    for _ in range(FAILURES):
        alone.health.end(UpstreamTimeout("no answer"), alone.health.begin())
    clock.now += canary.ROUND
    assert not looks.due(clock.monotonic())


async def test_one_that_was_away_for_a_moment_is_compared_again(clock: HandClock) -> None:
    (first, _), looks = several(clock, answers, answers)
    await looks.check(clock.monotonic(), set())
    clock.now += RECHECK_INTERVAL
    assert not looks.due(clock.monotonic())
    first.health.end(UpstreamUnreachable("no connection"), first.health.begin())
    assert looks.due(clock.monotonic())


async def test_and_so_is_one_whose_vectors_have_another_length_than_before(clock: HandClock) -> None:
    length, sparse = 16, False

    async def embed(batch: Batch) -> BatchResult:
        vector = np.ones(batch.params.dimensions or length, "<f4").tobytes()
        return BatchResult([Embedding(b"" if sparse else vector, 1)])

    (alone,), looks = several(clock, embed)
    route = Route([alone], Metrics(), SystemClock())

    async def is_due_after_a_call(params: Params) -> bool:
        slot = route.rotation.take("query", params)
        assert slot is not None
        until = asyncio.get_running_loop().time() + 10
        await route.run(Batch("m", ["a"], [b"a"], params, store=True, deadline=until), slot, "query")
        return looks.due(clock.monotonic())

    await looks.check(clock.monotonic(), set())
    clock.now += RECHECK_INTERVAL
    assert not await is_due_after_a_call(Params())
    assert not await is_due_after_a_call(Params(dimensions=4)), "its caller chose the length"
    sparse = True
    assert not await is_due_after_a_call(Params()), "there is no dense vector to compare"
    length, sparse = 8, False
    assert await is_due_after_a_call(Params())
    await looks.check(clock.monotonic(), set())
    length = 16  # the right length
    clock.now += RECHECK_INTERVAL
    await looks.check(clock.monotonic(), set())
    clock.now += CHECK_INTERVAL
    await looks.check(clock.monotonic(), set())
    clock.now += RECHECK_INTERVAL
    assert not await is_due_after_a_call(Params()), "it was compared with this length"


async def test_and_so_is_one_that_was_away_after_it_had_answered_and_before_the_others_had(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "FIRST_CHECK_TIMEOUT", 0.05)
    monkeypatch.setattr(canary, "PATIENCE", 0.05)
    (first, _), looks = several(clock, answers, hangs)
    looking = asyncio.create_task(looks.check(clock.monotonic(), set()))
    await settle()
    first.health.end(UpstreamUnreachable("no connection"), first.health.begin())
    await asyncio.wait_for(looking, 5)
    clock.now += RECHECK_INTERVAL
    assert first in looks._due_deployments(clock.monotonic())


async def test_one_that_has_answered_in_a_look_that_is_cut_short_has_not_been_compared(clock: HandClock) -> None:
    """A change of configuration cancels the check while it waits for the others."""
    (first, second), looks = several(clock, answers, answers)
    await looks.check(clock.monotonic(), set())
    second.embed = hangs
    for each in (first, second):
        each.health.end(UpstreamUnreachable("no connection"), each.health.begin())
    clock.now += RECHECK_INTERVAL
    looking = asyncio.create_task(looks.check(clock.monotonic(), set()))
    await settle()
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    assert first in looks._due_deployments(clock.monotonic())


async def test_one_that_was_compared_and_serves_is_not_put_out_for_a_look_that_brings_nothing(clock: HandClock) -> None:
    """The check is another canary's, after a change of configuration."""
    (first, second), looks = several(clock, answers, answers)
    await looks.check(clock.monotonic(), set())

    first.embed = limited
    await canary.Canary([first, second], ReferenceVectors(None), from_start=True).check(clock.monotonic(), set())
    assert not first.standing.unverified


async def test_one_that_was_ejected_for_the_first_time_may_have_a_call_once_it_has_shown_its_vectors(
    clock: HandClock,
) -> None:
    (_, restarts), looks = several(clock, answers, answers)
    for ejection in (1, 2):
        for _ in range(FAILURES):
            restarts.health.end(UpstreamTimeout("no answer"), restarts.health.begin())
        assert restarts.health.ejected
        assert not restarts.health.available()
        await looks.check(clock.monotonic(), set())
        assert restarts.health.available() is (ejection == 1)


async def test_a_look_that_is_not_due_any_more_once_its_turn_comes_asks_nobody(clock: HandClock) -> None:
    (_, restarts), looks = several(clock, answers, answers)
    await looks.check(clock.monotonic(), set())
    for _ in range(FAILURES):
        restarts.health.end(UpstreamTimeout("no answer"), restarts.health.begin())
    assert looks.due(clock.monotonic())
    clock.now += EJECTION
    restarts.health.end(None, restarts.health.begin())  # it answers a caller first
    await looks.check(clock.monotonic(), set())
    assert not looks.due(clock.monotonic())


async def test_what_nobody_has_asked_for_is_not_looked_at(clock: HandClock) -> None:
    idle, sibling = (
        Deployment(name, Model("m"), "space", Slots(1), CallLimits(1), healthy(clock, name), answers) for name in "ab"
    )
    sibling.standing.unverified = True
    looks = canary.Canary([idle, sibling], ReferenceVectors(None), from_start=False)
    assert not looks.due(clock.monotonic())
    idle.health.begin()
    assert looks.due(clock.monotonic()), "whatever the answer was"


async def test_a_look_that_is_cut_short_is_made_again(clock: HandClock) -> None:
    deployment = Deployment("up", Model("m"), "space", Slots(1), CallLimits(1), healthy(clock, "up"), hangs)
    looks = canary.Canary([deployment], ReferenceVectors(None), from_start=True)
    for _ in range(2):
        assert looks.due(clock.monotonic())
        looking = asyncio.create_task(looks.check(clock.monotonic(), set()))
        await settle()
        assert not looks.due(clock.monotonic()), "one look at a time"
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


def listed_twice(*fakes: FakeOpenAI) -> dict[str, Any]:
    """No configuration names the model, so the second one is not used before it has been compared."""
    return {**config(*fakes), "models": {}}


def test_one_that_was_never_compared_serves_soon_after_the_first_one_fails() -> None:
    """No further round is made: what is checked is checked for the callers' sake."""
    with FakeOpenAI(api_key="sk-fake") as first, FakeOpenAI(api_key="sk-fake") as second:
        first.fail(faults.vendor_error("internal"), times=None)
        with running(listed_twice(first, second), clock=RoundClock()) as gateway:
            until = time.monotonic() + 10
            while (response := gateway.post({"model": MODEL, "input": "x"})).status_code != 200:
                assert time.monotonic() < until, response.text
            assert response.headers["x-embedding-upstream"] == f"up1/{MODEL}"


def test_another_model_is_found_at_first_use_and_does_not_stand_in_for_the_one_that_fails() -> None:
    with FakeOpenAI(api_key="sk-fake") as right, OtherModel(api_key="sk-fake") as wrong:
        with running(listed_twice(right, wrong), clock=RoundClock()) as gateway:
            assert gateway.post({"model": MODEL, "input": "in use"}).status_code == 200
            assert "cosine" in until_out(gateway, "up1")[MODEL]
            right.fail(faults.vendor_error("internal"), times=None)
            for i in range(2 * FAILURES):
                assert gateway.post({"model": MODEL, "input": f"text {i}"}).status_code in (502, 503)
            assert [call.texts for call in wrong.calls] == [[canary.TEXT]]


@pytest.mark.parametrize("times", [1, 2])
def test_one_that_is_too_busy_to_be_compared_is_not_replaced_by_another_model(times: int) -> None:
    """Its caller has its vector. It is busy at first use, or in the next round too."""
    clock = RoundClock()
    with FakeOpenAI(api_key="sk-fake") as right, OtherModel(api_key="sk-fake") as wrong:
        right.fail(faults.vendor_error("rate_limit"), times, when=lambda texts: texts == [canary.TEXT])
        with running(listed_twice(right, wrong), clock=clock) as gateway:
            assert gateway.post({"model": MODEL, "input": "in use"}).headers["x-embedding-upstream"] == f"up0/{MODEL}"

            def found() -> bool:
                clock.passed += RECHECK_INTERVAL
                return "out" in str(gateway.get("/readyz").json()["upstreams"])

            until_looked(clock, found)
            assert "out" in gateway.get("/readyz").json()["upstreams"]["up1"]
            assert gateway.post({"model": MODEL, "input": "x"}).headers["x-embedding-upstream"] == f"up0/{MODEL}"


def test_one_that_fails_too_is_checked_in_the_rounds_only_and_callers_are_told_of_it() -> None:
    clock = RoundClock()
    with FakeOpenAI(api_key="sk-fake") as first, FakeOpenAI(api_key="sk-fake") as second:
        second.fail(faults.vendor_error("internal"), times=None)
        with running(listed_twice(first, second), clock=clock) as gateway:
            assert gateway.post({"model": MODEL, "input": "in use"}).status_code == 200
            until_looked(clock, lambda: "shown" in str(gateway.get("/readyz").json()["upstreams"]["up1"]))
            asked = len(second.calls)
            first.fail(faults.vendor_error("internal"), times=None)
            for i in range(10 * FAILURES):
                response = gateway.post({"model": MODEL, "input": f"text {i}"})
            assert response.status_code == 503
            assert "is down or has not shown its vectors yet; the last one" in response.json()["error"]["message"]
            assert len(second.calls) == asked


def test_a_failure_makes_no_check_in_which_another_ones_vector_would_become_the_reference(clock: HandClock) -> None:
    """It may be over before the next round, and callers have this one's vectors."""
    first, second = (
        Deployment(name, Model("m"), "space", Slots(1), CallLimits(1), healthy(clock, name), answers)
        for name in ("first", "second")
    )
    second.standing.unverified = True
    references = ReferenceVectors(None)
    urgent = canary.Canary([first, second], references, from_start=False)
    first.health.begin()
    assert urgent.hurry(clock.monotonic())
    clock.now += canary.URGENT_INTERVAL
    first.health.answered = True
    assert not urgent.hurry(clock.monotonic())
    asyncio.run(references.of("space", b"1234"))
    assert urgent.hurry(clock.monotonic())
    assert not urgent.hurry(clock.monotonic()), "twice within a second"
