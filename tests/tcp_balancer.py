"""A minimal TCP load balancer: probes `/readyz`, assigns connections in turn, knows no HTTP beyond the probe."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

PROBE = 0.1
"""Seconds between two probes of a backend."""


class Balancer:
    """Backends on loopback, by port. New connections go to watched backends whose last `/readyz` answered 200; an open
    connection stays where it is."""

    def __init__(self) -> None:
        self.ready: set[int] = set()
        self.changed = asyncio.Condition()
        """Notified when `ready` has changed."""
        self._turn = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one client's connection to its end. It is closed if there is no backend to take it: as in Kubernetes,
        there is no second try."""
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
    backend_reader, backend_writer = await asyncio.open_connection("127.0.0.1", port)
    async with _closing(backend_writer):
        upload = asyncio.create_task(_pipe(reader, backend_writer))
        try:
            await _pipe(
                backend_reader, writer
            )  # the backend's end is the end; a client that has sent everything may still wait
        finally:
            upload.cancel()
            await asyncio.gather(upload, return_exceptions=True)


@contextlib.asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Closes the connection at the end, also on cancellation; a connection that broke meanwhile is no error."""
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
    """Runs a balancer over these ports: its URL, and itself."""
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
