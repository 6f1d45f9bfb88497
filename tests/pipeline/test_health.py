"""How long a deployment that fails stays out of the rotation."""

from __future__ import annotations

import pytest

from app.errors import InvalidRequest, UpstreamError
from app.metrics import Metrics
from app.pipeline.health import EJECTION, FAILURES, LONGEST, Health
from tests.clock import HandClock


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def health(clock: HandClock) -> Health:
    health = Health(clock, Metrics().upstream_available.labels("up", "m"))
    for _ in range(FAILURES):
        assert health.available()
        fails(health)
    return health


def fails(health: Health) -> None:
    health.end(UpstreamError("failed"), health.begin())


async def out_for(health: Health, clock: HandClock) -> float:
    """Whole seconds until it may have a call."""
    seconds = 0
    while not health.available():
        await clock.advance(1)
        seconds += 1
    return seconds


async def test_each_time_it_fails_again_at_once_it_is_out_for_longer_up_to_a_bound(
    health: Health, clock: HandClock
) -> None:
    out = []
    for _ in range(LONGEST + 2):
        out.append(await out_for(health, clock))
        fails(health)
    assert out == [EJECTION * min(time, LONGEST) for time in range(1, LONGEST + 3)]


async def test_it_comes_back_by_one_call_at_a_time(health: Health, clock: HandClock) -> None:
    await clock.advance(EJECTION)
    assert health.available()
    era = health.begin()
    assert not health.available(), "the one under way decides"
    health.end(None, era)
    assert health.available()


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
