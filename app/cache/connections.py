"""A bounded connection pool for one server. A connection is never reused after a fault.

Knows no URL, no command and no library: the caller supplies the connection factory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol, TypeAlias, TypeGuard

from app.tasks import Tasks

CONNECT_TIMEOUT = 2.0
"""Seconds a handshake may take. Longer than a lookup waits: a caller that gives up leaves it to the next one."""

Command: TypeAlias = tuple[bytes, ...]


class Connection(Protocol):
    """The part of redis-py's `AbstractConnection` that is used here."""

    @property
    def is_connected(self) -> bool: ...

    async def connect(self) -> None: ...

    async def disconnect(self, nowait: bool = False) -> None: ...

    async def can_read(self) -> bool: ...

    def pack_commands(self, commands: Iterable[Command]) -> list[bytes]: ...

    async def send_packed_command(self, command: Iterable[bytes], check_health: bool = True) -> None: ...

    async def read_response(self) -> object: ...


class Connections:
    """At most `limit` connections, made by `make` on demand. `refusal` is what a connection raises for an error reply.
    An error reply of a `moved` type says that this is the wrong server, or no longer the right one: no connection to it
    is kept."""

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
        # One slot per possible connection: an idle connection, or None, which permits opening one. Last in, first out:
        # the server is least likely to have closed the connection that was used last.
        self._slots: asyncio.LifoQueue[Connection | None] = asyncio.LifoQueue()
        for _ in range(limit):
            self._slots.put_nowait(None)
        self._opening = Tasks()
        self._closed = False

    async def exchange(self, commands: Sequence[Command]) -> list[object]:
        """Pipelines all commands and returns one reply per command; an error reply is returned, not raised.

        Raises what the connection raises if the exchange is not completed, or the error reply after which the server
        hung up. Whether a fault or a cancellation cut it short, the connection is then closed, so that no reply is left
        for the next caller to read (CVE-2023-28858).
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
                    moved = moved or isinstance(refusal, self._moved) or _is_last(refusal)
        except BaseException as fault:
            await self._discard(connection)
            if isinstance(fault, Exception):
                # What broke this connection has probably broken the idle ones as well.
                await self.drop_idle()
                if replies and _is_last(replies[-1]):
                    raise replies[-1] from None  # which says why the server hung up
            raise
        if moved or self._closed:
            await self._discard(connection)
        else:
            self._slots.put_nowait(connection)
        if moved:
            await self.drop_idle()
        return replies

    async def drop_idle(self) -> None:
        """Closes the idle connections, so that the next command goes where the host name now resolves to."""
        slots = [self._slots.get_nowait() for _ in range(self._slots.qsize())]
        for connection in slots:
            if connection is None:
                self._slots.put_nowait(None)
            else:
                await self._discard(connection)

    async def close(self) -> None:
        """Closes idle and opening connections now, and those in use when they are returned."""
        self._closed = True
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        # A connection that was just opened is put back in the next turn of the event loop, and from Python 3.12 on
        # `gather` does not yield when every task is done.
        await asyncio.sleep(0)
        await self.drop_idle()

    async def _take(self) -> Connection:
        while True:
            connection = await self._slots.get()
            if connection is None:
                return await self._open()
            # Anything to read, even EOF, means the connection is out of step or dead.
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
        task = self._opening.start(self._connect())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._put_back)
            raise
        except BaseException:
            self._slots.put_nowait(None)
            raise

    def _put_back(self, task: asyncio.Task[Connection]) -> None:
        """Leaves a connection whose caller was cancelled to the next caller."""
        usable = not task.cancelled() and task.exception() is None
        self._slots.put_nowait(task.result() if usable else None)

    async def _connect(self) -> Connection:
        connection = self._make()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await connection.connect()
        except BaseException:
            # redis-py leaves the socket open when a handshake over a unix socket fails.
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def _discard(self, connection: Connection) -> None:
        """Closes without waiting for the server, so that cancellation cannot interrupt it halfway."""
        try:
            with suppress(Exception):
                await connection.disconnect(nowait=True)
        finally:
            self._slots.put_nowait(None)


def _is_last(reply: object) -> TypeGuard[Exception]:
    """Whether the server hangs up after this reply: a protocol error, or its protected mode."""
    return isinstance(reply, Exception) and str(reply).startswith(("Protocol error", "DENIED "))
