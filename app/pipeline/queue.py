"""Inputs on their way to an upstream call, and who waits for them: the batcher's own data, which decides nothing."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count, islice
from typing import TypeAlias

from msgspec import Struct

from app import tokens
from app.errors import GatewayError
from app.metrics import BufferedCounter
from app.pipeline.deployment import BatchSpace, CallLimits, Kind, kind
from app.types import Embedding, Input, Lane, Params

LANES: tuple[Lane, Lane] = ("query", "bulk")
"""In the order in which they are served."""
TARGET_BATCH = 128
"""Inputs that make a call worth its while. Requests share a larger one only where calls are scarce, for each of them
waits for the whole reply."""

BULK_STALL = 10.0
"""Seconds since the last call for bulk work began, after which those under way are taken for hanging."""

PASSED = 16
"""Inputs without room in a call after which it goes; until then smaller ones behind them are taken."""


class CallRecord(Struct, eq=False):
    """What became of an upstream call: shared by all inputs in it."""

    calls: int
    deployments: tuple[str, ...]
    """Names of those that embedded it."""


class Waiter(Struct, eq=False):
    """A request waiting for its inputs: one future, however many they are."""

    future: asyncio.Future[None]
    missing: int = 0
    """Inputs still to come."""

    def release(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class Job(Struct, eq=False):
    """One input on its way, from the first request that wants it to its outcome."""

    key: bytes
    input: Input
    deadline: float
    waiters: tuple[Waiter, ...]
    """A tuple, because nearly all inputs of a request have the same one."""
    store: bool
    """Whether what comes may be cached."""
    sent: bool = False
    """Whether it has been in an upstream call."""
    call_record: CallRecord | None = None
    outcome: Embedding | GatewayError | None = None


BatchKey: TypeAlias = tuple[str, Params, bool]
"""What inputs must have in common to share a call: public model, parameters, whether to store."""


class QueueSet:
    """The groups whose parameters are of one kind, which the same deployments serve: where one of them gets no slot
    none does."""

    __slots__ = ("_bulk", "_bulk_began", "earliest_deadline", "params", "turns")

    def __init__(self, params: Params) -> None:
        """`params`: those of any of the groups."""
        self.params = params
        self.turns: dict[Lane, OrderedDict[Queue, None]] = {lane: OrderedDict() for lane in LANES}
        """By lane, the queues that have inputs in it, the next to be served first."""
        self.earliest_deadline: dict[Lane, float] = dict.fromkeys(LANES, math.inf)
        """By lane, the earliest deadline its inputs may have: before it is due a backlog is not looked through."""
        self._bulk, self._bulk_began = 0, 0.0
        """Calls under way that were made for bulk work, and when the last of them began."""

    def begin_bulk(self, now: float) -> None:
        """A call was made for bulk work."""
        self._bulk += 1
        self._bulk_began = now

    def end_bulk(self) -> None:
        self._bulk -= 1

    def bulk_goes(self, now: float) -> bool:
        """Whether bulk work has calls of its own under way that do not hang."""
        return self._bulk > 0 and now - self._bulk_began < BULK_STALL

    @property
    def waits(self) -> bool:
        """Whether there are inputs."""
        return any(self.turns.values())


class Queue:
    """Inputs of one group that wait for a slot, query lane first. `waiting` counts them for the metrics."""

    __slots__ = ("_waiting", "batch_key", "lanes", "queue_set", "turn")

    def __init__(
        self, batch_key: BatchKey, queue_set: QueueSet, turn: int, waiting: Mapping[Lane, BufferedCounter]
    ) -> None:
        """`turn`: lower than that of a queue that was served later."""
        self.batch_key, self.queue_set, self.turn = batch_key, queue_set, turn
        self.lanes: dict[Lane, deque[Job]] = {"query": deque(), "bulk": deque()}
        self._waiting = waiting

    def size(self) -> tuple[int, float]:
        """How many inputs there are, and about how many bytes: a backlog may be long, so the first of each lane stand
        for all."""
        size = 0.0
        for jobs in self.lanes.values():
            first = [tokens.upper_bound(job.input) for job in islice(jobs, TARGET_BATCH)]
            size += sum(first) * len(jobs) / max(1, len(first))
        return sum(map(len, self.lanes.values())), size

    def drop_abandoned(self) -> list[Job]:
        """Takes inputs nobody waits for off the front of each lane, and returns them."""
        dropped: list[Job] = []
        for lane, jobs in self.lanes.items():
            if jobs and not jobs[0].waiters:
                before = len(jobs)
                while jobs and not jobs[0].waiters:
                    dropped.append(jobs.popleft())
                self._waiting[lane].dec(before - len(jobs))
        return dropped

    def drop_all_abandoned(self) -> list[Job]:
        """Takes out all inputs nobody waits for, and returns them."""
        return [job for lane in LANES for job in self._take_out(lane, lambda job: not job.waiters)]

    def take_expiring(self, lane: Lane, before: float) -> list[Job]:
        """Takes out the inputs of this lane whose callers wait no longer than `before`."""
        return self._take_out(lane, lambda job: job.deadline <= before)

    def _take_out(self, lane: Lane, which: Callable[[Job], bool]) -> list[Job]:
        jobs = self.lanes[lane]
        found = [job for job in jobs if which(job)]
        if found:
            stay = [job for job in jobs if not which(job)]
            self._waiting[lane].dec(len(found))
            jobs.clear()
            jobs.extend(stay)
        return found

    def take(
        self, limits: CallLimits, *, scarce: bool, tokens_per_call: float | None = None, lanes: Sequence[Lane] = LANES
    ) -> tuple[list[Job], list[Job]]:
        """The fullest batch that is legal within `limits`, and abandoned inputs met on the way. Where calls are not
        `scarce`, no request's inputs are added to others' beyond what is `TARGET_BATCH`. `tokens_per_call`: tokens, by
        estimate, that the upstream's pace lets a call carry.

        Bulk inputs fill up a batch of queries, where both `lanes` are asked for. One input over the token limit, or the
        portion, goes alone.
        """
        most = limits.max_batch
        first = list(islice(chain.from_iterable([self.lanes[lane] for lane in lanes]), most))
        waited_for = [job.waiters for job in first]
        if len(first) > TARGET_BATCH and not scarce:
            most = _enough(waited_for)
            del first[most:], waited_for[most:]
        inputs = [job.input for job in first]
        fits = tokens_per_call is None or sum(tokens.estimates(inputs)) <= tokens_per_call
        if fits and all(waited_for) and limits.surely_allow(inputs):
            self._drop(len(first))
            return first, []
        return self._pick(limits, most, tokens_per_call, lanes)

    def _drop(self, count: int) -> None:
        """Takes so many off the front."""
        for lane, jobs in self.lanes.items():
            some = min(count, len(jobs))
            if some:
                for _ in range(some):
                    jobs.popleft()
                self._waiting[lane].dec(some)
                count -= some

    def _pick(
        self, limits: CallLimits, most: int, tokens_per_call: float | None, lanes: Sequence[Lane]
    ) -> tuple[list[Job], list[Job]]:
        """`most` inputs, or as many as are legal, looking at each. A few that have no room left are passed over, and
        are first in the next call. Where tokens have to be waited for (`tokens_per_call`) none is: each has its
        turn."""
        batch: list[Job] = []
        dropped: list[Job] = []
        room, most_passed = BatchSpace(limits, tokens_per_call), PASSED if tokens_per_call is None else 1
        for lane in lanes:
            jobs = self.lanes[lane]
            before = len(jobs)
            passed: list[Job] = []
            while jobs and len(batch) < most and len(passed) < most_passed:
                job = jobs.popleft()
                if not job.waiters:
                    dropped.append(job)
                elif room.take(job.input):
                    batch.append(job)
                else:
                    passed.append(job)
            jobs.extendleft(reversed(passed))
            self._waiting[lane].dec(before - len(jobs))
        return batch, dropped


class Queues:
    """All of a batcher's, one for each group that has inputs."""

    def __init__(self, waiting: Mapping[Lane, BufferedCounter]) -> None:
        self._waiting, self._numbers = waiting, count()
        self.by_key: dict[BatchKey, Queue] = {}
        self.queue_sets: dict[Kind, QueueSet] = {}

    def put(self, batch_key: BatchKey, lane: Lane, jobs: list[Job], earliest_deadline: float) -> None:
        """`earliest_deadline`: none of them has a deadline before this, now or later."""
        queue = self.by_key.get(batch_key)
        if queue is None:
            of_kind = kind(batch_key[1])
            queue_set = self.queue_sets.get(of_kind)
            if queue_set is None:
                queue_set = self.queue_sets[of_kind] = QueueSet(batch_key[1])
            queue = self.by_key[batch_key] = Queue(batch_key, queue_set, next(self._numbers), self._waiting)
        queue_set, waiting = queue.queue_set, queue.lanes[lane]
        if not waiting:
            queue_set.turns[lane][queue] = None
        waiting.extend(jobs)
        self._waiting[lane].inc(len(jobs))
        if earliest_deadline < queue_set.earliest_deadline[lane]:
            queue_set.earliest_deadline[lane] = earliest_deadline

    def reschedule(self, queue: Queue, *, served: bool = False) -> None:
        """Keeps the queue's place in a lane only where it has inputs left; if it was `served`, behind all others."""
        turns, left = queue.queue_set.turns, False
        for lane, jobs in queue.lanes.items():
            if not jobs:
                turns[lane].pop(queue, None)
                continue
            left = True
            if served:
                turns[lane].move_to_end(queue)
        if not left:
            del self.by_key[queue.batch_key]
        elif served:
            queue.turn = next(self._numbers)

    def drop_all_abandoned(self) -> list[Job]:
        """Takes out all inputs nobody waits for, and returns them."""
        dropped: list[Job] = []
        for queue in list(self.by_key.values()):
            dropped += queue.drop_all_abandoned()
            self.reschedule(queue)
        return dropped

    def take_expiring(self, queue_set: QueueSet, before: float) -> list[tuple[Queue, list[Job]]]:
        """Takes out the inputs whose callers wait no longer than `before`, of each queue that has any."""
        due: list[tuple[Queue, list[Job]]] = []
        for lane, turns in queue_set.turns.items():
            if queue_set.earliest_deadline[lane] > before:
                continue
            for queue in list(turns):
                if jobs := queue.take_expiring(lane, before):
                    due.append((queue, jobs))
                    self.reschedule(queue)
            queue_set.earliest_deadline[lane] = min(
                [job.deadline for queue in turns for job in queue.lanes[lane]], default=math.inf
            )
        return due


def _enough(waiters: Sequence[tuple[Waiter, ...]]) -> int:
    """How many of these inputs, told by who waits for each, are enough for a call: those of one request at least, and
    of whole ones. There are more than `TARGET_BATCH`."""

    def begins(place: int) -> bool:
        return waiters[place][:1] != waiters[place - 1][:1]

    several = next(filter(begins, range(TARGET_BATCH, 0, -1)), None)
    return several or next(filter(begins, range(TARGET_BATCH + 1, len(waiters))), len(waiters))
