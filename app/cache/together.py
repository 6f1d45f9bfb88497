"""Questions to a server or a file: those of one turn of the event loop are asked together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")

_HEAVY = 8
"""Times `most` that heavy questions under way weigh in all, unless there is only one. More at once would share the same
network and the same event loop, and none of them would be answered in the time that it has."""


class Together(Generic[Q, A]):
    """`answer` gives one answer per question; it is called in a task of its own, so that a caller who hangs up takes
    nobody's answer along. Should it fail, all are told `nothing`.

    Those that go together weigh `most` at most, by what `weigh` says of each; a heavier one goes alone, and waits its
    turn until few of its kind are under way. The others never wait for these.

    `gone` is told of a question that was answered when its asker had hung up: of the answer, and of the questions of
    those who were answered with it.
    """

    def __init__(
        self,
        answer: Callable[[list[Q]], Awaitable[Sequence[A]]],
        nothing: A,
        most: int,
        weigh: Callable[[Q], int] = lambda _: 1,
        gone: Callable[[Q, A, list[Q]], None] = lambda *_: None,
    ) -> None:
        self._answer, self._nothing, self._most, self._weigh = answer, nothing, most, weigh
        self._gone = gone
        self._next: list[tuple[Q, asyncio.Future[A]]] | None = None
        self._weight = 0
        self._line = asyncio.Lock()
        """Heavy ones, in the order they came."""
        self._under_way = 0
        """What those of them weigh that have had their turn."""
        self._over = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, question: Q) -> A:
        """Its answer, or `nothing` where there is none. Raises nothing but `CancelledError`."""
        weight = self._weigh(question)
        if self._next is None or self._weight + weight > self._most:
            self._next, self._weight = [], 0
            task = asyncio.get_running_loop().create_task(self._run(self._next, weight))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        asked = self._next
        asked.append((question, future))
        self._weight += weight
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled():  # the answer has come in this very turn
                self._gone(question, future.result(), [each for each, other in asked if _stayed(other, future)])
            raise

    async def close(self) -> None:
        """Gives up what is under way."""
        await asyncio.sleep(0)  # a task that is cancelled before it has begun would tell nobody
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, asked: list[tuple[Q, asyncio.Future[A]]], weight: int) -> None:
        """`weight`: of the first of them."""
        if self._next is asked:
            self._next = None
        try:
            if weight <= self._most:
                await self._tell(asked)
            else:
                await self._in_turn(asked, weight)
        finally:
            for _, future in asked:
                if not future.done():
                    future.set_result(self._nothing)

    async def _in_turn(self, asked: list[tuple[Q, asyncio.Future[A]]], weight: int) -> None:
        async with self._line:
            while self._under_way and self._under_way + weight > _HEAVY * self._most:
                self._over.clear()
                await self._over.wait()
            self._under_way += weight
        try:
            await self._tell(asked)
        finally:
            self._under_way -= weight
            self._over.set()

    async def _tell(self, asked: list[tuple[Q, asyncio.Future[A]]]) -> None:
        asked = [each for each in asked if not each[1].done()]  # of those who have hung up, nothing is asked
        if asked:
            answers = await self._answer([question for question, _ in asked])
            for (_, future), answer in zip(asked, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
            for (question, future), answer in zip(asked, answers, strict=True):
                if future.cancelled():
                    self._gone(question, answer, [each for each, other in asked if _stayed(other, future)])


def _stayed(other: asyncio.Future[A], gone: asyncio.Future[A]) -> bool:
    return other is not gone and not other.cancelled()
