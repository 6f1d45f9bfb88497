"""`python -m tests.fuzz --cases 100000 --seed 7`: one line of figures; exit code 1 and the cases if any went wrong."""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.face import served
from tests.fuzz.fuzz import Report, fuzz


def main() -> None:
    parser = argparse.ArgumentParser("fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=101_000, help="how many requests (default 101000)")
    parser.add_argument("--described", type=int, default=1000, help="how many of them by Schemathesis (default 1000)")
    parser.add_argument("--minutes", type=float, default=20.0, help="stop after so long in any case (default 20)")
    parser.add_argument("--seed", type=int, default=None, help="for what is random (default: random, and shown)")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    sys.stdout.write(f"fuzzing with {options.cases} cases, --seed {seed}\n")
    sys.stdout.flush()
    report = Report()
    until = time.monotonic() + 60 * options.minutes
    with TemporaryDirectory(prefix="eg-fuzz-") as directory, served(Path(directory)) as gateway:
        raw = options.cases - options.described
        fuzz(gateway, report, described=options.described, raw=raw, seed=seed, until=until)
    sys.stdout.write(report.summary() + "\n")
    for problem in report.problems:
        sys.stdout.write(f"PROBLEM {problem}\n")
    sys.exit(1 if report.problems else 0)


main()
