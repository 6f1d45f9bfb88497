"""A TCP proxy that delays, cuts and refuses on command. Knows no protocol above TCP and changes no byte."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Self


@dataclass(frozen=True, slots=True)
class Trouble:
    """What the proxy does to the pieces (at most 64 KiB each) that it passes on.

    `delay`: each waits up to this many seconds. `cut`: the share of pieces that are cut short, and the connection
    reset. `refuse`: connections are reset as soon as they are made.
    """

    delay: float = 0.0
    cut: float = 0.0
    refuse: bool = False


CALM = Trouble()


class TcpProxy:
    """Listens in front of 127.0.0.1:`target`, in the running event loop; an async context manager."""

    def __init__(self, target: int, rng: random.Random) -> None:
        self.port = 0
        self.trouble = CALM
        self._target, self._rng = target, rng
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def sever(self) -> None:
        """Resets all open connections, as a firewall does that loses its table."""
        for writer in list(self._open):
            self._reset(writer)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if self.trouble.refuse:
                self._reset(writer)
                return
            try:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            except OSError:  # nothing listens there, so refuse as well
                self._reset(writer)
                return
            self._open.add(far_writer)
            try:
                await self._both(reader, writer, far_reader, far_writer)
            finally:
                self._open.discard(far_writer)
                far_writer.transport.abort()
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _both(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        """Passes pieces both ways. If either side ends, both do: HTTP and Redis never half-close."""
        ways = [
            asyncio.create_task(self._pass(reader, far_writer)),
            asyncio.create_task(self._pass(far_reader, writer)),
        ]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            if any(way.result() for way in done):
                self._reset(writer)
                self._reset(far_writer)
            else:
                for end in (writer, far_writer):
                    with contextlib.suppress(OSError):
                        end.write_eof()
                        await end.drain()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Returns whether to reset the connection."""
        try:
            while piece := await reader.read(65536):
                trouble = self.trouble
                if trouble.delay:
                    await asyncio.sleep(self._rng.uniform(0, trouble.delay))
                if trouble.cut and self._rng.random() < trouble.cut:
                    writer.write(piece[: self._rng.randrange(len(piece))])
                    await writer.drain()
                    return True
                writer.write(piece)
                await writer.drain()
        except OSError:
            return True
        return False

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        """Ends with RST instead of FIN."""
        sock = writer.get_extra_info("socket")
        if sock is not None and not writer.transport.is_closing():
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
