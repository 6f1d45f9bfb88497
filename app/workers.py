"""Worker processes: kept alive, told to reload and to stop. Knows neither the ASGI server nor the application.

A pair of sockets joins parent and worker. The worker says once that it is up. The parent says when to reload,
and by closing its end, which it also does by dying, when to stop without hurry. Signals are for hurry alone:
so whoever signals a whole group of processes, as systemd does, gives no order twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from app import metrics

log = logging.getLogger(__name__)

UP, RELOAD = b"u", b"r"
LONGEST_PAUSE = 30.0
"""Seconds before a worker that cannot start is started again, at most."""


class Orders:
    """A worker's end: what its parent tells it."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)

    def follow(self, *, stop: Callable[[], None], reload: Callable[[], None]) -> None:
        """Calls these in the running event loop when the parent says so. `stop` when it is gone, too."""
        loop = asyncio.get_running_loop()

        def told() -> None:
            try:
                said = self._socket.recv(64)
            except BlockingIOError:
                return
            except OSError:
                said = b""
            if RELOAD in said:
                reload()
            if not said:
                loop.remove_reader(self._socket)
                stop()

        self._socket.setblocking(False)
        loop.add_reader(self._socket, told)

    def report_up(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.send(UP)


class _Worker:
    """The parent's end of one process."""

    def __init__(self, process: asyncio.subprocess.Process, ours: socket.socket) -> None:
        self.process, self._ours = process, ours
        self.was_up = False
        asyncio.get_running_loop().add_reader(ours, self.listen)

    def listen(self) -> None:
        """Takes in what it has said, or that it will say no more."""
        try:
            said = self._ours.recv(1)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        self.was_up |= said == UP
        if not said:
            asyncio.get_running_loop().remove_reader(self._ours)

    def reload(self) -> None:
        with contextlib.suppress(OSError):
            self._ours.send(RELOAD)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """To be called when it has ended."""
        self.listen()
        asyncio.get_running_loop().remove_reader(self._ours)
        self._ours.close()


class Workers:
    """`count` processes behind `listener`, each replaced when it ends by itself.

    `command` gives the command line of one, from the number of the descriptor that its orders come on. Metrics of
    all are merged over files in a directory of this run's own.
    """

    def __init__(self, command: Callable[[int], list[str]], count: int, listener: socket.socket) -> None:
        self._command, self._count, self._listener = command, count, listener
        self._live: set[_Worker] = set()
        self._stopping = asyncio.Event()
        self._have_served = False
        self._code = 0

    async def run(self) -> int:
        """Until `stop`, or until it is clear that they cannot start. Returns the exit code."""
        with tempfile.TemporaryDirectory(prefix="embedding-gateway-") as directory:
            metrics.share(directory)
            try:
                self._environ = {**os.environ, "PYTHONPATH": _python_path()}
                await asyncio.gather(*(self._keep() for _ in range(self._count)))
            finally:
                metrics.unshare()
        return self._code

    def reload(self) -> None:
        for worker in self._live:
            worker.reload()

    def stop(self, number: signal.Signals) -> None:
        """In order the first time, unless it is Ctrl-C; after that the workers are told not to wait. One that is still
        starting cannot take a signal yet and has no request: it finds the order to stop, or is ended at once."""
        again = self._stopping.is_set()
        for worker in self._live:
            with contextlib.suppress(ProcessLookupError):
                if worker.was_up and (again or number == signal.SIGINT):
                    worker.process.send_signal(number)
                elif again:
                    worker.process.kill()
        if number == signal.SIGINT:
            self._code = 130
        self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        self._listener.close()  # they have it: when the last of them has closed it, nobody must be kept waiting here
        for worker in self._live:
            worker.stop()

    async def _keep(self) -> None:
        """One worker, and the next in its place."""
        pause = 0.5
        while not self._stopping.is_set():
            try:
                worker = await self._start()
            except OSError as error:
                log.error("a worker cannot be started: %s", error.strerror)
                await self._rest(LONGEST_PAUSE)
                continue
            code = await worker.process.wait()
            worker.close()
            self._live.discard(worker)
            metrics.forget_process(worker.process.pid)
            if self._stopping.is_set():
                return
            if not worker.was_up and not self._have_served and not any(each.was_up for each in self._live):
                log.error("workers cannot start")
                self._code = code or 1
                self._stop()
                return
            self._have_served = True
            log.warning("worker %d %s and is replaced", worker.process.pid, _ended(code))
            pause = 0.5 if worker.was_up else min(LONGEST_PAUSE, pause * 2)
            if not worker.was_up:
                await self._rest(pause)

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                env=self._environ,
                pass_fds=(self._listener.fileno(), theirs.fileno()),
                start_new_session=True,  # a terminal's Ctrl-C is for the parent, which tells them
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        worker = _Worker(process, ours)
        self._live.add(worker)
        if self._stopping.is_set():
            worker.stop()
        return worker


def _python_path() -> str:
    """So that a worker finds this very package, and not another `app` where it was started."""
    own = str(Path(metrics.__file__).parent.parent)
    return os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    return f"was ended by {signal.Signals(-code).name}"


def python(*arguments: str) -> list[str]:
    """A command line that runs this program again."""
    return [sys.executable, "-P", "-m", "app", *arguments]
