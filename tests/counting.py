"""Work counted in function calls, which does not depend on the machine's speed."""

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
    """Counts the Python and C functions that this thread calls while the block runs."""
    counted = Counted()
    sys.setprofile(counted)
    try:
        yield counted
    finally:
        sys.setprofile(None)
