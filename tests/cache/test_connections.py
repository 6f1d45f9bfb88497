"""Whenever its caller leaves, neither a connection nor the slot to open one is lost."""

import asyncio
from collections.abc import Iterable

import pytest

from app.cache.connections import Command, Connections
from tests.clock import settle


class Hand:
    """A connection that waits at every step that may wait, until `go` is set."""

    def __init__(self) -> None:
        self.is_connected = False
        self.go = asyncio.Event()

    async def connect(self) -> None:
        await self.go.wait()
        self.is_connected = True

    async def disconnect(self, nowait: bool = False) -> None:
        assert nowait
        self.is_connected = False

    async def can_read(self) -> bool:
        await self.go.wait()
        return False

    def pack_commands(self, commands: Iterable[Command]) -> list[bytes]:
        return [b"".join(command) for command in commands]

    async def send_packed_command(self, command: Iterable[bytes], check_health: bool = True) -> None:
        """Sends nothing."""

    async def read_response(self) -> object:
        return b"OK"


class Refusal(Exception):
    """A reply that is an error."""


class Made:
    """A pool with one slot, and all connections made for it."""

    def __init__(self) -> None:
        self.all: list[Hand] = []
        self.connections = Connections(self._make, 1, Refusal)

    def _make(self) -> Hand:
        self.all.append(Hand())
        return self.all[-1]

    async def ask(self) -> object:
        return await self.connections.exchange([(b"PING",)])


async def gone(asking: asyncio.Task[object]) -> None:
    """Cancels the caller once it is waiting."""
    await settle()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_one_that_was_opened_for_a_caller_who_has_gone_is_closed_with_the_others() -> None:
    made = Made()
    await gone(asyncio.create_task(made.ask()))
    made.all[0].go.set()
    await asyncio.sleep(0)  # it is connected, and its caller does not know yet
    assert made.all[0].is_connected
    await made.connections.close()
    await settle()
    assert not made.all[0].is_connected


async def test_one_that_is_in_use_when_all_are_closed_is_closed_when_it_comes_back() -> None:
    made = Made()
    opening = asyncio.create_task(made.ask())
    await settle()
    made.all[0].go.set()
    await opening
    made.all[0].go.clear()
    asking = asyncio.create_task(made.ask())
    await settle()
    await made.connections.close()
    assert made.all[0].is_connected
    made.all[0].go.set()
    async with asyncio.timeout(5):
        assert await asking == [b"OK"]
    assert not made.all[0].is_connected


async def test_one_that_was_looked_at_for_a_caller_who_has_gone_makes_room() -> None:
    made = Made()
    opening = asyncio.create_task(made.ask())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    made.all[0].go.set()
    assert await opening == [b"OK"]
    made.all[0].go.clear()
    await gone(asyncio.create_task(made.ask()))
    assert not made.all[0].is_connected
    asking = asyncio.create_task(made.ask())
    await settle()
    made.all[1].go.set()
    async with asyncio.timeout(5):
        assert await asking == [b"OK"]
    await made.connections.close()
    assert not made.all[1].is_connected
