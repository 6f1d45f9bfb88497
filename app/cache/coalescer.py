"""Coalesces questions to a server or a file: those asked in one turn of the event loop, or while the concurrency limit
is reached, are answered together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from app.deadlines import Deadlines
from app.tasks import Tasks

Q = TypeVar("Q")
A = TypeVar("A")

_HEAVY_FACTOR = 8
"""All heavy questions in flight weigh at most this many times `max_weight`, unless there is only one. More would share
the same network and event loop, and none would be answered in time."""
_WAIT_FACTOR = 4
"""A question waits for its turn at most this many times as long as its answer may take: if questions arrive faster than
they are answered, the queue must not delay them without bound."""


class Coalescer(Generic[Q, A]):
    """`answer` returns one answer per question. It runs in a task of its own, so that a caller who hangs up cancels
    nobody else's answer. If it raises, all its callers get `nothing`.

    A group of questions weighs at most `max_weight`, the sum of `weigh` over them. A heavier question goes alone, and
    waits until few heavy ones are in flight. Light questions never wait for heavy ones, only until fewer than
    `max_groups` light groups are in flight; more questions may join a group while it waits.

    `time_limit` returns the seconds an answer to questions of a given weight may take. Questions that wait
    `_WAIT_FACTOR` times as long for their turn, not counting time in which this thread is itself at work, get `nothing`
    and are passed to `on_late`.

    `on_hang_up` is called for a question answered after its caller had hung up, with the question, its answer, and the
    questions in the same group whose callers stayed.
    """

    def __init__(
        self,
        answer: Callable[[list[Q]], Awaitable[Sequence[A]]],
        nothing: A,
        max_weight: int,
        max_groups: int,
        time_limit: Callable[[int], float],
        on_late: Callable[[list[Q]], None],
        weigh: Callable[[Q], int] = lambda _: 1,
        on_hang_up: Callable[[Q, A, list[Q]], None] = lambda *_: None,
    ) -> None:
        self._answer, self._nothing, self._max_weight, self._weigh = answer, nothing, max_weight, weigh
        self._time_limit, self._on_late, self._on_hang_up = time_limit, on_late, on_hang_up
        self._open_group: list[tuple[Q, asyncio.Future[A]]] | None = None
        """The last group in the queue, which questions may join until it is full or its turn comes."""
        self._open_weight = 0
        self._light, self._heavy = WeightedSemaphore(max_groups), WeightedSemaphore(_HEAVY_FACTOR * max_weight)
        self._deadlines = Deadlines()
        self._tasks = Tasks()

    async def ask(self, question: Q) -> A:
        """The answer, or `nothing` if there is none. Raises only `CancelledError`."""
        weight = self._weigh(question)
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        if weight > self._max_weight:
            group = [(question, future)]
            self._tasks.start(self._run(group, self._heavy, weight))
        else:
            if self._open_group is None or self._open_weight + weight > self._max_weight:
                self._open_group, self._open_weight = [], 0
                self._tasks.start(self._run(self._open_group, self._light, 1))
            group = self._open_group
            group.append((question, future))
            self._open_weight += weight
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled():  # the answer arrived in the turn in which the caller was cancelled
                self._on_hang_up(question, future.result(), [asked for asked, other in group if _stayed(other, future)])
            raise

    async def close(self) -> None:
        """Cancels all questions; their callers get `nothing`."""
        await asyncio.sleep(0)  # a task cancelled before its first step would never set its futures
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, group: list[tuple[Q, asyncio.Future[A]]], semaphore: WeightedSemaphore, weight: int) -> None:
        try:
            try:
                if not semaphore.try_acquire(weight):
                    with self._deadlines.io_timeout(_WAIT_FACTOR * self._time_limit(max(weight, self._max_weight))):
                        await semaphore.acquire(weight)
            except TimeoutError:
                self._on_late([question for question, future in group if not future.done()])
                return
            try:
                if self._open_group is group:
                    self._open_group = None
                await self._answer_group(group)
            finally:
                semaphore.release(weight)
        finally:
            if self._open_group is group:
                self._open_group = None
            for _, future in group:
                if not future.done():
                    future.set_result(self._nothing)

    async def _answer_group(self, group: list[tuple[Q, asyncio.Future[A]]]) -> None:
        group = [entry for entry in group if not entry[1].done()]  # drops callers who have hung up
        if group:
            answers = await self._answer([question for question, _ in group])
            for (_, future), answer in zip(group, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
            for (question, future), answer in zip(group, answers, strict=True):
                if future.cancelled():
                    self._on_hang_up(question, answer, [asked for asked, other in group if _stayed(other, future)])


def _stayed(other: asyncio.Future[A], cancelled: asyncio.Future[A]) -> bool:
    return other is not cancelled and not other.cancelled()


class WeightedSemaphore:
    """A FIFO semaphore for a total weight of `capacity`. A heavier holder is admitted alone."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._in_use = 0
        self._queue = asyncio.Lock()
        self._released = asyncio.Event()

    def try_acquire(self, weight: int) -> bool:
        """Acquires without waiting, or returns False."""
        if self._queue.locked() or not self._fits(weight):
            return False
        self._in_use += weight
        return True

    async def acquire(self, weight: int) -> None:
        """Waits behind earlier callers until `weight` fits."""
        async with self._queue:
            while not self._fits(weight):
                self._released.clear()
                await self._released.wait()
            self._in_use += weight

    def release(self, weight: int) -> None:
        self._in_use -= weight
        self._released.set()

    def _fits(self, weight: int) -> bool:
        return not self._in_use or self._in_use + weight <= self._capacity
