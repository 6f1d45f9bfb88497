"""The batcher: a data loader between callers and upstream calls.

An input already on its way is awaited, not asked again. Inputs of different requests share calls. A slot
comes first and the batch second: while no slot is free inputs queue, and the queue is what fills the next
call. There are no timers: what arrives in one turn of the event loop, or in a few that follow, goes together.

Calls run in the batcher's own tasks, so a caller that hangs up fails nobody; inputs nobody waits for any
more are dropped before they are sent.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple, TypeAlias

from app.clock import Clock
from app.errors import GatewayError, Overloaded, RateLimited, UpstreamUnavailable
from app.metrics import Metrics
from app.pipeline.deployment import kind
from app.pipeline.outcome import collect, is_fatal
from app.pipeline.queue import LANES, TARGET_BATCH, BatchKey, CallRecord, Job, Queue, Queues, QueueSet, Waiter
from app.pipeline.route import Route, Slot
from app.types import Batch, BatchResult, Embedding, EmbedRequest, EmbedResult, Lane, Source

BULK = 16
"""A request with more inputs than this is bulk work unless its key says otherwise."""


class _Rhythm(NamedTuple):
    turns: int
    """Of the event loop, for which an input waits for others to arrive with it. It never waits for time to pass."""
    together: int
    """Requests answered in one turn: callers answered together ask again together, and then hold each other up."""


_LARGE_GROUPS, _SMALL_GROUPS = _Rhythm(2, 16), _Rhythm(1, 4)
"""Large ones for short upstream calls, where each call's cost is what counts. Small ones for long calls, during which
there is time to spare: callers then stay out of each other's way."""
LONG_CALL = 0.01
"""Seconds from which a call is long."""

_Call: TypeAlias = tuple[Batch, list[Job], Slot, Lane]
"""What an upstream call carries, and the slot it has."""


