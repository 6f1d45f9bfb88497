"""Inputs waiting for an upstream call, and who waits for them: the batcher's data. Decides nothing."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, count, filterfalse, islice
from typing import TypeAlias

from msgspec import Struct

from app import tokens
from app.errors import GatewayError
from app.metrics import BufferedGauge
from app.pipeline.deployment import BatchSpace, CallLimits, Requirements, requirements
from app.types import Batch, Embedding, Input, Lane, Params

LANES: tuple[Lane, Lane] = ("query", "bulk")
"""In the order they are served."""
TARGET_BATCH = 128
"""Inputs that make a call worthwhile. Requests share a larger call only when calls are scarce, since each of them waits
for the whole reply."""

BULK_STALL = 10.0
"""Seconds since the last bulk call started, after which the bulk calls in flight are taken for hanging."""

MAX_PASSED_OVER = 16
"""A call goes once this many inputs have found no room in it; until then smaller ones behind them are taken."""


class CallRecord(Struct, eq=False):
    """An upstream call: one record, shared by all inputs in it."""

    calls: int
    """1 while it is in flight, then with its retries and parts."""
    deployments: tuple[str, ...]
    """Names of those that embedded it; empty while it is in flight."""


class Waiter(Struct, eq=False):
    """A request waiting for its inputs: one future, however many inputs there are."""

    future: asyncio.Future[None]
    missing: int = 0
    """Inputs still to come."""
    refused: int = 0
    """Inputs refused so far."""
    collect_too_long: bool = False
    """Whether inputs that are too long do not count as refused, as in `EmbedRequest`."""

    def release(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class Job(Struct, eq=False):
    """One input, from the first request that wants it to its outcome."""

    key: bytes
    input: Input
    deadline: float
    waiters: tuple[Waiter, ...]
    """A tuple, because nearly all inputs of a request share the same one."""
    store: bool
    """Whether its embedding may be cached."""
    bulk: bool = False
    """Whether it is in a bulk lane, or was when it was sent and no query has joined it since."""
    call_record: CallRecord | None = None
    """The last call it was in; None if it has only queued."""
    outcome: Embedding | GatewayError | None = None


BatchKey: TypeAlias = tuple[str, Params, bool]
"""What inputs must have in common to share a call: public model, parameters, whether to store."""


class QueueSet:
    """The queues whose parameters have the same requirements, so that the same deployments serve them: if one of them
    gets no slot, none does."""

    __slots__ = ("_bulk_calls", "_bulk_started", "earliest_deadline", "params", "round_robin")

    def __init__(self, params: Params) -> None:
        """`params`: those of any of the queues."""
        self.params = params
        self.round_robin: dict[Lane, OrderedDict[Queue, None]] = {lane: OrderedDict() for lane in LANES}
        """By lane, the queues with inputs in it, the next to be served first."""
        self.earliest_deadline: dict[Lane, float] = dict.fromkeys(LANES, math.inf)
        """By lane, a lower bound of its inputs' deadlines: a backlog is not scanned before then."""
        self._bulk_calls, self._bulk_started = 0, 0.0
        """Bulk calls in flight, and when the last of them started."""

    def begin_bulk(self, now: float) -> None:
        """Counts a call made for bulk work."""
        self._bulk_calls += 1
        self._bulk_started = now

    def end_bulk(self) -> None:
        self._bulk_calls -= 1

    def bulk_in_flight(self, now: float) -> bool:
        """Whether bulk calls are in flight and not hanging."""
        return self._bulk_calls > 0 and now - self._bulk_started < BULK_STALL

    @property
    def has_inputs(self) -> bool:
        """Whether any input is queued."""
        return any(self.round_robin.values())


