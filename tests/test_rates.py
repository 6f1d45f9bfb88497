"""Token buckets: pure arithmetic, so any moment can be tested."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.limits import Bucket, Limit, Rates, burst_limit, smooth_limit


def test_a_quiet_caller_may_use_a_whole_minutes_worth_at_once_and_then_gets_it_back_evenly() -> None:
    requests = burst_limit(Rates(requests=60), now=0).requests
    assert requests
    for _ in range(60):
        assert requests.wait(0, 1) == 0
        requests.take(0, 1)
    assert requests.wait(0, 1) == pytest.approx(1)
    assert requests.wait(0, 5) == pytest.approx(5)
    assert requests.wait(0.25, 1) == pytest.approx(0.75)
    assert requests.wait(1, 1) == 0
    assert requests.until_full(1) == pytest.approx(59)
    assert requests.level(1000) == 60


def test_an_upstream_gets_one_call_and_a_tenth_of_a_seconds_worth_at_once() -> None:
    limit = smooth_limit(Rates(requests=1800), now=0)
    assert limit.requests
    assert limit.tokens is None
    assert limit.requests.burst == pytest.approx(1 + 3)


def test_debt_is_paid_off_before_anything_fits() -> None:
    bucket = Bucket(60, 10, now=0)
    bucket.take(0, 40)
    assert bucket.level(0) == -30
    assert bucket.wait(0, 1) == pytest.approx(31)
    bucket.take(0, -30)
    assert bucket.wait(0, 1) == pytest.approx(1)


def test_what_is_larger_than_the_bucket_goes_when_the_bucket_is_full() -> None:
    bucket = Bucket(60, 10, now=0)
    assert bucket.wait(0, 1000) == 0
    bucket.take(0, 1)
    assert bucket.wait(0, 1000) == pytest.approx(1)


def test_a_share_is_an_equal_part_of_what_is_there_and_of_what_comes() -> None:
    bucket = Bucket(60, 60, now=0)
    bucket.take(0, 20)
    bucket.divide(4, now=0)
    assert bucket.level(0) == pytest.approx(10)
    assert bucket.max_level == 15
    assert bucket.level(4) == pytest.approx(11)
    bucket.divide(2, now=4)
    assert bucket.level(4) == pytest.approx(22)


def test_both_must_fit() -> None:
    limit = Limit(Bucket(60, 1, now=0), Bucket(600, 100, now=0))
    limit.take(0, 1, 100)
    assert limit.wait(0, 1, 1) == pytest.approx(1)
    assert limit.wait(0, 1, 100) == pytest.approx(10)
    assert Limit(None, None).wait(0, 1, 1) == 0


@given(
    st.integers(1, 10**6),
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), min_size=1, max_size=60),
)
def test_never_more_than_the_burst_and_the_rate_goes_through(per_minute: int, asked: list[tuple[float, int]]) -> None:
    bucket = Bucket(per_minute, 50, now=0)
    now, passed = 0.0, 0
    for pause, amount in asked:
        now += pause
        if bucket.wait(now, amount) == 0:
            bucket.take(now, amount)
            passed += amount
    assert passed <= 50 + now * per_minute / 60 + 0.001


@given(st.integers(1, 10**6), st.floats(0, 10**4), st.integers(1, 50))
def test_who_waits_as_long_as_told_finds_what_was_asked_for(per_minute: int, taken: float, amount: int) -> None:
    bucket = Bucket(per_minute, 50, now=0)
    bucket.take(0, taken)
    assert bucket.wait(bucket.wait(0, amount), amount) == 0
