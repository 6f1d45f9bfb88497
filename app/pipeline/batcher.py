"""The batcher: a data loader between callers and upstream calls.

An input already in flight is awaited, not embedded again. Inputs of different requests share calls. Slot first,
then batch: inputs queue while no slot is free, and the queue fills the next call. There are no timers: inputs that
arrive in one turn of the event loop, or in a few consecutive turns, go together.

Calls run in the batcher's own tasks, so a caller that hangs up fails nobody. Inputs that nobody waits for any more
are dropped before they are sent.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby
from operator import attrgetter
from typing import NamedTuple, TypeAlias

from app import tokens
from app.clock import Clock
from app.errors import GatewayError, RateLimited, UpstreamUnavailable
from app.metrics import Metrics
from app.pipeline.deployment import requirements
from app.pipeline.outcome import collect, deadline_error, is_fatal, refuses_too_many
from app.pipeline.queue import LANES, TARGET_BATCH, CallRecord, Job, Queue, Queues, QueueSet, Waiter, make_batch
from app.pipeline.rotation import Slot
from app.pipeline.route import Route
from app.tasks import Tasks
from app.types import Batch, BatchResult, Embedding, EmbedRequest, EmbedResult, Lane, Source


class _Grouping(NamedTuple):
    gather_turns: int
    """Turns of the event loop that an input waits for others to join it. It never waits for time to pass."""
    release_size: int
    """Requests answered in one turn. Callers answered together ask again together, and then hold each other up."""


_LARGE_GROUPS, _SMALL_GROUPS = _Grouping(2, 16), _Grouping(1, 4)
"""Large groups while upstream calls are short and the cost per call dominates. Small groups while they are long and
leave time to spare: callers then stay out of each other's way."""
LONG_CALL = 0.01
"""Seconds from which a call counts as long."""

_Call: TypeAlias = tuple[Batch, list[Job], Slot, Lane]
"""An upstream call: its batch, the jobs in it, its slot, and the lane it was made for."""


