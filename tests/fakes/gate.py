"""A gate for tests of concurrency: calls wait at it until the test lets them pass."""

import asyncio
from collections import deque
from typing import Any

from .wire import Connection


class Gate:
    """Holds calls, first come first served. Used only in the server's event loop."""

    def __init__(self) -> None:
        self._held = False
        self._permits = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def hold(self) -> None:
        self._held = True

    def release(self, count: int | None) -> None:
        if count is None:
            self._held, self._permits, count = False, 0, len(self._waiting)
        while count and self._waiting:
            ticket = self._waiting.popleft()
            if not ticket.done():  # done if its peer has left
                ticket.set_result(None)
                count -= 1
        self._permits += count if self._held else 0

    async def wait(self, connection: Connection) -> None:
        if not self._held:
            return
        if self._permits:
            self._permits -= 1
            return
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(ticket)
        peer_left = asyncio.ensure_future(connection.gone.wait())
        either: set[asyncio.Future[Any]] = {ticket, peer_left}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            peer_left.cancel()
            ticket.cancel()