class Queue:
    """Inputs with one batch key that wait for a slot, query lane first. `waiting` counts them for the metrics."""

    __slots__ = ("_waiting", "batch_key", "lanes", "params", "queue_set", "sequence")

    def __init__(
        self, batch_key: BatchKey, queue_set: QueueSet, sequence: int, waiting: Mapping[Lane, BufferedGauge]
    ) -> None:
        """`sequence`: lower than that of a queue served later."""
        self.batch_key, self.queue_set, self.sequence = batch_key, queue_set, sequence
        _, self.params, _ = batch_key
        self.lanes: dict[Lane, deque[Job]] = {"query": deque(), "bulk": deque()}
        self._waiting = waiting

    def size(self) -> tuple[int, float]:
        """The number of inputs, and of their bytes, roughly: a backlog may be long, so it is extrapolated from the
        first inputs of each lane."""
        size = 0.0
        for jobs in self.lanes.values():
            first = [tokens.upper_bound(job.input) for job in islice(jobs, TARGET_BATCH)]
            size += sum(first) * len(jobs) / max(1, len(first))
        return sum(map(len, self.lanes.values())), size

    def drop_abandoned(self) -> list[Job]:
        """Removes inputs nobody waits for from the front of each lane, and returns them."""
        dropped: list[Job] = []
        for lane, jobs in self.lanes.items():
            if jobs and not jobs[0].waiters:
                before = len(jobs)
                while jobs and not jobs[0].waiters:
                    dropped.append(jobs.popleft())
                self._waiting[lane].dec(before - len(jobs))
        return dropped

    def remove(self, lane: Lane, condition: Callable[[Job], bool]) -> list[Job]:
        """Removes the inputs of this lane that meet the condition, and returns them."""
        jobs = self.lanes[lane]
        removed = list(filter(condition, jobs))
        if removed:
            kept = list(filterfalse(condition, jobs))
            self._waiting[lane].dec(len(removed))
            jobs.clear()
            jobs.extend(kept)
        return removed

    def take(
        self, limits: CallLimits, *, scarce: bool, tokens_per_call: float | None = None, lanes: Sequence[Lane] = LANES
    ) -> tuple[list[Job], list[Job]]:
        """Takes the fullest batch that is legal within `limits`; also returns the abandoned inputs it met on the way.

        Unless calls are `scarce`, requests share a batch only up to `TARGET_BATCH` inputs. `tokens_per_call`: tokens,
        by estimate, that the upstream's pace lets a call carry. If both `lanes` are given, bulk inputs fill up a batch
        of queries. An input that exceeds the token limit, or `tokens_per_call`, goes alone.
        """
        max_inputs = limits.max_batch
        first = list(islice(chain.from_iterable([self.lanes[lane] for lane in lanes]), max_inputs))
        waited_for = [job.waiters for job in first]
        if len(first) > TARGET_BATCH and not scarce:
            max_inputs = _shared_size(waited_for)
            del first[max_inputs:], waited_for[max_inputs:]
        inputs = [job.input for job in first]
        fits = tokens_per_call is None or sum(tokens.estimates(inputs)) <= tokens_per_call
        if fits and all(waited_for) and limits.surely_allow(inputs):
            self._remove_first(len(first))
            return first, []
        return self._pick(limits, max_inputs, tokens_per_call, lanes)

    def _remove_first(self, count: int) -> None:
        """Removes the first `count` inputs."""
        for lane, jobs in self.lanes.items():
            taken = min(count, len(jobs))
            if taken:
                for _ in range(taken):
                    jobs.popleft()
                self._waiting[lane].dec(taken)
                count -= taken

    def _pick(
        self, limits: CallLimits, max_inputs: int, tokens_per_call: float | None, lanes: Sequence[Lane]
    ) -> tuple[list[Job], list[Job]]:
        """Takes `max_inputs` inputs, or as many as are legal, checking each. A few that do not fit are passed over, and
        come first in the next call. Where tokens have to be waited for (`tokens_per_call`) none is: each has its turn.
        """
        batch: list[Job] = []
        dropped: list[Job] = []
        room, max_passed_over = BatchSpace(limits, tokens_per_call), MAX_PASSED_OVER if tokens_per_call is None else 1
        for lane in lanes:
            jobs = self.lanes[lane]
            before = len(jobs)
            passed_over: list[Job] = []
            while jobs and len(batch) < max_inputs and len(passed_over) < max_passed_over:
                job = jobs.popleft()
                if not job.waiters:
                    dropped.append(job)
                elif room.take(job.input):
                    batch.append(job)
                else:
                    passed_over.append(job)
            jobs.extendleft(reversed(passed_over))
            self._waiting[lane].dec(before - len(jobs))
        return batch, dropped


