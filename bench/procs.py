"""Processes under measurement: started on a core each, asked what they used, and ended."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_TICK = os.sysconf("SC_CLK_TCK")
_CORES = os.sched_getaffinity(0)
"""All that are ours, before anything is pinned."""


class BenchError(Exception):
    """A target that could not be installed, started or asked; the reason is for the report."""


@dataclass(frozen=True)
class Cores:
    """Which core does what. With two, everything but the target shares the second."""

    target: int
    mock: int
    load: int

    @staticmethod
    def of_this_machine() -> Cores:
        have = sorted(os.sched_getaffinity(0))
        return Cores(have[0], have[1 % len(have)], have[2] if len(have) > 2 else have[-1])

    @property
    def shared(self) -> bool:
        """Whether mock and load generator have one core between them."""
        return self.mock == self.load


class Process:
    """A child pinned to a core (None: to none), its output in a file. End it with `stop`."""

    def __init__(
        self,
        command: Sequence[str],
        core: int | None,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> None:
        cores = _CORES if core is None else {core}
        self.log = log
        with log.open("wb") as out:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**_environment(), **(env or {})},
                cwd=cwd,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),  # there are no threads here
            )

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"

    def wait_for(self, port: int, path: str, seconds: float) -> None:
        """Returns when it answers a GET. Raises `BenchError` when it ends or takes too long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not self.alive:
                raise BenchError(f"ended with {self._child.returncode}: {self.last_words()}")
            if _answers(port, path):
                return
            time.sleep(0.05)
        raise BenchError(f"no answer within {seconds:g} s: {self.last_words()}")

    def tree(self) -> list[int]:
        """Its process id and its descendants'."""
        parents: dict[int, list[int]] = {}
        for pid, fields in _stats():
            parents.setdefault(int(fields[1]), []).append(pid)
        found = [self._child.pid]
        for pid in found:
            found += parents.get(pid, [])
        return found

    def cpu(self) -> float:
        """Seconds of processor time of the whole tree so far."""
        mine = set(self.tree())
        return sum(int(fields[11]) + int(fields[12]) for pid, fields in _stats() if pid in mine) / _TICK

    def reset_peak(self) -> None:
        """Forgets the peak of resident memory, where the kernel lets us."""
        for pid in self.tree():
            try:
                Path(f"/proc/{pid}/clear_refs").write_text("5")
            except OSError:
                return

    def peak(self) -> float:
        """Peak of resident memory since the last reset, MiB, summed over the tree."""
        total = 0
        for pid in self.tree():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
            total += int(line.split()[1])
        return total / 1024

    def stop(self) -> None:
        """Ends it and all it has started, at once: nothing here has anything to save."""
        for pid in self.tree():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._child.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def busy(core: int) -> float:
    """Seconds this core has spent on anything at all, other machines' share (steal) included."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *counts = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, counts)
            return (user + nice + system + irq + softirq + steal) / _TICK
    return 0.0


def exchange(
    port: int, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}, seconds: float = 10.0
) -> bytes:
    """One request on loopback. Raises `OSError` or `http.client.HTTPException`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request(method, path, body, headers)
        return connection.getresponse().read()
    finally:
        connection.close()


def _answers(port: int, path: str) -> bool:
    try:
        exchange(port, "GET", path, seconds=2.0)
    except (OSError, http.client.HTTPException):
        return False
    return True


def _stats() -> Iterable[tuple[int, list[str]]]:
    """Every process's id and the fields of its /proc/PID/stat that follow its name."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                yield int(entry.name), (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue


def _environment() -> dict[str, str]:
    """Ours, without what would configure a gateway or reach beyond this machine."""
    dropped = ("EMBEDDING_GATEWAY", "PROMETHEUS_MULTIPROC_DIR", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
