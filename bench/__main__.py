"""`python -m bench`: the gateway, its peers and the limits, measured in one run. See README.md."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import report
from bench.measure import Bench, Cell, Contender, Plan
from bench.peers import PEERS
from bench.procs import BenchError, Cores, Process
from bench.scenarios import QUICK, SCENARIOS, Scenario
from bench.targets import BARE, DIRECT, GATEWAY, Setup, Target
from tests.processes import free_port
from tests.redis_server import RedisServer

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs what the options say; prints tables, writes JSON. Exits with 1 if any vector was wrong."""
    options = _options()
    plan = Plan(options.runs, options.seconds, options.warmup, options.digits)
    cores = Cores.of_this_machine()
    scenarios = [SCENARIOS[name] for name in options.scenarios]
    facts = report.machine()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops what was started, as Ctrl-C does
    # This process only waits; the load generators it starts inherit its core.
    os.sched_setaffinity(0, {cores.load})
    cells: list[Cell] = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="eg-bench-") as work, contextlib.ExitStack() as stack:
        session = Session(stack, Path(work), plan, cores, redis=any(each.own_cache == "redis" for each in scenarios))
        for cell in session.cells(scenarios, options.kinds, options.peers, versions):
            cells.append(cell)
            say(f"{cell.scenario} {cell.target} {cell.kind}: {cell.failed or f'{cell.rate:,.1f} req/s'}")
    order = list(options.scenarios)
    cells.sort(key=lambda cell: order.index(cell.scenario))
    print(report.tables(cells, facts, versions, plan))
    say(f"JSON: {report.write_json(RESULTS, cells, facts, versions)}")
    if any(cell.wrong for cell in cells):
        sys.exit(1)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Session:
    """The mock, the Redis server and the targets of one run."""

    def __init__(self, stack: contextlib.ExitStack, work: Path, plan: Plan, cores: Cores, *, redis: bool) -> None:
        self._work, self._cores = work, cores
        self._mock_port = free_port()
        self._redis_port = free_port() if redis else 0
        if redis:
            stack.enter_context(RedisServer(port=self._redis_port))
        mock = Process([sys.executable, "-m", "bench.mock", str(self._mock_port)], cores.mock, work / "mock.log")
        stack.callback(mock.stop)
        mock.wait_for(self._mock_port, "/stats", 20)
        self._bench = Bench(plan, self._mock_port, cores)

    def cells(
        self, scenarios: Sequence[Scenario], kinds: Sequence[str], peers: Sequence[str], versions: dict[str, str]
    ) -> Iterator[Cell]:
        """Measures each scenario: limits and gateway, freshly started, and peers, which live as long as the session."""
        with contextlib.ExitStack() as stack:
            started = [each for name in peers for each in self._peer(stack, name, scenarios, versions)]
            for scenario in scenarios:
                with contextlib.ExitStack() as fresh:
                    own = [
                        self._start(fresh, target, cache, scenario, kind)
                        for target, cache, kind in _own_targets(scenario, kinds)
                    ]
                    others = [contender for cache, contender in started if cache in scenario.caches]
                    yield from self._bench.cells(scenario, [*own, *others])

    def _peer(
        self, stack: contextlib.ExitStack, name: str, scenarios: Sequence[Scenario], versions: dict[str, str]
    ) -> Iterator[tuple[str, Contender]]:
        """Starts the peer with each cache that a scenario needs, in a process of its own."""
        peer = PEERS[name]
        try:
            say(f"{name}: installing, if it is not there")
            versions[name] = peer.install()
        except BenchError as error:
            versions[name] = f"failed: {error}"
            yield from ((cache, Contender(_target_name(peer, cache), "A", None, str(error))) for cache in peer.caches)
            return
        for cache in peer.caches:
            wanted = [each for each in scenarios if cache in each.caches]
            if wanted:
                yield cache, self._start(stack, peer, cache, wanted[0], "A")

    def _start(
        self, stack: contextlib.ExitStack, target: Target, cache: str, scenario: Scenario, kind: str
    ) -> Contender:
        """Starts a target, which then idles until its turn. It is not suspended meanwhile: gunicorn, under which one
        peer runs, would take its worker for dead."""
        name = _target_name(target, cache)
        setup = Setup(scenario, cache, self._mock_port, self._redis_port, self._work, self._cores)
        try:
            running = target.start(setup)
        except BenchError as error:
            return Contender(name, kind, None, str(error))
        stack.callback(running.stop)
        return Contender(name, kind, running)


def _target_name(target: Target, cache: str) -> str:
    """The target's name in tables. A peer's names its cache; the gateway always has one."""
    return f"{target.name} + {cache} cache" if target.name in PEERS and cache != "none" else target.name


def _own_targets(scenario: Scenario, kinds: Sequence[str]) -> Iterator[tuple[Target, str, str]]:
    """The limits and the gateway, each with its cache and kind of upstream."""
    if scenario.own_cache != "redis":
        yield DIRECT, "none", "A"
    if scenario.bare:
        yield BARE, "none", "A"
    for kind in kinds:
        if kind == "A" or scenario.numbers_only:
            yield GATEWAY, scenario.own_cache, kind


def _options() -> argparse.Namespace:
    def names(known: Sequence[str]) -> type[list[str]]:
        def parse(text: str) -> list[str]:
            wanted = [name for name in text.split(",") if name and name != "none"]
            unknown = [name for name in wanted if name not in known]
            if unknown:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
            return wanted

        return parse  # type: ignore[return-value]  # argparse takes any callable

    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="no peers, fewer scenarios, one short run: two minutes")
    parser.add_argument("--scenarios", type=names(list(SCENARIOS)), help=f"of {','.join(SCENARIOS)} (default: all)")
    parser.add_argument("--peers", type=names(list(PEERS)), help=f"of {','.join(PEERS)}, or none (default: all)")
    parser.add_argument("--kinds", type=names(["A", "B"]), default=["A", "B"], help="of upstream (default: A,B)")
    parser.add_argument(
        "--digits", choices=("short", "long"), default="short", help="the upstream's numbers as float32 or double"
    )
    parser.add_argument("--runs", type=int, help="of each cell (default: 3)")
    parser.add_argument("--seconds", type=float, help="a run lasts (default: 3)")
    parser.add_argument("--warmup", type=float, help="seconds before each run (default: 0.7)")
    options = parser.parse_args()
    quick = options.quick
    options.scenarios = options.scenarios or list(QUICK if quick else SCENARIOS)
    options.peers = ([] if quick else list(PEERS)) if options.peers is None else options.peers
    options.runs = options.runs or (1 if quick else 3)
    options.seconds = options.seconds or (1.2 if quick else 3.0)
    options.warmup = (0.3 if quick else 0.7) if options.warmup is None else options.warmup
    return options


if __name__ == "__main__":
    main()
