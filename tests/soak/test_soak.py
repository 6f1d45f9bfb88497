"""A short soak of the whole program; `make soak` is the long one."""

from __future__ import annotations

from pathlib import Path

from tests.soak.soak import run


def test_while_everything_around_it_fails_no_vector_is_wrong_and_no_error_without_a_reason(tmp_path: Path) -> None:
    report = run(tmp_path, seconds=3, seed=1)
    assert report.problems() == [], report.summary()
