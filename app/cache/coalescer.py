"""Questions to a server or a file, asked together: those of one turn of the event loop, and those that come while as
many as may be are under way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from app.deadlines import Deadlines

Q = TypeVar("Q")
A = TypeVar("A")

_HEAVY = 8
"""Times `most` that all heavy questions under way may weigh, unless there is only one. More would share the same
network and event loop, and none of them would be answered in its time."""
_PATIENCE = 4
"""Times what an answer may take that a question waits for its turn: where answers are slower than questions come, the
line must not hold them up for as long as it is."""


class Coalescer(Generic[Q, A]):
    """`answer` gives one answer per question. It is called in a task of its own, so that a caller who hangs up takes
    nobody's answer along. Where it fails, all askers get `nothing`.

    Questions that go together weigh `most` at most, by what `weigh` says of each. A heavier one goes alone, and waits
    until few of its kind are under way. The light ones never wait for these, only until fewer than `at_once` groups of
    their own are under way; while a group waits more may join it.

    `limit` says how many seconds an answer to questions of a weight may take. Questions whose turn does not come in
    `_PATIENCE` times that, not counting the time that this thread is itself at work, get `nothing`, and `late` is told
    of them.

    `gone` is told of a question that was answered after its asker had hung up: with its answer, and the questions of
    the other askers who got theirs with it.
    """

    def __init__(
        self,
        answer: Callable[[list[Q]], Awaitable[Sequence[A]]],
        nothing: A,
        most: int,
        at_once: int,
        limit: Callable[[int], float],
        late: Callable[[list[Q]], None],
        weigh: Callable[[Q], int] = lambda _: 1,
        gone: Callable[[Q, A, list[Q]], None] = lambda *_: None,
    ) -> None:
        self._answer, self._nothing, self._most, self._weigh = answer, nothing, most, weigh
        self._limit, self._late, self._gone = limit, late, gone
        self._next: list[tuple[Q, asyncio.Future[A]]] | None = None
        """The last group in line, which others may join until it is full or its turn has come."""
        self._weight = 0
        self._light, self._heavy = WeightedSemaphore(at_once), WeightedSemaphore(_HEAVY * most)
        self._deadlines = Deadlines()
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, question: Q) -> A:
        """Its answer, or `nothing` where there is none. Raises nothing but `CancelledError`."""
        weight = self._weigh(question)
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        if weight > self._most:
            asked = [(question, future)]
            self._begin(asked, self._heavy, weight)
        else:
            if self._next is None or self._weight + weight > self._most:
                self._next, self._weight = [], 0
                self._begin(self._next, self._light, 1)
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

    def _begin(self, asked: list[tuple[Q, asyncio.Future[A]]], turns: WeightedSemaphore, weight: int) -> None:
        task = asyncio.get_running_loop().create_task(self._run(asked, turns, weight))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, asked: list[tuple[Q, asyncio.Future[A]]], turns: WeightedSemaphore, weight: int) -> None:
        try:
            try:
                if not turns.take(weight):
                    with self._deadlines.io_timeout(_PATIENCE * self._limit(max(weight, self._most))):
                        await turns.wait(weight)
            except TimeoutError:
                self._late([question for question, future in asked if not future.done()])
                return
            try:
                if self._next is asked:
                    self._next = None
                await self._tell(asked)
            finally:
                turns.give_back(weight)
        finally:
            if self._next is asked:
                self._next = None
            for _, future in asked:
                if not future.done():
                    future.set_result(self._nothing)

    async def _tell(self, asked: list[tuple[Q, asyncio.Future[A]]]) -> None:
        asked = [each for each in asked if not each[1].done()]  # without those of askers who have hung up
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


class WeightedSemaphore:
    """Turns for as many at once as weigh `most` together, or for a heavier one alone, in the order in which they
    came."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._under_way = 0
        self._line = asyncio.Lock()
        self._over = asyncio.Event()

    def take(self, weight: int) -> bool:
        """Whether it is this one's turn at once."""
        if self._line.locked() or not self._room(weight):
            return False
        self._under_way += weight
        return True

    async def wait(self, weight: int) -> None:
        """Until it is this one's turn."""
        async with self._line:
            while not self._room(weight):
                self._over.clear()
                await self._over.wait()
            self._under_way += weight

    def give_back(self, weight: int) -> None:
        self._under_way -= weight
        self._over.set()

    def _room(self, weight: int) -> bool:
        return not self._under_way or self._under_way + weight <= self._most
