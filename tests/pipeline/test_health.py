"""How long a failing deployment stays out of the rotation."""

from __future__ import annotations

from functools import partial

import pytest

from app.errors import InvalidRequest, RateLimited, UpstreamAuth, UpstreamError
from app.metrics import Metrics
from app.pipeline.health import DOUBTFUL, EJECTION, FAILURES, MOST_EJECTIONS, Health
from app.pipeline.trouble import LONG_REST
from tests.clock import HandClock


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def health(clock: HandClock) -> Health:
    health = Health(clock, partial(Metrics().show_deployment, "up", "m"), "up/m")
    for _ in range(FAILURES):
        assert health.available()
        fails(health)
    return health


def fails(health: Health) -> None:
    health.end(UpstreamError("failed"), health.begin())


async def out_for(health: Health, clock: HandClock) -> float:
    """Whole seconds until it may be called."""
    seconds = 0
    while not health.available():
        await clock.advance(1)
        seconds += 1
    return seconds


async def test_each_time_it_fails_again_at_once_it_is_out_for_longer_up_to_a_bound(
    health: Health, clock: HandClock
) -> None:
    out = []
    for _ in range(MOST_EJECTIONS + 2):
        out.append(await out_for(health, clock))
        fails(health)
    assert out == [EJECTION * min(time, MOST_EJECTIONS) for time in range(1, MOST_EJECTIONS + 3)]


async def test_it_comes_back_by_one_call_at_a_time(health: Health, clock: HandClock) -> None:
    await clock.advance(EJECTION)
    assert health.available()
    era = health.begin()
    assert not health.available(), "the one under way decides"
    health.end(None, era)
    assert health.available()


@pytest.mark.parametrize("reason", ["late", "no room here", "failed"])
async def test_no_later_reason_shortens_the_time_for_which_others_are_asked_first(
    reason: str, health: Health, clock: HandClock
) -> None:
    health.doubt("it has no vectors of some inputs", health.begin())
    if reason == "late":
        health.drop(health.begin())
    elif reason == "no room here":
        health.abandon(health.begin(), others_first=True)
    else:
        fails(health)
    await clock.advance(DOUBTFUL - 0.1)
    assert health.suspect
    await clock.advance(0.2)
    assert not health.suspect


@pytest.mark.parametrize("answer", [None, InvalidRequest("too long")], ids=["success", "a refused input"])
async def test_an_answer_makes_all_forgotten(answer: InvalidRequest | None, health: Health, clock: HandClock) -> None:
    await clock.advance(EJECTION)
    fails(health)
    await clock.advance(2 * EJECTION)
    health.end(answer, health.begin())
    for _ in range(FAILURES):
        assert health.available()
        fails(health)
    assert await out_for(health, clock) == EJECTION


# --- what is logged -----------------------------------------------------------------------------------------


async def test_trouble_that_does_not_pass_is_told_once_and_shown_while_it_lasts(
    clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    up = Health(clock, partial(Metrics().show_deployment, "up", "m"), "up/m")
    for seconds in (0, 1, 1, 60):  # it recovers in between
        await clock.advance(seconds)
        up.end(UpstreamAuth("wrong key"), up.begin())
        assert up.trouble.lasting == "upstream_auth: wrong key"
        up.end(None, up.begin())
        assert up.trouble.lasting is None
    assert [record.getMessage() for record in caplog.records] == ["up/m: upstream_auth: wrong key"] * 2
    up.end(UpstreamError("passes"), up.begin())
    assert up.trouble.lasting is None


async def test_a_long_rest_is_told_and_a_short_one_is_not(clock: HandClock, caplog: pytest.LogCaptureFixture) -> None:
    up = Health(clock, partial(Metrics().show_deployment, "up", "m"), "up/m")
    up.end(RateLimited("slowly", retry_after=LONG_REST - 1), up.begin())
    assert not up.problem
    up.end(RateLimited("slowly", retry_after=180), up.begin())
    problem = "rate_limit_exceeded: slowly; it has no call for 180 s"
    assert up.problem == problem
    assert [record.getMessage() for record in caplog.records] == [f"up/m: {problem}"]
    await clock.advance(179)
    assert up.problem == problem
    await clock.advance(1)
    assert not up.problem, "though it may be long until somebody asks"


async def test_rate_limits_without_another_answer_are_told_after_a_while(
    clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    up = Health(clock, partial(Metrics().show_deployment, "up", "m"), "up/m")
    for _ in range(int(LONG_REST)):
        up.end(RateLimited("slowly", retry_after=1), up.begin())
        assert not up.problem
        await clock.advance(1)
    up.end(RateLimited("slowly", retry_after=1), up.begin())
    assert up.problem == "rate_limit_exceeded: slowly; no other answer for 30 s"
    assert [record.getMessage() for record in caplog.records] == [f"up/m: {up.problem}"]
    up.end(None, up.begin())
    assert not up.problem
    up.end(RateLimited("slowly", retry_after=1), up.begin())
    assert not up.problem, "it has answered since"


async def test_why_a_call_failed_is_told_though_it_passes_once_a_minute_for_each_reason(
    clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    up = Health(clock, partial(Metrics().show_deployment, "up", "m"), "up/m")
    for _ in range(5):  # its errors alternate, and it never leaves the rotation
        up.end(UpstreamError("boom"), up.begin())
        up.end(UpstreamAuth("wrong key"), up.begin())
        up.end(None, up.begin())
        await clock.advance(20)
    told = ["up/m: upstream_error: boom", "up/m: upstream_auth: wrong key"]
    assert [record.getMessage() for record in caplog.records] == told * 2


async def test_leaving_the_rotation_and_coming_back_are_told(
    clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    up = Health(clock, partial(Metrics().show_deployment, "up", "m"), "up/m")
    for _ in range(FAILURES):
        fails(up)
    assert up.trouble.lasting == "upstream_error: failed"
    await clock.advance(EJECTION)
    up.end(None, up.begin())
    assert not up.trouble.lasting
    problem = [record.getMessage() for record in caplog.records]
    assert problem == [
        "up/m: upstream_error: failed",
        "up/m has failed 5 times in a row and is tried last for 30 s; the last: upstream_error: failed",
        "up/m answers again",
    ]


async def test_what_the_last_calls_of_one_come_to_that_was_replaced_is_told_nobody(
    clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    up = Health(clock, partial(Metrics().show_deployment, "up", "m"), "up/m")
    up.trouble.retire()
    for _ in range(FAILURES):
        up.end(UpstreamAuth("wrong key"), up.begin())
    up.end(None, up.begin())
    assert not caplog.records


async def test_rests_that_nobody_measures_grow_up_to_a_bound_and_are_not_the_same_for_all_replicas(
    clock: HandClock,
) -> None:
    draws = iter([0.0, 1.0, 0.0, 0.5, 0.5, 0.0])
    report = partial(Metrics().show_deployment, "up", "m")
    up = Health(clock, report, "up/m", lambda: next(draws))
    rests = []
    for _ in range(5):
        eras = [up.begin(), up.begin()]
        for era in eras:  # both were under way when the limit was reached, which is one refusal
            up.end(RateLimited("slowly"), era)
        rests.append(up.cooldown_remaining())
        await clock.advance(up.cooldown_remaining())
    assert rests == [1, 3, 4, 10, 10]
    up.end(None, up.begin())
    straggler = up.begin()
    up.end(RateLimited("slowly"), up.begin())
    assert up.cooldown_remaining() == 1, "it has answered since"
    await clock.advance(1)
    up.end(RateLimited("slowly"), straggler)
    assert not up.cooldown_remaining(), "that was the same refusal"
