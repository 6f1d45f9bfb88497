"""Reports what was measured, as tables for people and as JSON for machines."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import orjson

from bench.measure import Cell, Plan
from bench.scenarios import SCENARIOS

_TIGHT = 0.85
"""Share of a core above which mock and load generator may have been the bottleneck."""
_NOISY = 0.1
"""Share of the target's core used by other processes above which a row is not to be trusted."""


def machine() -> dict[str, str]:
    """The facts that absolute figures depend on."""
    cpu = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    libraries = ("uvicorn", "uvloop", "httptools", "orjson", "aiohttp", "httpx", "numpy", "redis", "hiredis")
    return {
        "processor": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": " ".join(f"{each:.2f}" for each in os.getloadavg()),
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        **{name: version(name) for name in libraries},
    }


def tables(cells: Sequence[Cell], facts: dict[str, str], versions: dict[str, str], plan: Plan) -> str:
    """The whole report."""
    parts = [", ".join(f"{name} {value}" for name, value in facts.items())]
    if versions:
        parts.append("Peers: " + ", ".join(f"{name} {value}" for name, value in versions.items()))
    parts.append(f"{plan.runs} runs of {plan.seconds:g} s after {plan.warmup:g} s; medians (min–max).")
    parts.append(_ceilings(cells))
    for scenario in dict.fromkeys(cell.scenario for cell in cells):
        here = [cell for cell in cells if cell.scenario == scenario]
        parts.append(_table(scenario, here))
        if SCENARIOS[scenario].kind == "trace":
            parts.append(_cost(here))
    parts.append(_footnotes(cells))
    return "\n\n".join(part for part in parts if part) + "\n"


def _ceilings(cells: Iterable[Cell]) -> str:
    """The rates of mock and load generator: together as measured, and each alone, from its processor time."""
    rows = []
    for cell in cells:
        if cell.target != "direct" or cell.failed or SCENARIOS[cell.scenario].latency or not cell.mock_cpu:
            continue
        mock, loader = cell.answered / cell.mock_cpu, cell.answered / cell.load_cpu
        rows.append((cell.scenario, _number(cell.rate), _number(mock), _number(loader), f"{max(cell.bench_busy):.0%}"))
    if not rows:
        return ""
    head = ("scenario", "upstream direct, req/s", "mock alone on a core", "load generator alone", "core in use")
    return "## Ceilings of the bench itself\n\n" + _grid(head, rows)


def _table(scenario: str, cells: Sequence[Cell]) -> str:
    about = SCENARIOS[scenario]
    head = (
        "target",
        "kind",
        "req/s",
        "vectors/s",
        "p50 ms",
        "p99 ms",
        "CPU µs/req",
        "peak MiB",
        "gateway is",
        "by CPU",
        "notes",
    )
    title = f"## {scenario}: {about.about}, {about.connections} connection{'s' if about.connections > 1 else ''}"
    return f"{title}\n\n" + _grid(head, [_row(cell, cells) for cell in cells])


def _row(cell: Cell, cells: Sequence[Cell]) -> tuple[str, ...]:
    if cell.failed:
        return (cell.target, cell.kind, "failed", "", "", "", "", "", "", "", cell.failed.replace("|", "/"))
    return (
        cell.target,
        cell.kind,
        f"{_number(cell.rate)} ({_number(min(cell.rates))}–{_number(max(cell.rates))})",
        _number(cell.vectors) if cell.vectors else "",
        f"{cell.latency:.3f}",
        f"{_median(cell.p99):.2f}",
        _number(_median(cell.cpu)) if cell.target != "direct" else "",
        _number(cell.peak) if cell.peak else "",
        _ratio(cell, cells, lambda each: each.rate),
        "" if cell.target == "direct" else _ratio(cell, cells, lambda each: 1e6 / max(1e-9, _median(each.cpu))),
        _notes(cell, cells),
    )


def _ratio(cell: Cell, cells: Sequence[Cell], rate: Callable[[Cell], float]) -> str:
    """The gateway's rate as a multiple of this row's, over each kind of upstream."""
    own = [each for each in cells if each.target == "gateway" and each.rates]
    if cell.target == "gateway" or not rate(cell):
        return ""
    return " ".join(f"{each.kind} {rate(each) / rate(cell):.2f}×" for each in own)


def _notes(cell: Cell, cells: Sequence[Cell]) -> str:
    notes = []
    direct = next((each for each in cells if each.target == "direct" and each.p50), None)
    if SCENARIOS[cell.scenario].connections == 1 and direct and cell is not direct:
        notes.append(f"added {cell.latency - direct.latency:.3f} ms")
    if SCENARIOS[cell.scenario].kind == "hot" and cell.target not in ("direct", "bare ASGI"):
        notes.append(f"{_number(cell.upstream['calls'])} upstream calls")
    if cell.wrong:
        notes.append(f"{cell.wrong} WRONG VECTORS")
    if cell.errors:
        notes.append(f"{cell.errors} errors, first: {cell.first_error[:120].replace('|', '/')}")
    if max(cell.bench_busy) > _TIGHT and cell.target != "direct":
        notes.append("† bench may be the limit")
    if max(cell.foreign) > _NOISY and cell.target != "direct":
        notes.append(f"‡ others took {max(cell.foreign):.0%}")
    return "; ".join(notes)


def _cost(cells: Sequence[Cell]) -> str:
    """The upstream work that each target caused for the same traces."""
    head = ("target", "kind", "requests", "upstream calls", "calls per 1,000", "tokens billed", "inputs a call", "most")
    rows = []
    for cell in cells:
        if cell.failed:
            continue
        did = cell.upstream
        rows.append(
            (
                cell.target,
                cell.kind,
                _number(cell.requests),
                _number(did["calls"]),
                _number(did["calls"] / max(1, cell.requests) * 1000),
                _number(did["tokens"]),
                f"{did['rows'] / max(1, did['calls']):.1f}",
                str(did["most_rows"]),
            )
        )
    return "Cost: what each made the upstream do for the same traces, all runs together.\n\n" + _grid(head, rows)


def _footnotes(cells: Sequence[Cell]) -> str:
    compared, wrong = sum(cell.compared for cell in cells), sum(cell.wrong for cell in cells)
    return (
        f"{_number(compared)} vectors compared bit by bit, {wrong} wrong. Kind A answers base64 when asked, kind B "
        "numbers only. `by CPU` compares processor time per request, which other work on the machine disturbs less. "
        "† mock and load generator had their core full. ‡ other work ran on the target's core."
    )


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def write_json(directory: Path, cells: Sequence[Cell], facts: dict[str, str], versions: dict[str, str]) -> Path:
    """Writes everything as JSON. Returns the file."""
    directory.mkdir(exist_ok=True)
    file = directory / time.strftime("%Y%m%dT%H%M%SZ.json", time.gmtime())
    document = {"machine": facts, "peers": versions, "cells": [asdict(cell) for cell in cells]}
    file.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    return file