class Batcher:
    """Embeds requests over a model's route. What may queue is bounded by what is let in (`app.pipeline.admit`).

    `on_drop` is told the keys of inputs that nobody waits for any more and that will not be embedded."""

    def __init__(
        self, route: Route, metrics: Metrics, clock: Clock, on_drop: Callable[[Sequence[bytes]], None] = lambda _: None
    ) -> None:
        self._route, self._clock, self._on_drop = route, clock, on_drop
        self._jobs: dict[bytes, Job] = {}
        self._scheduled = False
        self._arrived = self._gathered = self._turns = 0
        self._rhythm = _LARGE_GROUPS
        self._crowded = False
        """Whether several requests came together the last time: then they may do so again."""
        self._alarm: asyncio.Task[None] | None = None
        self._alarm_at = 0.0
        self._served = 0.0
        """When it last had a slot: batchers that wait for one go in this order, the longest ago first."""
        self._abandoned = 0
        """Inputs that callers have left since they were last looked for."""
        self._tasks: set[asyncio.Task[None]] = set()
        # An input waits for whichever deployment is free first; it is counted where it would rather go.
        upstream = route.deployments[0].upstream
        waiting = {lane: metrics.buffered_counter(metrics.queued_inputs.labels(upstream, lane)) for lane in LANES}
        self._queues = Queues(waiting)

    async def __call__(self, request: EmbedRequest) -> EmbedResult:
        reason = self._route.closed_reason(request.params)
        if reason is not None:
            raise _closed(reason)
        waiter = Waiter(asyncio.get_running_loop().create_future())
        jobs, sources = self._enlist(request, waiter)
        try:
            await waiter.future
        except asyncio.CancelledError:
            if any(job.sent for job in jobs) or asyncio.get_running_loop().time() < request.deadline:
                raise
            # No upstream was slow: there was too much before it in the queue.
            raise Overloaded("no upstream call was free before the request's deadline", retry_after=1) from None
        finally:
            if waiter.missing:
                self._leave(waiter, jobs)
        if not waiter.missing and Source.INFLIGHT in sources:
            _reckon(jobs, sources, waiter)
        return collect(jobs, sources, request)

    def in_flight(self, key: bytes) -> bool:
        """Whether an input is being embedded or queues for that, and its embedding may be cached."""
        job = self._jobs.get(key)
        return job is not None and job.store

    @property
    def busy(self) -> bool:
        """Whether anything queues or is under way."""
        return bool(self._tasks or self._jobs)

    async def aclose(self) -> None:
        """Waits for the calls under way: they are paid for, and their results go to the cache."""
        if self._alarm is not None:
            self._alarm.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _enlist(self, request: EmbedRequest, waiter: Waiter) -> tuple[list[Job], list[Source]]:
        """A job per input: the one already on its way where there is one, a new one in the queue otherwise. An input
        that may be cached does not join one that may not. The waiter waits for all of them."""
        jobs: list[Job] = []
        new: list[Job] = []
        sources: list[Source] = []
        known, deadline, alone, store = self._jobs, request.deadline, (waiter,), request.write_cache
        for key, text in zip(request.keys, request.inputs, strict=True):
            job = known.get(key)
            if job is None or (store and not job.store):
                job = known[key] = Job(key, text, deadline, alone, store)
                new.append(job)
                sources.append(Source.UPSTREAM)
            else:
                sources.append(Source.INFLIGHT)
                if job.waiters[-1:] != alone:  # once, if the input is here twice
                    job.waiters += alone
                    waiter.missing += 1
                    job.deadline = max(job.deadline, deadline)
            jobs.append(job)
        waiter.missing += len(new)
        if new:
            self._arrived += 1
            lane = request.caller.lane or ("bulk" if len(request.inputs) > BULK else "query")
            self._queues.put((request.model, request.params, request.write_cache), lane, new, deadline)
            self._schedule()
            if TARGET_BATCH <= len(new) <= self._route.deployments[0].limits.max_batch:
                self._turns = 0  # it waits for no others: the upstream is at work while the next ones are read
        return jobs, sources

    def _leave(self, waiter: Waiter, jobs: Iterable[Job]) -> None:
        """The request waits no longer. Inputs that nobody else waits for are dropped when they come to the front of
        the queue, or all at once when they are more than half of what is here."""
        for job in dict.fromkeys(jobs):
            if job.outcome is None:
                place = job.waiters.index(waiter)  # in C: there may be a thousand, who all leave at once
                job.waiters = job.waiters[:place] + job.waiters[place + 1 :]
                self._abandoned += not job.waiters
        if 2 * self._abandoned > len(self._jobs):
            self._abandoned = 0
            self._forget(self._queues.drop_all_abandoned())

    def _schedule(self) -> None:
        """Fills slots at the end of this turn of the event loop; where several requests came together the last time,
        at the end of the first turn that brings no more, or after a few turns."""
        if not self._scheduled:
            self._scheduled = True
            self._turns, self._gathered = self._rhythm.turns if self._crowded else 0, 0
            self._start(self._serve())

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self) -> None:
        """Gathers what arrives together and makes the calls that there are slots for. It makes the first of them
        itself: in a task of its own it would begin a turn later."""
        while self._more():  # noqa: ASYNC110  # a few turns, at the most
            await asyncio.sleep(0)
        calls = self._pump()
        for each in calls[1:]:
            self._start(self._fly(*each))
        if calls:
            await self._fly(*calls[0])

    def _more(self) -> bool:
        """Whether to wait for another turn and what it may bring."""
        arrived, self._arrived = self._arrived, 0
        self._gathered += arrived
        if arrived and self._turns:
            self._turns -= 1
            return True
        self._crowded = self._gathered > 1
        return False

    def _pump(self) -> list[_Call]:
        """Takes slots and fills each with the fullest legal batch, queries first, as long as there are inputs that can
        have one."""
        self._scheduled = False
        # Asked before slots are: a rest that ended in between would be neither used nor waited for.
        rest_times = [
            (queue_set, self._route.rest_times(queue_set.params))
            for queue_set in self._queues.queue_sets.values()
            if queue_set.waits
        ]
        waiting = self._queues.by_key
        calls: list[_Call] = []
        while waiting and (call := self._call("query") or self._call("bulk")):
            calls.append(call)
        if calls:
            self._served = self._clock.monotonic()
        if calls and waiting:
            # Once more: how long the others must wait was asked before these calls were charged.
            self._schedule()
        elif waiting:
            self._route.when_free(self._schedule, self._served)
            for queue_set, rest in rest_times:
                if queue_set.waits:
                    self._wait_out(queue_set, rest)
        return calls

    def _wait_out(self, queue_set: QueueSet, rest_times: Sequence[float]) -> None:
        """Where deployments rest, after a rate limit or an ejection, or for their pace: waits until the first is back,
        though another one may come free before. Where all rest, callers that cannot wait so long are told now."""
        if reason := self._route.closed_reason(queue_set.params):
            # Callers that queue for deployments which were taken out since are told now, as new callers are.
            for _, jobs in self._queues.take_expiring(queue_set, math.inf):
                self._land(jobs, BatchResult([_closed(reason)] * len(jobs), calls=0))
        elif rest := min(rest_times, default=0.0):
            for queue, jobs in self._queues.take_expiring(queue_set, asyncio.get_running_loop().time() + rest):
                # The inputs that stay go first; a byte of them is about a quarter of a token.
                inputs, size = queue.size()
                wait = max(rest, self._route.time_for(queue_set.params, inputs + 1, size / 4))
                told = RateLimited("every upstream of this model is at its rate limit", retry_after=wait)
                self._land(jobs, BatchResult([told] * len(jobs), calls=0))
        if ends := [rest for rest in rest_times if rest]:
            self._wake_in(min(ends))

    def _wake_in(self, seconds: float) -> None:
        at = self._clock.monotonic() + seconds
        if self._alarm is not None:
            if self._alarm_at <= at:
                return
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = asyncio.get_running_loop().create_task(self._wake(seconds))

    async def _wake(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
        self._alarm = None
        self._route.wake()
        self._schedule()

    def _call(self, lane: Lane) -> _Call | None:
        """A call for the queue that was served longest ago, of those with inputs in this lane that can have a slot."""
        firsts = [first for queue_set in self._queues.queue_sets.values() if (first := self._first(queue_set, lane))]
        if len(firsts) > 1:
            firsts.sort(key=attrgetter("turn"))
        for queue in firsts:
            slot = self._route.take(lane, queue.batch_key[1])
            if slot is None:  # nor is there for the queues behind it in its line
                continue
            slots, limits = slot.deployment.slots, slot.deployment.limits
            tokens_per_call = slots.pace.tokens_per_call() if slots.pace else None
            # Bulk work that has calls of its own need not make queries wait for a full one, unless calls are counted.
            apart = lane == "query" and not slots.pace and queue.queue_set.bulk_goes(self._clock.monotonic())
            lanes = LANES[:1] if apart else LANES
            jobs, dropped = queue.take(
                limits, scarce=not slots.has_spare(lane), tokens_per_call=tokens_per_call, lanes=lanes
            )
            if dropped:
                self._forget(dropped)
            for job in jobs:
                job.sent = True
            batch = _batch(queue.batch_key, jobs)
            slot.charge(batch.inputs)
            self._queues.reschedule(queue, served=True)
            if lane == "bulk":
                queue.queue_set.begin_bulk(self._clock.monotonic())
            return batch, jobs, slot, lane
        return None

    def _first(self, queue_set: QueueSet, lane: Lane) -> Queue | None:
        """The queue whose turn is next in this lane, of those with an input that somebody waits for."""
        while queue := next(iter(queue_set.turns[lane]), None):
            dropped = queue.drop_abandoned()
            if not dropped:
                break
            self._forget(dropped)
            self._queues.reschedule(queue)
        return queue

    def _forget(self, dropped: Iterable[Job]) -> None:
        gone = [job.key for job in dropped if self._jobs.get(job.key) is job]
        for key in gone:
            del self._jobs[key]
        if gone:
            self._on_drop(gone)

    async def _fly(self, batch: Batch, jobs: list[Job], slot: Slot, lane: Lane) -> None:
        result: BatchResult | None = None
        try:
            began = time.perf_counter()
            result = await self._route.run(batch, slot, lane)
            self._rhythm = _SMALL_GROUPS if time.perf_counter() - began > LONG_CALL else _LARGE_GROUPS
        finally:
            # Whatever happened, even a bug of ours: nobody may be left waiting.
            if lane == "bulk":
                self._queues.queue_sets[kind(batch.params)].end_bulk()
            if result is not None and result.late:
                jobs, result = self._put_again(batch, jobs, result, lane)
            self._land(jobs, result)

    def _put_again(
        self, batch: Batch, jobs: list[Job], result: BatchResult, lane: Lane
    ) -> tuple[list[Job], BatchResult]:
        """Where the deadline of the first callers has ended a call, or left no time to repeat it, inputs for which
        callers with more time have come since go into the queue again. Returns the other jobs and their result."""
        later: list[Job] = []
        done: list[Job] = []
        outcomes: list[Embedding | GatewayError] = []
        for job, outcome in zip(jobs, result.outcomes, strict=True):
            failed = not isinstance(outcome, Embedding) and outcome.retryable
            if failed and job.waiters and job.deadline > batch.deadline:
                later.append(job)
            else:
                done.append(job)
                outcomes.append(outcome)
        if later:
            self._queues.put((batch.model, batch.params, batch.store), lane, later, batch.deadline)
            self._schedule()
        return done, BatchResult(outcomes, result.calls, deployments=result.deployments)

    def _land(self, jobs: list[Job], result: BatchResult | None) -> None:
        """Tells all who wait."""
        if result is None:
            result = BatchResult([GatewayError("internal error while embedding")] * len(jobs))
        call_record = CallRecord(result.calls, result.deployments)
        known = self._jobs
        ready: list[Waiter] = []
        gone: list[bytes] = []
        for job, outcome in zip(jobs, result.outcomes, strict=True):
            job.outcome, job.call_record = outcome, call_record
            if known.get(job.key) is job:
                del known[job.key]
            ends = False
            if type(outcome) is not Embedding:
                ends = is_fatal(outcome)
                if not job.waiters and job.key not in known:
                    gone.append(job.key)
            for waiter in job.waiters:
                waiter.missing -= 1
                if ends or not waiter.missing:
                    ready.append(waiter)
        self._release(ready)
        if gone:
            self._on_drop(gone)

    def _release(self, ready: list[Waiter]) -> None:
        """As many in each turn of the event loop as the rhythm says."""
        now, later = ready[: self._rhythm.together], ready[self._rhythm.together :]
        for waiter in now:
            waiter.release()
        if later:
            asyncio.get_running_loop().call_soon(self._release, later)


def _reckon(jobs: Sequence[Job], sources: list[Source], waiter: Waiter) -> None:
    """The caller that has waited longest for an input pays for it. One that joined an input on its way pays nothing,
    unless those before it had hung up, or have since."""
    seen = set()
    for i, job in enumerate(jobs):
        if sources[i] is Source.INFLIGHT and job.waiters[0] is waiter and job.key not in seen:
            sources[i] = Source.UPSTREAM
        seen.add(job.key)


def _closed(reason: str) -> UpstreamUnavailable:
    """What to say where nothing will be embedded until further notice."""
    return UpstreamUnavailable(f"no deployment of this model takes traffic: {reason}", retry_after=60)


def _batch(batch_key: BatchKey, jobs: list[Job]) -> Batch:
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
        later_deadline=later_deadline,
    )
