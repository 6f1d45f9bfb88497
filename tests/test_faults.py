"""tests/FAULTS.md says which test covers which fault: each test is where it says, and no fault is left out."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = re.findall(r"^\| (S?\d+) \|.*\| ([^|]+) \|$", (TESTS / "FAULTS.md").read_text(), re.MULTILINE)


def test_every_fault_and_every_danger_has_a_row() -> None:
    assert [number for number, _ in ROWS] == [*map(str, range(1, 65)), *(f"S{point}" for point in range(1, 14))]


def test_every_test_that_is_named_is_there() -> None:
    for number, shown_by in ROWS:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", shown_by)
        assert named, number
        for file, test in named:
            assert re.search(rf"^(async )?def {test}\(", (TESTS / file).read_text(), re.MULTILINE), f"{number}: {test}"
