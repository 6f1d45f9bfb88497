"""Worker processes: keeps them alive, sends them their settings and stops them. Knows neither the ASGI server nor the
application.

A socket pair connects parent and worker. The worker reports that it is up, and then sends heartbeats: one that falls
silent is presumed hung and is replaced like one that has died. The parent sends the settings in force, at the start and
whenever they change, so that a worker started later has the same as its siblings, whatever the file holds by then. By
closing its end, which its death does too, the parent tells the worker to stop gracefully. Signals only hurry a worker,
so a signal to a whole process group, as systemd sends it, is not a second order to stop.
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
"""Seconds between a worker's heartbeats."""
HEARTBEAT_TIMEOUT = 30.0
"""Seconds without a heartbeat from a worker that is up; it is killed after two such periods in a row. One may have
passed while this process and all workers were suspended."""
MAX_RESTART_DELAY = 30.0
"""Maximum delay in seconds before a worker that cannot start is started again."""

_LENGTH_BYTES = 4
"""Bytes of a message's length prefix."""


class ParentChannel:
    """A worker's end of the channel to its parent."""

    def __init__(self, descriptor: int, kinds: Mapping[str, UpstreamKind]) -> None:
        """Waits for the first settings. Raises `EOFError` if the parent is gone."""
        self._socket = socket.socket(fileno=descriptor)
        self._received = bytearray()
        while (text := self._latest_settings()) is None:
            data = self._socket.recv(65536)
            if not data:
                raise EOFError
            self._received += data
        self.config = ParentConfig(text, kinds)
        """The settings the parent sent last."""

    def follow(self, *, stop: Callable[[], None], reload: Callable[[], None]) -> None:
        """Calls these in the running event loop when the parent says so; `stop` also when the parent is gone."""
        loop = asyncio.get_running_loop()

        def on_readable() -> None:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            self._received += data
            if (text := self._latest_settings()) is not None:
                self.config.text = text
                reload()
            if not data:
                loop.remove_reader(self._socket)
                stop()

        self._socket.setblocking(False)
        loop.add_reader(self._socket, on_readable)

    def start_heartbeat(self) -> None:
        """Reports now that the worker is up, and again every `HEARTBEAT_INTERVAL` seconds while the event loop runs."""
        with contextlib.suppress(OSError):  # the parent is suspended or gone, or the system has no buffer for a moment
            self._socket.send(UP)
        asyncio.get_running_loop().call_later(HEARTBEAT_INTERVAL, self.start_heartbeat)

    def _latest_settings(self) -> str | None:
        """The latest settings to have arrived whole since the last call, or None."""
        text = None
        while len(self._received) >= (end := _LENGTH_BYTES + int.from_bytes(self._received[:_LENGTH_BYTES])):
            text = self._received[_LENGTH_BYTES:end].decode()
            del self._received[:end]
        return text


class _Worker:
    """The parent's handle on one worker process."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_up: Callable[[], None],
    ) -> None:
        self.process, self._writer, self._on_up = process, writer, on_up
        self.was_up = False
        self._heartbeats = asyncio.create_task(self._watch_heartbeats(reader))

    async def _watch_heartbeats(self, reader: asyncio.StreamReader) -> None:
        """Reads the worker's heartbeats until it closes its end, and kills it if it hangs."""
        with contextlib.suppress(OSError):
            self.was_up = await reader.read(1) == UP
            if self.was_up:
                self._on_up()
            silences = 0
            while silences < 2:
                try:
                    if not await asyncio.wait_for(reader.read(4096), HEARTBEAT_TIMEOUT):
                        return
                    silences = 0
                except TimeoutError:
                    silences += 1
            log.error("worker %d has hung for %g s and is killed", self.process.pid, 2 * HEARTBEAT_TIMEOUT)
            self.process.kill()

    def send_settings(self, settings: Settings) -> None:
        message = as_text(settings).encode()
        if not self._writer.is_closing():
            self._writer.write(len(message).to_bytes(_LENGTH_BYTES) + message)

    def stop(self) -> None:
        if not self._writer.is_closing():
            self._writer.write_eof()

    async def close(self) -> None:
        """To be called when the process has ended."""
        await self._heartbeats
        self._writer.close()


