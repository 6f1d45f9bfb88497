"""Work counted in functions called, which depends on no machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Counted:
    calls = 0

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        self.calls += event in ("call", "c_call")


@contextmanager
def counting_calls() -> Iterator[Counted]:
    """Counts, while the block runs, the functions that this thread calls, Python's and C's."""
    counted = Counted()
    sys.setprofile(counted)
    try:
        yield counted
    finally:
        sys.setprofile(None)
