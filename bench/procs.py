"""Processes under measurement: starts them on a core each, reads what they used, and kills them."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_TICK = os.sysconf("SC_CLK_TCK")
_CORES = os.sched_getaffinity(0)
"""All cores that this process may use, before anything is pinned."""


class BenchError(Exception):
    """A target could not be installed, started or called. The message is for the report."""


@dataclass(frozen=True)
class Cores:
    """Which core does what. With two, everything but the target shares the second."""

    target: int
    mock: int
    load: int

    @staticmethod
    def of_this_machine() -> Cores:
        available = sorted(os.sched_getaffinity(0))
        return Cores(available[0], available[1 % len(available)], available[2] if len(available) > 2 else available[-1])

    @property
    def shared(self) -> bool:
        """Whether mock and load generator share a core."""
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
        """Waits until the process answers a GET. Raises `BenchError` if it exits or takes too long."""
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
        pids = set(self.tree())
        return sum(int(fields[11]) + int(fields[12]) for pid, fields in _stats() if pid in pids) / _TICK

    def reset_peak(self) -> None:
        """Resets the peak of resident memory, if the kernel allows it."""
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
        """Kills the process and its descendants: none of them has anything to save."""
        for pid in self.tree():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._child.wait(10)


def busy(core: int) -> float:
    """Seconds that this core has been busy, including time stolen by other virtual machines."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *counts = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, counts)
            return (user + nice + system + irq + softirq + steal) / _TICK
    return 0.0


def exchange(
    port: int, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}, seconds: float = 10.0
) -> bytes:
    """Sends one request on loopback. Raises `OSError` or `http.client.HTTPException`."""
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
    """This process's environment, without variables that configure a gateway or lead beyond this machine."""
    dropped = ("EMBEDDING_GATEWAY", "PROMETHEUS_MULTIPROC_DIR", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