class Batcher:
    """Embeds requests over a model's route. Admission (`app.pipeline.admit`) bounds what may queue.

    `on_drop` is called with the keys of inputs that nobody waits for any more: unless a caller joins one before its
    turn, it will not be embedded."""

    def __init__(
        self, route: Route, metrics: Metrics, clock: Clock, on_drop: Callable[[Sequence[bytes]], None] = lambda _: None
    ) -> None:
        self._route, self._rotation = route, route.rotation
        self._clock, self._on_drop = clock, on_drop
        self._jobs: dict[bytes, Job] = {}
        self._scheduled = False
        self._arrived = self._gathered = self._turns_left = 0
        self._grouping = _LARGE_GROUPS
        self._crowded = False
        """Whether several requests came together last time: they may do so again."""
        self._wake_task: asyncio.Task[None] | None = None
        self._wake_at = 0.0
        self._last_served = 0.0
        """When it last got a slot. Of the batchers waiting for one, the least recently served goes first."""
        self._abandoned = 0
        """Inputs abandoned by their callers since the queues were last swept."""
        self._tasks = Tasks()
        # An input waits for whichever deployment is free first, and is counted under the preferred one.
        upstream = route.rotation.deployments[0].upstream
        waiting = {lane: metrics.queued_inputs.labels(upstream, lane) for lane in LANES}
        self._queues = Queues(waiting)

    async def __call__(self, request: EmbedRequest) -> EmbedResult:
        reason = self._rotation.closed_reason(request.params)
        if reason is not None:
            raise _closed_error(reason)
        waiter = Waiter(asyncio.get_running_loop().create_future(), collect_too_long=request.collect_too_long)
        jobs, sources = self._join_or_enqueue(request, waiter)
        try:
            await waiter.future
        except asyncio.CancelledError:
            if asyncio.get_running_loop().time() < request.deadline:
                # It waited for these as they failed, so nobody else has been told.
                self._on_drop([job.key for job in jobs if isinstance(job.outcome, GatewayError)])
                raise
            raise deadline_error(jobs, request) from None
        finally:
            if waiter.missing:
                self._abandon(waiter, jobs)
        if not waiter.missing and Source.INFLIGHT in sources:
            _attribute_cost(jobs, sources, waiter)
        return collect(jobs, sources, request)

    def in_flight(self, key: bytes) -> bool:
        """Whether an input is being embedded, or somebody waits for it, and its embedding may be cached."""
        job = self._jobs.get(key)
        return job is not None and job.store and bool(job.waiters or job.call_record)

    @property
    def busy(self) -> bool:
        """Whether anything is queued or in flight."""
        return bool(self._tasks or self._jobs)

    async def aclose(self) -> None:
        """Waits for the calls in flight: they are paid for, and their results go to the cache."""
        if self._wake_task is not None:
            self._wake_task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _join_or_enqueue(self, request: EmbedRequest, waiter: Waiter) -> tuple[list[Job], list[Source]]:
        """Returns each input's job, in flight already or newly queued, and its source. An input that may be cached
        does not join one that may not. A query promotes the bulk work it joins. The waiter waits for all of them."""
        jobs: list[Job] = []
        new: list[Job] = []
        sources: list[Source] = []
        known, deadline, added, store = self._jobs, request.deadline, (waiter,), request.write_cache
        for key, text in zip(request.keys, request.inputs, strict=True):
            job = known.get(key)
            if job is None or (store and not job.store):
                job = known[key] = Job(key, text, deadline, added, store)
                new.append(job)
                sources.append(Source.UPSTREAM)
            else:
                sources.append(Source.INFLIGHT)
                if job.waiters[-1:] != added:  # once, even if the request repeats the input
                    job.waiters += added
                    waiter.missing += 1
                    job.deadline = max(job.deadline, deadline)
            jobs.append(job)
        waiter.missing += len(new)
        if new:
            self._arrived += 1
            self._queues.put((request.model, request.params, request.write_cache), request.lane, new, deadline)
            self._schedule()
            if TARGET_BATCH <= len(new) <= self._rotation.deployments[0].limits.max_batch:
                self._turns_left = 0  # do not wait for others: the upstream works while they are read
        if len(new) < len(jobs) and request.lane == "query" and self._queues.promote(jobs):
            self._schedule()  # a slot that bulk work must leave to queries may be free
        return jobs, sources

    def _abandon(self, waiter: Waiter, jobs: Iterable[Job]) -> None:
        """The request no longer waits. Inputs that nobody else waits for are dropped when they reach the front of
        their queue, or all at once when they are more than half of all inputs here."""
        unwanted: list[bytes] = []
        for job in dict.fromkeys(jobs):
            if job.outcome is None:
                index = job.waiters.index(waiter)  # in C: a thousand waiters may leave at once
                job.waiters = job.waiters[:index] + job.waiters[index + 1 :]
                self._abandoned += not job.waiters
                if not (job.waiters or job.call_record):
                    unwanted.append(job.key)
        self._on_drop(unwanted)
        if 2 * self._abandoned > len(self._jobs):
            self._abandoned = 0
            self._forget(self._queues.drop_all_abandoned())

    def _schedule(self) -> None:
        """Fills slots at the end of this turn of the event loop; if several requests came together last time, at the
        end of the first turn that brings no more, or after a few turns."""
        if not self._scheduled:
            self._scheduled = True
            self._turns_left, self._gathered = self._grouping.gather_turns if self._crowded else 0, 0
            self._tasks.start(self._dispatch())

    async def _dispatch(self) -> None:
        """Gathers the inputs that arrive together and makes the calls that have slots. The first call runs in this
        task: in one of its own it would start a turn later."""
        while self._keep_gathering():  # noqa: ASYNC110  # a few turns at most
            await asyncio.sleep(0)
        calls = self._fill_slots()
        for call in calls[1:]:
            self._tasks.start(self._run_call(*call))
        if calls:
            await self._run_call(*calls[0])

    def _keep_gathering(self) -> bool:
        """Whether to wait another turn for more requests."""
        arrived, self._arrived = self._arrived, 0
        self._gathered += arrived
        if arrived and self._turns_left:
            self._turns_left -= 1
            return True
        self._crowded = self._gathered > 1
        return False

    def _fill_slots(self) -> list[_Call]:
        """Takes slots and fills each with the fullest legal batch, queries first, while there are inputs that can get
        one."""
        self._scheduled = False
        # Read before slots are taken: a rest that ended in between would be neither used nor waited for.
        rest_times = [
            (queue_set, self._rotation.rest_times(queue_set.params))
            for queue_set in self._queues.queue_sets.values()
            if queue_set.has_inputs
        ]
        waiting = self._queues.by_key
        calls: list[_Call] = []
        while waiting and (call := self._next_call("query") or self._next_call("bulk")):
            calls.append(call)
        if calls:
            self._last_served = self._clock.monotonic()
        if calls and waiting:
            # Again: these calls have been charged since the rest times were read.
            self._schedule()
        elif waiting:
            self._rotation.when_free(self._schedule, self._last_served)
            for queue_set, times in rest_times:
                if queue_set.has_inputs:
                    self._wait_out(queue_set, times)
        return calls

    def _wait_out(self, queue_set: QueueSet, rest_times: Sequence[float]) -> None:
        """Wakes up when the first resting deployment is back from a rate limit, an ejection or its pace; a slot may
        come free earlier. If all of them rest, callers that cannot wait that long fail now."""
        if reason := self._rotation.closed_reason(queue_set.params):
            # The deployments were taken out while these callers queued: they fail now, as new callers do.
            for _, jobs in self._queues.take_expiring(queue_set, math.inf):
                self._refuse(jobs, _closed_error(reason))
        elif rest := min(rest_times, default=0.0):
            self._refuse_late(queue_set, rest)
        if ends := [rest for rest in rest_times if rest]:
            self._wake_in(min(ends))

    def _refuse_late(self, queue_set: QueueSet, rest: float) -> None:
        """Refuses the requests that cannot wait for the `rest` of all deployments. Each is told to wait for what stays
        queued and for those refused before it, as if they all came back in this order."""
        late = self._queues.take_expiring(queue_set, asyncio.get_running_loop().time() + rest)
        ahead = {queue: queue.size() for queue in chain(*queue_set.round_robin.values())}
        for queue, jobs in late:
            for _, request in groupby(jobs, key=lambda job: job.waiters[:1]):
                refused = list(request)
                wait = max(rest, self._rotation.time_for(queue_set.params, ahead.values()))
                self._refuse(
                    refused, RateLimited("every upstream of this model is at its rate limit", retry_after=wait)
                )
                inputs, size = ahead.get(queue, (0, 0.0))
                size += sum(tokens.upper_bound(job.input) for job in refused)
                ahead[queue] = inputs + len(refused), size

    def _refuse(self, jobs: list[Job], error: GatewayError) -> None:
        self._deliver(jobs, BatchResult([error] * len(jobs), calls=0))

    def _wake_in(self, seconds: float) -> None:
        at = self._clock.monotonic() + seconds
        if self._wake_task is not None:
            if self._wake_at <= at:
                return
            self._wake_task.cancel()
        self._wake_at = at
        self._wake_task = asyncio.get_running_loop().create_task(self._wake(seconds))

    async def _wake(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
        self._wake_task = None
        self._rotation.wake()
        self._schedule()

    def _next_call(self, lane: Lane) -> _Call | None:
        """A call for the least recently served queue that has inputs in this lane and can get a slot."""
        queues = [
            candidate
            for queue_set in self._queues.queue_sets.values()
            if (candidate := self._next_queue(queue_set, lane))
        ]
        if len(queues) > 1:
            queues.sort(key=attrgetter("sequence"))
        for queue in queues:
            slot = self._rotation.take(lane, queue.params)
            if slot is None:  # nor would the other queues of its set get one
                continue
            slots, limits = slot.deployment.slots, slot.deployment.limits
            tokens_per_call = slots.pace.tokens_per_call() if slots.pace else None
            # While bulk work has calls of its own, queries need not wait for a full one, unless a pace counts calls.
            queries_only = (
                lane == "query" and not slots.pace and queue.queue_set.bulk_in_flight(self._clock.monotonic())
            )
            lanes = LANES[:1] if queries_only else LANES
            jobs, dropped = queue.take(
                limits, scarce=not slots.has_spare(lane), tokens_per_call=tokens_per_call, lanes=lanes
            )
            if dropped:
                self._forget(dropped)
            call_record = CallRecord(1, ())
            for job in jobs:
                job.call_record = call_record
            batch = make_batch(queue.batch_key, jobs)
            slot.charge(batch.inputs)
            self._queues.reschedule(queue, served=True)
            if lane == "bulk":
                queue.queue_set.begin_bulk(self._clock.monotonic())
            return batch, jobs, slot, lane
        return None

    def _next_queue(self, queue_set: QueueSet, lane: Lane) -> Queue | None:
        """The next queue to serve in this lane, of those with an input that somebody waits for."""
        while queue := next(iter(queue_set.round_robin[lane]), None):
            dropped = queue.drop_abandoned()
            if not dropped:
                break
            self._forget(dropped)
            self._queues.reschedule(queue)
        return queue

    def _forget(self, dropped: Iterable[Job]) -> None:
        gone = [job for job in dropped if self._jobs.get(job.key) is job]
        for job in gone:
            del self._jobs[job.key]
        if requeued := [job.key for job in gone if job.call_record]:  # of the others `_abandon` has told
            self._on_drop(requeued)

    async def _run_call(self, batch: Batch, jobs: list[Job], slot: Slot, lane: Lane) -> None:
        result: BatchResult | None = None
        try:
            started = time.perf_counter()
            result = await self._route.run(batch, slot, lane)
            self._grouping = _SMALL_GROUPS if time.perf_counter() - started > LONG_CALL else _LARGE_GROUPS
        finally:
            # Whatever happened, even a bug of ours, nobody may be left waiting.
            if lane == "bulk":
                self._queues.queue_sets[requirements(batch.params)].end_bulk()
            if result is not None and result.late:
                jobs, result = self._requeue(batch, jobs, result)
            self._deliver(jobs, result)

    def _requeue(self, batch: Batch, jobs: list[Job], result: BatchResult) -> tuple[list[Job], BatchResult]:
        """Requeues inputs whose call was cut off by its first callers' deadline, or could not be retried before it, if
        callers with more time have joined since. Returns the other jobs and their result."""
        requeued: list[Job] = []
        done: list[Job] = []
        outcomes: list[Embedding | GatewayError] = []
        for job, outcome in zip(jobs, result.outcomes, strict=True):
            failed = not isinstance(outcome, Embedding) and outcome.retryable
            if failed and job.waiters and job.deadline > batch.deadline:
                requeued.append(job)
            else:
                done.append(job)
                outcomes.append(outcome)
        for lane in LANES:
            if jobs := [job for job in requeued if job.bulk is (lane == "bulk")]:
                self._queues.put((batch.model, batch.params, batch.store), lane, jobs, batch.deadline)
                self._schedule()
        return done, BatchResult(outcomes, result.calls, deployments=result.deployments)

    def _deliver(self, jobs: list[Job], result: BatchResult | None) -> None:
        """Records the outcomes and releases the requests that have all of theirs, a fatal one, or too many
        that are refused."""
        if result is None:
            result = BatchResult([GatewayError("internal error while embedding")] * len(jobs))
        call_record = CallRecord(result.calls, result.deployments)
        known = self._jobs
        ready: list[Waiter] = []
        unwanted: list[bytes] = []
        for job, outcome in zip(jobs, result.outcomes, strict=True):
            job.outcome, job.call_record = outcome, call_record
            if known.get(job.key) is job:
                del known[job.key]
            fatal = False
            if type(outcome) is not Embedding:
                fatal = is_fatal(outcome)
                ready += [waiter for waiter in job.waiters if refuses_too_many(waiter, outcome)]
                if not job.waiters and job.key not in known:
                    unwanted.append(job.key)
            for waiter in job.waiters:
                waiter.missing -= 1
                if fatal or not waiter.missing:
                    ready.append(waiter)
        self._release(ready)
        if unwanted:
            self._on_drop(unwanted)

    def _release(self, ready: list[Waiter]) -> None:
        """Releases `release_size` of them in each turn of the event loop."""
        now, later = ready[: self._grouping.release_size], ready[self._grouping.release_size :]
        for waiter in now:
            waiter.release()
        if later:
            asyncio.get_running_loop().call_soon(self._release, later)


def _attribute_cost(jobs: Sequence[Job], sources: list[Source], waiter: Waiter) -> None:
    """The caller that has waited longest for an input pays for it. One that joined an input in flight pays nothing,
    unless all callers before it have hung up."""
    seen = set()
    for i, job in enumerate(jobs):
        if sources[i] is Source.INFLIGHT and job.waiters[0] is waiter and job.key not in seen:
            sources[i] = Source.UPSTREAM
        seen.add(job.key)


def _closed_error(reason: str) -> UpstreamUnavailable:
    """The error while nothing is embedded until further notice."""
    return UpstreamUnavailable(f"no deployment of this model takes traffic: {reason}", retry_after=60)
