"""A bounded handful of connections to one server, none of which is used again after a fault.

Knows no URL, no command and no library: connections are made by what is handed in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol, TypeAlias

CONNECT_TIMEOUT = 2.0
"""Seconds a handshake may take. Longer than a look-up waits: one that gives up leaves its connection to the next."""

Command: TypeAlias = tuple[bytes, ...]


class Connection(Protocol):
    """As much of redis-py's `AbstractConnection` as is used here."""

    @property
    def is_connected(self) -> bool: ...

    async def connect(self) -> None: ...

    async def disconnect(self, nowait: bool = False) -> None: ...

    async def can_read(self) -> bool: ...

    def pack_commands(self, commands: Iterable[Command]) -> list[bytes]: ...

    async def send_packed_command(self, command: Iterable[bytes], check_health: bool = True) -> None: ...

    async def read_response(self) -> object: ...


class Connections:
    """At most `limit` connections, made by `make` when needed. A `refusal` is raised for a reply that is an error. One
    that is `moved` says that the server is not, or no longer, the one to ask: no connection to it is kept."""

    def __init__(
        self,
        make: Callable[[], Connection],
        limit: int,
        refusal: type[Exception],
        moved: tuple[type[Exception], ...] = (),
    ) -> None:
        self._make = make
        self._refusal = refusal
        self._moved = moved
        # One slot per possible connection: an idle one, or None, the right to open one. Last in, first out: what was
        # used last is least likely to have been closed by the other side.
        self._slots: asyncio.LifoQueue[Connection | None] = asyncio.LifoQueue()
        for _ in range(limit):
            self._slots.put_nowait(None)
        self._opening: set[asyncio.Task[Connection]] = set()
        self._closed = False

    async def exchange(self, commands: Sequence[Command]) -> list[object]:
        """Sends all commands in one go and reads a reply for each; a refusal is among them as it came.

        Raises what the connection raises where there is no whole conversation. However that comes to pass, by a
        fault or by cancellation, the connection is closed: no reply is left for the next one to read
        (CVE-2023-28858).
        """
        connection = await self._take()
        replies: list[object] = []
        moved = False
        try:
            await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            for _ in commands:
                try:
                    replies.append(await connection.read_response())
                except self._refusal as refusal:
                    replies.append(refusal)
                    moved = moved or isinstance(refusal, self._moved)
        except BaseException as fault:
            await self._discard(connection)
            if isinstance(fault, Exception):
                # What killed this one has most likely killed those that lie idle.
                await self.drop_idle()
            raise
        if moved or self._closed:
            await self._discard(connection)
        else:
            self._slots.put_nowait(connection)
        if moved:
            await self.drop_idle()
        return replies

    async def drop_idle(self) -> None:
        """Closes what is not in use, so that the next command goes where the name leads by now."""
        slots = [self._slots.get_nowait() for _ in range(self._slots.qsize())]
        for connection in slots:
            if connection is None:
                self._slots.put_nowait(None)
            else:
                await self._discard(connection)

    async def close(self) -> None:
        """Closes what is idle or being opened now, and what is in use when it comes back."""
        self._closed = True
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        # One that was just opened is put back in the next turn of the event loop; from Python 3.12 on gather gives none
        # where all is done.
        await asyncio.sleep(0)
        await self.drop_idle()

    async def _take(self) -> Connection:
        while True:
            connection = await self._slots.get()
            if connection is None:
                return await self._open()
            # Anything to read, if only the end, means it is out of step or dead.
            usable = False
            try:
                with suppress(Exception):
                    usable = connection.is_connected and not await connection.can_read()
            finally:
                if not usable:
                    await self._discard(connection)
            if usable:
                return connection

    async def _open(self) -> Connection:
        task = asyncio.create_task(self._connect())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._left_behind)
            raise
        except BaseException:
            self._slots.put_nowait(None)
            raise

    def _left_behind(self, task: asyncio.Task[Connection]) -> None:
        """A connection whose caller has gone is for the next one."""
        usable = not task.cancelled() and task.exception() is None
        self._slots.put_nowait(task.result() if usable else None)

    async def _connect(self) -> Connection:
        connection = self._make()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await connection.connect()
        except BaseException:
            # redis-py leaves the socket open when a handshake fails on a unix socket.
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def _discard(self, connection: Connection) -> None:
        """Closes without waiting for the other side, so that it cannot be cancelled half way."""
        try:
            with suppress(Exception):
                await connection.disconnect(nowait=True)
        finally:
            self._slots.put_nowait(None)