class Workers:
    """As many processes behind `listener` as `settings` say, each replaced when it ends by itself.

    `command` returns the command line of one, given the descriptor of its channel to this process. `on_listening` is
    called when the first of them is up.
    """

    def __init__(
        self,
        command: Callable[[int], list[str]],
        settings: Settings,
        listener: socket.socket,
        on_listening: Callable[[], None] = lambda: None,
    ) -> None:
        self._command, self._settings, self._listener = command, settings, listener
        self._on_listening: Callable[[], None] | None = on_listening
        self._live: set[_Worker] = set()
        self._stopping = asyncio.Event()
        self._any_started = False
        self._code = 0

    async def run(self) -> int:
        """Runs until `stop`, or until it is clear that workers cannot start. Returns the exit code."""
        self._environ = {**os.environ, "PYTHONPATH": _python_path()}
        await asyncio.gather(*(self._supervise(f"worker{i}") for i in range(self._settings.server.workers)))
        return self._code

    async def change(self, wanted: Settings) -> None:
        """Puts these settings in force in all workers, present and future."""
        self._settings = applicable(self._settings, wanted)
        if not self._stopping.is_set():
            for worker in self._live:
                worker.send_settings(self._settings)

    def stop(self, number: signal.Signals) -> None:
        """Stops the workers gracefully the first time, unless by Ctrl-C; after that they are told not to wait. One that
        is still starting cannot handle a signal yet and has no request: it finds its channel closed, or is killed."""
        repeated = self._stopping.is_set()
        self._close()
        for worker in self._live:
            with contextlib.suppress(ProcessLookupError):
                if worker.was_up and (repeated or number == signal.SIGINT):
                    worker.process.send_signal(number)  # alone: beside a closed channel it would be the second request
                elif repeated:
                    worker.process.kill()
                else:
                    worker.stop()
        if number == signal.SIGINT:
            self._code = 130

    def _close(self) -> None:
        self._stopping.set()
        self._listener.close()  # workers have it: once the last of them closes it, no client may be left waiting here

    async def _supervise(self, name: str) -> None:
        """Runs one worker and, as it ends, its replacements under the same name."""
        pause = 0.5
        while not self._stopping.is_set():
            try:
                worker = await self._start(name)
            except OSError as error:
                log.error("a worker cannot be started: %s", error.strerror)
                pause = min(MAX_RESTART_DELAY, pause * 2)
                await self._pause(pause)
                continue
            code = await worker.process.wait()
            await worker.close()
            self._live.discard(worker)
            metrics.forget_process(name)
            if self._stopping.is_set():
                return
            if not worker.was_up and not self._any_started and not any(each.was_up for each in self._live):
                log.error("workers cannot start: one %s", _describe_exit(code))
                self._code = 128 - code if code < 0 else code or 1  # death by a signal, as shells report it
                self._close()
                for each in self._live:
                    each.stop()
                return
            self._any_started = True
            log.warning("worker %d %s; starting another", worker.process.pid, _describe_exit(code))
            pause = 0.5 if worker.was_up else min(MAX_RESTART_DELAY, pause * 2)
            if not worker.was_up:
                await self._pause(pause)

    def _note_up(self) -> None:
        if self._on_listening is not None and not self._stopping.is_set():
            self._on_listening()
            self._on_listening = None

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _start(self, name: str) -> _Worker:
        parent_end, worker_end = socket.socketpair()
        try:
            # Before anything else is awaited, since a stop meanwhile would close the listener.
            process = await asyncio.create_subprocess_exec(
                *self._command(worker_end.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                env=self._environ | {metrics.PROCESS_NAME: name},
                pass_fds=(self._listener.fileno(), worker_end.fileno()),
                start_new_session=True,  # a terminal's Ctrl-C is for the parent, which tells its workers
            )
        except OSError:
            parent_end.close()
            raise
        finally:
            worker_end.close()
        reader, writer = await asyncio.open_unix_connection(sock=parent_end)
        worker = _Worker(process, reader, writer, self._note_up)
        worker.send_settings(self._settings)
        self._live.add(worker)
        if self._stopping.is_set():
            worker.stop()
        return worker


def _python_path() -> str:
    """A PYTHONPATH by which a worker finds this very package, not another `app` in its working directory."""
    own = str(Path(__file__).parent.parent)
    return os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    return f"was ended by {signal.Signals(-code).name}"


def own_command(*arguments: str) -> list[str]:
    """A command line that runs this program again."""
    return [sys.executable, "-P", "-m", "app", *arguments]
