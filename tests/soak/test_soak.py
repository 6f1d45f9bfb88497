"""A short soak of the whole program; `make soak` is the long one."""

from __future__ import annotations

from pathlib import Path

from app.upstreams import UPSTREAMS
from tests.soak.soak import run
from tests.soak.vendors import vendors


def test_while_everything_around_it_fails_no_vector_is_wrong_and_no_error_without_a_reason(tmp_path: Path) -> None:
    report = run(tmp_path, seconds=3, seed=1)
    assert report.problems() == [], report.summary()


async def test_no_type_of_upstream_is_left_out() -> None:
    """But for the built-in one: it runs inside the program, where nothing around it can fail."""
    async with vendors(seed=1) as served:
        types = {vendor.config["type"] for vendor in served.values()}
    assert types | {"lexical"} == set(UPSTREAMS)
