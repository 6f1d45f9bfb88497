"""A plain TCP load balancer, as small as can be: asks `/readyz`, hands out connections in turn, knows no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

PROBE = 0.1
"""Seconds between two looks at a backend."""


class Balancer:
    """Backends on loopback, by port, each once it is watched. Connections go to those whose last `/readyz` said 200; a
    connection, once made, stays where it is."""

    def __init__(self) -> None:
        self.ready: set[int] = set()
        self.changed = asyncio.Condition()
        """Told when `ready` has changed."""
        self._turn = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection, from end to end. Without a backend that takes it, it is closed: no second try,
        as in Kubernetes."""
        ready = sorted(self.ready)
        self._turn += 1
        async with _closing(writer):
            if ready:
                await _join(reader, writer, ready[self._turn % len(ready)])

    async def watch(self, port: int) -> None:
        while True:
            ready = await _is_ready(port)
            if ready != (port in self.ready):
                async with self.changed:
                    (self.ready.add if ready else self.ready.discard)(port)
                    self.changed.notify_all()
            await asyncio.sleep(PROBE)


async def _join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    theirs, ours = await asyncio.open_connection("127.0.0.1", port)
    async with _closing(ours):
        there = asyncio.create_task(_pipe(reader, ours))
        try:
            await _pipe(theirs, writer)  # a backend that closes ends it; a client that has said all may still wait
        finally:
            there.cancel()
            await asyncio.gather(there, return_exceptions=True)


@contextlib.asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """The connection closed at the end, also of a cancelled one; one that broke meanwhile is no error."""
    try:
        with contextlib.suppress(OSError):
            yield
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


async def _is_ready(port: int) -> bool:
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            async with _closing(writer):
                writer.write(b"GET /readyz HTTP/1.1\r\nhost: balancer\r\nconnection: close\r\n\r\n")
                return b" 200 " in await reader.readline()
    except (OSError, TimeoutError):
        pass
    return False


@contextlib.asynccontextmanager
async def balancing(ports: Sequence[int]) -> AsyncIterator[tuple[str, Balancer]]:
    """A balancer over these ports: its URL, and itself."""
    balancer = Balancer()
    server = await asyncio.start_server(balancer.serve, "127.0.0.1", 0)
    watches = [asyncio.create_task(balancer.watch(port)) for port in ports]
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", balancer
    finally:
        server.close()
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