class Queues:
    """All queues of a batcher, one for each batch key that has inputs."""

    def __init__(self, waiting: Mapping[Lane, BufferedGauge]) -> None:
        self._waiting, self._numbers = waiting, count()
        self.by_key: dict[BatchKey, Queue] = {}
        self.queue_sets: dict[Requirements, QueueSet] = {}

    def put(self, batch_key: BatchKey, lane: Lane, jobs: list[Job], earliest_deadline: float) -> None:
        """`earliest_deadline`: none of them has a deadline before this, now or later."""
        queue = self.by_key.get(batch_key)
        if queue is None:
            _, params, _ = batch_key
            required = requirements(params)
            queue_set = self.queue_sets.get(required)
            if queue_set is None:
                queue_set = self.queue_sets[required] = QueueSet(params)
            queue = self.by_key[batch_key] = Queue(batch_key, queue_set, next(self._numbers), self._waiting)
        queue_set, waiting = queue.queue_set, queue.lanes[lane]
        if not waiting:
            queue_set.round_robin[lane][queue] = None
        waiting.extend(jobs)
        if lane == "bulk":
            for job in jobs:
                job.bulk = True
        self._waiting[lane].inc(len(jobs))
        if earliest_deadline < queue_set.earliest_deadline[lane]:
            queue_set.earliest_deadline[lane] = earliest_deadline

    def promote(self, jobs: Iterable[Job]) -> bool:
        """Moves those of these inputs that are queued as bulk work to the query lane. Returns whether there are any.
        They may be in several queues: public names that lead to the same deployments share inputs."""
        wanted = {job for job in jobs if job.bulk}
        for job in wanted:
            job.bulk = False  # also if it is in flight: a backlog is not searched for it again
        promoted = False
        for queue in list(self.by_key.values()) if wanted else ():
            if found := queue.remove("bulk", wanted.__contains__):
                self.put(queue.batch_key, "query", found, min(job.deadline for job in found))
                self.reschedule(queue)
                promoted = True
        return promoted

    def reschedule(self, queue: Queue, *, served: bool = False) -> None:
        """Removes the queue from lanes in which it has no inputs left; in others it goes last if it was `served`."""
        round_robin, left = queue.queue_set.round_robin, False
        for lane, jobs in queue.lanes.items():
            if not jobs:
                round_robin[lane].pop(queue, None)
                continue
            left = True
            if served:
                round_robin[lane].move_to_end(queue)
        if not left:
            del self.by_key[queue.batch_key]
        elif served:
            queue.sequence = next(self._numbers)

    def drop_all_abandoned(self) -> list[Job]:
        """Removes all inputs nobody waits for, and returns them."""
        dropped: list[Job] = []
        for queue in list(self.by_key.values()):
            for lane in LANES:
                dropped += queue.remove(lane, lambda job: not job.waiters)
            self.reschedule(queue)
        return dropped

    def take_expiring(self, queue_set: QueueSet, cutoff: float) -> list[tuple[Queue, list[Job]]]:
        """Removes the inputs whose callers wait no longer than `cutoff`, and returns them by queue."""
        due: list[tuple[Queue, list[Job]]] = []
        for lane, round_robin in queue_set.round_robin.items():
            if queue_set.earliest_deadline[lane] > cutoff:
                continue
            for queue in list(round_robin):
                if jobs := queue.remove(lane, lambda job: job.deadline <= cutoff):
                    due.append((queue, jobs))
                    self.reschedule(queue)
            queue_set.earliest_deadline[lane] = min(
                [job.deadline for queue in round_robin for job in queue.lanes[lane]], default=math.inf
            )
        return due


def _shared_size(waiters: Sequence[tuple[Waiter, ...]]) -> int:
    """How many of these inputs, each given by who waits for it, make a shared call: whole requests up to
    `TARGET_BATCH` inputs, or the first request alone if it has more. There are more inputs than that."""

    def starts_request(index: int) -> bool:
        return waiters[index][:1] != waiters[index - 1][:1]

    boundary = next(filter(starts_request, range(TARGET_BATCH, 0, -1)), None)
    return boundary or next(filter(starts_request, range(TARGET_BATCH + 1, len(waiters))), len(waiters))


def make_batch(batch_key: BatchKey, jobs: list[Job]) -> Batch:
    """The batch of one upstream call for these jobs."""
    model, params, store = batch_key
    deadline = max([job.deadline for job in jobs])

    def later_deadline() -> float:
        return min([job.deadline for job in jobs if job.waiters and job.deadline > deadline], default=math.inf)

    return Batch(
        model=model,
        inputs=[job.input for job in jobs],
        keys=[job.key for job in jobs],
        params=params,
        store=store,
        deadline=deadline,
        still_wanted=lambda: any(job.waiters for job in jobs),
        shared=lambda: len({job.waiters for job in jobs}) > 1,
        later_deadline=later_deadline,
    )
