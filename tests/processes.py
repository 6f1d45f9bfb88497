"""The program as users start it: a process of its own, on a free port, in a directory of the test."""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx

T = TypeVar("T")

ROOT = Path(__file__).parent.parent
PATIENCE = 30.0
"""Seconds within which whatever a process does must have been observed."""


def environment(**more: str) -> dict[str, str]:
    """The program's environment: only the vendors' variables that a test sets, and no proxy of the machine's."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**keep, "PYTHONPATH": str(ROOT), **more}


def run(*arguments: str, env: Mapping[str, str] | None = None, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        env=environment(**(env or {})), cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    """Limits this process, and those it starts meanwhile, to `soft` of this resource (`resource.RLIMIT_…`)."""
    before, hard = resource.getrlimit(what)
    resource.setrlimit(what, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (before, hard))


class Program(subprocess.Popen[str]):
    """A process that is killed at the end of the `with` block that uses it."""

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        self.wait(PATIENCE)


def start(cwd: Path, *arguments: str, log: str = "log", **env: str) -> Program:
    """Starts `serve`, without a drain unless `env` says otherwise. Its log goes to the file `log` in `cwd`."""
    with (cwd / log).open("a") as file:
        return start_into(file.fileno(), cwd, *arguments, **env)


def start_into(stderr: int, cwd: Path, *arguments: str, **env: str) -> Program:
    """Does the same with the log going to a file descriptor."""
    return Program(
        [sys.executable, "-m", "app", "serve", *arguments],
        env=environment(**{"EMBEDDING_GATEWAY__SERVER__DRAIN": "0s", **env}), cwd=cwd, stderr=stderr, text=True,
    )  # fmt: skip


@contextmanager
def serving(cwd: Path, *arguments: str, **env: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serves a gateway on a free port: its URL and its process. Its log is the file `log` in `cwd`."""
    process = start(cwd, "--port", "0", *arguments, **env)
    try:
        yield address(cwd / "log", process), process
    finally:
        process.terminate()
        process.wait(PATIENCE)


def address(log: Path, process: subprocess.Popen[str]) -> str:
    """The address that the program logs, once it answers there."""

    def answering() -> str | None:
        logged = re.search(r"base_url (http://\S+)/v1", log.read_text())
        if logged and answers(logged[1] + "/healthz"):
            return logged[1]
        assert process.poll() is None, log.read_text()
        return None

    return until(answering, log.read_text)


def answers(url: str) -> bool:
    with httpx.Client(trust_env=False) as client:
        try:
            client.get(url)
        except httpx.TransportError:
            return False
    return True


def until(look: Callable[[], T | None], why: Callable[[], object]) -> T:
    """Calls `look` twenty times a second until it returns something; fails with `why()` after `PATIENCE`."""
    for _ in range(int(PATIENCE * 20)):
        if found := look():
            return found
        time.sleep(0.05)  # there is no event of another process to wait for
    raise AssertionError(why())


def free_port() -> int:
    """A port that nobody else is given for a minute: a connection to it waits in TIME_WAIT. Who asks for this very port
    gets it, with SO_REUSEADDR as servers have it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = server.accept()
            accepted.close()  # first, so that it is this end that waits
        return port


def metric(text: str, name: str, *labels: str) -> float | None:
    """The sum of a metric's samples that have these labels (as `name="value"`), or None without any."""
    lines = re.findall(rf"(?m)^embedding_gateway_{name}(\{{.*\}})? (\S+)$", text)
    values = [float(value) for found, value in lines if all(label in found for label in labels)]
    return sum(values) if values else None
