"""Measures the cells of the table: a target in a scenario, over an upstream of one kind, run several times."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import orjson

from bench.load import Result, Spec
from bench.procs import ROOT, BenchError, Cores, busy, exchange
from bench.scenarios import Scenario
from bench.targets import Running
from bench.traffic import Shape


@dataclass
class Cell:
    """What was measured. Each list has one value per run."""

    scenario: str
    target: str
    kind: str
    failed: str = ""
    rates: list[float] = field(default_factory=list)
    """Requests per second."""
    vectors: float = 0.0
    """Vectors per second in the median run."""
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """The target's processor time per request, in microseconds."""
    bench_busy: list[float] = field(default_factory=list)
    """Share of a core that mock and load generator used; near 1, they were the bottleneck."""
    foreign: list[float] = field(default_factory=list)
    """Share of the target's core that other processes used."""
    peak: float = 0.0
    """Peak resident memory in this scenario, MiB."""
    errors: int = 0
    first_error: str = ""
    compared: int = 0
    wrong: int = 0
    requests: int = 0
    upstream: dict[str, int] = field(default_factory=dict)
    """The mock's counts over all runs: calls, rows and tokens; the most rows in a call and the most calls at once."""
    mock_cpu: float = 0.0
    load_cpu: float = 0.0
    """Seconds over all runs; with `answered`, they give the rate of each alone on a core."""
    answered: int = 0

    @property
    def rate(self) -> float:
        return median(self.rates) if self.rates else 0.0

    @property
    def latency(self) -> float:
        return median(self.p50) if self.p50 else 0.0


@dataclass(frozen=True)
class Contender:
    """What a cell measures."""

    name: str
    kind: str
    """Kind of upstream, A or B."""
    running: Running | None
    failed: str = ""
    """Why it is not running, if it is not."""


@dataclass(frozen=True)
class Plan:
    """How often and how long to measure."""

    runs: int
    seconds: float
    warmup: float
    digits: str


class Bench:
    """Measures over one mock upstream. Numbers its fresh requests so that no text is ever sent twice."""

    def __init__(self, plan: Plan, mock_port: int, cores: Cores) -> None:
        self._plan, self._port, self._cores = plan, mock_port, cores
        self._first = 0

    def cells(self, scenario: Scenario, contenders: Sequence[Contender]) -> list[Cell]:
        """Verifies each contender, then measures them in turns, so that a busy minute of the machine affects them all.
        One that cannot answer gives a cell that says why."""
        cells = [Cell(scenario.name, each.name, each.kind, each.failed) for each in contenders]
        pairs = [(cell, each.running) for cell, each in zip(cells, contenders, strict=True) if each.running]
        for cell, running in pairs:
            with _recording_failure(cell):
                self._control(scenario, cell.kind)
                self._verify(cell, scenario, running)
                if running.process:
                    running.process.reset_peak()
        for number in range(self._plan.runs):
            for cell, running in pairs:
                if not cell.failed:
                    with _recording_failure(cell):
                        self._run_once(cell, scenario, running, number)
        return cells

    def _run_once(self, cell: Cell, scenario: Scenario, running: Running, number: int) -> None:
        """Runs a contender once, and records the upstream work it caused."""
        self._control(scenario, cell.kind)
        self._measure(cell, scenario, running, number)
        if running.process:
            cell.peak = running.process.peak()
        stats = self._stats()
        for name in ("calls", "rows", "tokens"):
            cell.upstream[name] = cell.upstream.get(name, 0) + stats[name]
        for name in ("most_rows", "most_at_once"):
            cell.upstream[name] = max(cell.upstream.get(name, 0), stats[name])
        cell.vectors = 0.0 if scenario.kind == "trace" else cell.rate * scenario.texts

    def _control(self, scenario: Scenario, kind: str) -> None:
        wanted = {"kind": kind, "digits": self._plan.digits, "latency": scenario.latency}
        exchange(self._port, "POST", "/control", orjson.dumps(wanted))

    def _stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = orjson.loads(exchange(self._port, "GET", "/stats"))
        return stats

    def _shape(self, scenario: Scenario, running: Running, run: int) -> Shape:
        if scenario.kind == "trace":
            first = run  # its seed: every target gets the same traces
        else:
            first = self._first = self._first + 10_000_000
        return Shape(
            scenario.kind, scenario.texts, scenario.encoding, running.path, running.headers, running.models, first
        )

    def _verify(self, cell: Cell, scenario: Scenario, running: Running) -> None:
        """Compares every vector of a few responses, bit by bit. This also fills the caches for hot scenarios."""
        count = 20 if scenario.texts < 64 else 6
        shape = self._shape(scenario, running, 999)
        spec = Spec(running.port, min(2, scenario.connections), shape, 0, 0, count, 60, count, 1)
        result = load(spec)
        if result.errors or not result.compared:
            raise BenchError(result.first_error or "no answer")
        if result.wrong:
            raise BenchError(f"{result.wrong} of {result.compared} vectors are wrong")
        cell.compared += result.compared

    def _measure(self, cell: Cell, scenario: Scenario, running: Running, number: int) -> None:
        plan, process, core = self._plan, running.process, self._cores.target
        spec = Spec(
            running.port,
            scenario.connections,
            self._shape(scenario, running, number),
            plan.seconds,
            plan.warmup,
            sample_every=max(1, 50 // scenario.texts),
        )
        if scenario.requests:
            spec.limit = spec.min_answers = scenario.requests
            spec.warmup, spec.seconds, spec.max_seconds, spec.sample_every = 0, 0, 90, 10
        cpu, core_busy, mock_cpu = process.cpu() if process else 0.0, busy(core), self._stats()["cpu"]
        result = load(spec)
        mock_cpu = self._stats()["cpu"] - mock_cpu
        core_busy = busy(core) - core_busy
        cpu = process.cpu() - cpu if process else core_busy
        parts = (result.cpu, mock_cpu)
        cell.bench_busy.append((sum(parts) if self._cores.shared else max(parts)) / result.wall)
        cell.foreign.append(max(0.0, core_busy - cpu) / result.wall)
        _add(cell, result, cpu)
        cell.mock_cpu += mock_cpu


@contextlib.contextmanager
def _recording_failure(cell: Cell) -> Iterator[None]:
    """Records a failure in the cell."""
    try:
        yield
    except (BenchError, OSError, http.client.HTTPException) as error:
        cell.failed = str(error) or type(error).__name__


def _add(cell: Cell, result: Result, cpu: float) -> None:
    cell.rates.append(result.requests / result.seconds)
    cell.p50.append(result.p50)
    cell.p99.append(result.p99)
    cell.cpu.append(cpu / max(1, result.total) * 1e6)
    cell.errors += result.errors
    cell.first_error = cell.first_error or result.first_error
    cell.compared += result.compared
    cell.wrong += result.wrong
    cell.requests += result.total
    cell.answered += result.total
    cell.load_cpu += result.cpu


def load(spec: Spec) -> Result:
    """Runs the load generator once, in a process of its own on this process's core. Raises `BenchError`."""
    command = [sys.executable, "-m", "bench.load"]
    done = subprocess.run(
        command, input=orjson.dumps(asdict(spec)), capture_output=True, cwd=ROOT, check=False, timeout=300
    )
    if done.returncode:
        raise BenchError(f"load generator: {done.stderr.decode(errors='replace').strip().splitlines()[-1]}")
    return Result(**orjson.loads(done.stdout))
