"""Worker processes: kept alive, told their settings and when to stop. Knows neither the ASGI server nor the
application.

A pair of sockets joins parent and worker. The worker says that it is up, and goes on saying so: one that falls silent
is taken to hang for good, and is replaced like one that has died. The parent says what settings are in force, at first
and whenever they change: a worker that is started later has the same as its siblings, whatever the file holds by then.
By closing its end, which its death does too, the parent says to stop in order. Signals only hurry a worker: so a signal
to a whole group of processes, as systemd sends it, is not a second order to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from app import metrics
from app.config import Settings, UpstreamKind
from app.config.load import as_text
from app.config.source import ParentConfig, applicable

log = logging.getLogger(__name__)

UP = b"u"
HEARTBEAT_INTERVAL = 1.0
"""Seconds after which a worker says again that it is up."""
HEARTBEAT_TIMEOUT = 30.0
"""Seconds without a word from a worker that is up; after two such times in a row it is ended. Not after one, which may
have passed while this process and all the workers were suspended."""
LONGEST_PAUSE = 30.0
"""Seconds before a worker that cannot start is started again, at most."""

_SIZE = 4
"""Bytes before a message that say how many it has."""


class ParentChannel:
    """A worker's end: what its parent tells it."""

    def __init__(self, descriptor: int, kinds: Mapping[str, UpstreamKind]) -> None:
        """Waits for the first settings. Raises `EOFError` if the parent is gone."""
        self._socket = socket.socket(fileno=descriptor)
        self._received = bytearray()
        while (text := self._last()) is None:
            said = self._socket.recv(65536)
            if not said:
                raise EOFError
            self._received += said
        self.given = ParentConfig(text, kinds)
        """What the parent said last."""

    def follow(self, *, stop: Callable[[], None], reload: Callable[[], None]) -> None:
        """Calls these in the running event loop when the parent says so. `stop` when it is gone, too."""
        loop = asyncio.get_running_loop()

        def told() -> None:
            try:
                said = self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                said = b""
            self._received += said
            if (text := self._last()) is not None:
                self.given.text = text
                reload()
            if not said:
                loop.remove_reader(self._socket)
                stop()

        self._socket.setblocking(False)
        loop.add_reader(self._socket, told)

    def start_heartbeat(self) -> None:
        """Says so now, and again every `HEARTBEAT_INTERVAL` seconds as long as the event loop turns."""
        try:
            with contextlib.suppress(BlockingIOError):  # a parent that is suspended
                self._socket.send(UP)
        except OSError:
            return
        asyncio.get_running_loop().call_later(HEARTBEAT_INTERVAL, self.start_heartbeat)

    def _last(self) -> str | None:
        """The latest settings, of those that have arrived whole and were not given yet; None where there are none."""
        text = None
        while len(self._received) >= (end := _SIZE + int.from_bytes(self._received[:_SIZE])):
            text = self._received[_SIZE:end].decode()
            del self._received[:end]
        return text


class _Worker:
    """The parent's end of one process."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process, self._writer = process, writer
        self.was_up = False
        self._listening = asyncio.create_task(self._listen(reader))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Reads what the worker says until it has closed its end, and ends it if it hangs."""
        with contextlib.suppress(OSError):
            self.was_up = await reader.read(1) == UP
            silences = 0
            while silences < 2:
                try:
                    if not await asyncio.wait_for(reader.read(4096), HEARTBEAT_TIMEOUT):
                        return
                    silences = 0
                except TimeoutError:
                    silences += 1
            log.error("worker %d has hung for %g s and is ended", self.process.pid, 2 * HEARTBEAT_TIMEOUT)
            self.process.kill()

    def tell(self, settings: Settings) -> None:
        told = as_text(settings).encode()
        if not self._writer.is_closing():
            self._writer.write(len(told).to_bytes(_SIZE) + told)

    def stop(self) -> None:
        if not self._writer.is_closing():
            self._writer.write_eof()

    async def close(self) -> None:
        """To be called when it has ended."""
        await self._listening
        self._writer.close()


class Workers:
    """Processes behind `listener`, as many as `settings` say, each replaced when it ends by itself.

    `command` gives the command line of one, from the number of the descriptor that its orders come on.
    """

    def __init__(self, command: Callable[[int], list[str]], settings: Settings, listener: socket.socket) -> None:
        self._command, self._settings, self._listener = command, settings, listener
        self._live: set[_Worker] = set()
        self._stopping = asyncio.Event()
        self._have_served = False
        self._code = 0

    async def run(self) -> int:
        """Until `stop`, or until it is clear that they cannot start. Returns the exit code."""
        self._environ = {**os.environ, "PYTHONPATH": _python_path()}
        await asyncio.gather(*(self._keep(f"worker{i}") for i in range(self._settings.server.workers)))
        return self._code

    async def change(self, wanted: Settings) -> None:
        """Has all workers, and those to come, put these settings in force."""
        self._settings = applicable(self._settings, wanted)
        if not self._stopping.is_set():
            for worker in self._live:
                worker.tell(self._settings)

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

    async def _keep(self, name: str) -> None:
        """One worker, and the next in its place and by its name."""
        pause = 0.5
        while not self._stopping.is_set():
            try:
                worker = await self._start(name)
            except OSError as error:
                log.error("a worker cannot be started: %s", error.strerror)
                await self._rest(LONGEST_PAUSE)
                continue
            code = await worker.process.wait()
            await worker.close()
            self._live.discard(worker)
            metrics.forget_process(name)
            if self._stopping.is_set():
                return
            if not worker.was_up and not self._have_served and not any(each.was_up for each in self._live):
                log.error("workers cannot start: one %s", _ended(code))
                self._code = 128 - code if code < 0 else code or 1  # of a signal as shells tell it
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

    async def _start(self, name: str) -> _Worker:
        ours, theirs = socket.socketpair()
        try:
            # First of all, or a stop may come in between, which closes the listener.
            process = await asyncio.create_subprocess_exec(
                *self._command(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                env=self._environ | {metrics.PROCESS_NAME: name},
                pass_fds=(self._listener.fileno(), theirs.fileno()),
                start_new_session=True,  # a terminal's Ctrl-C is for the parent, which tells them
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        worker = _Worker(process, reader, writer)
        worker.tell(self._settings)
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


def own_command(*arguments: str) -> list[str]:
    """A command line that runs this program again."""
    return [sys.executable, "-P", "-m", "app", *arguments]
