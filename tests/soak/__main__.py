"""`python -m tests.soak --seconds 300 --seed 7`: one line of figures; exit code 1 and the reasons if it went wrong."""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.soak.soak import run


def main() -> None:
    parser = argparse.ArgumentParser("soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long (default 300)")
    parser.add_argument("--seed", type=int, default=None, help="for what is random (default: random, and shown)")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    sys.stdout.write(f"soaking for {options.seconds:g} s with --seed {seed}\n")
    sys.stdout.flush()
    with TemporaryDirectory(prefix="eg-soak-") as directory:
        report = run(Path(directory), options.seconds, seed)
    sys.stdout.write(report.summary() + "\n")
    for name, counts in (("faults", report.faults), ("errors, explained", report.tally.errors)):
        listed = ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
        sys.stdout.write(f"{name}: {listed}\n")
    problems = report.problems()
    for problem in problems:
        sys.stdout.write(f"PROBLEM {problem}\n")
    sys.exit(1 if problems else 0)


main()
