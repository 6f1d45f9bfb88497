"""The benchmark programs accept the commands that the README shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import growth

ROOT = Path(__file__).parent.parent


def test_growth_without_a_word_does_all_that_takes_no_minutes() -> None:
    assert [*growth.parse_arguments([]).parts] == ["inputs", "workers", "replicas"]
    assert [*growth.parse_arguments(["minutes", "replicas"]).parts] == ["minutes", "replicas"]
    with pytest.raises(SystemExit):
        growth.parse_arguments(["hours"])


@pytest.mark.parametrize("module", ["bench", "bench.growth", "bench.overload", "bench.micro"])
def test_asked_for_help_they_give_it_and_measure_nothing(module: str) -> None:
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("usage: ")
