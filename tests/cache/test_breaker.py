import pytest

from app.cache.breaker import Breaker
from tests.cache.support import Clock


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock.monotonic)


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        assert breaker.allow()
        breaker.failed()


def test_failures_that_are_not_in_a_row_do_not_open_it(breaker: Breaker) -> None:
    for _ in range(5):
        fail(breaker, 2)
        breaker.succeeded()
    assert breaker.allow()


def test_three_failures_in_a_row_open_it_for_a_second(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    assert not breaker.allow()
    clock.advance(0.99)
    assert not breaker.allow()
    clock.advance(0.01)
    assert breaker.allow()


def test_one_caller_at_a_time_is_let_through_when_the_pause_is_over(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.advance(1)
    assert [breaker.allow() for _ in range(3)] == [True, False, False]


def test_the_pause_doubles_up_to_half_a_minute(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    for pause in (1, 2, 4, 8, 16, 30, 30):
        clock.advance(pause - 0.01)
        assert not breaker.allow()
        clock.advance(0.01)
        fail(breaker, 1)


def test_success_closes_it_and_the_next_pause_is_short_again(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.advance(1)
    fail(breaker, 1)
    clock.advance(2)
    assert breaker.allow()
    breaker.succeeded()
    fail(breaker, 3)
    clock.advance(1)
    assert breaker.allow()


def test_failures_of_calls_that_began_before_it_opened_do_not_lengthen_the_pause(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, 3)
    for _ in range(64):
        clock.advance(1 / 64)
        breaker.failed()
    assert breaker.allow()


def test_a_trial_whose_caller_left_is_the_next_ones(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.advance(1)
    assert breaker.allow()
    breaker.abandoned()
    assert breaker.allow()
