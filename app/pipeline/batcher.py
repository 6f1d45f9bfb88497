"""The batcher: a data loader between callers and upstream calls.

An input already on its way is awaited, not asked again. Inputs of different requests share calls. A slot
comes first and the batch second: while no slot is free inputs queue, and the queue is what fills the next
call. There are no timers: what arrives in one turn of the event loop goes together.

Calls run in the batcher's own tasks, so a caller that hangs up fails nobody; inputs nobody waits for any
more are dropped before they are sent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from app import tokens
from app.clock import Clock
from app.errors import ContextLengthExceeded, GatewayError, InvalidRequest, RateLimited, UpstreamUnavailable
from app.metrics import Gauge, Metrics
from app.pipeline.deployment import Deployment, Limits
from app.pipeline.route import Route, Slot
from app.types import NOTHING, Batch, BatchResult, Embedding, EmbedRequest, EmbedResult, Lane, Params, Source

BULK = 16
"""A request with more inputs than this is bulk work unless its key says otherwise."""

_LANES: tuple[Lane, Lane] = ("query", "bulk")

_Group: TypeAlias = tuple[str, Params, bool]
"""What inputs must have in common to share a call: public model, parameters, whether to store."""


class _Flight:
    """An upstream call, or what became of it: shared by all inputs in it."""

    __slots__ = ("calls", "deployment")

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment.name
        self.calls = 0


class _Waiter:
    """A request waiting for its inputs: one future, however many they are."""

    __slots__ = ("future", "missing")

    def __init__(self, future: asyncio.Future[None], missing: int) -> None:
        self.future = future
        self.missing = missing

    def arrived(self, *, hopeless: bool) -> None:
        self.missing -= 1
        if (self.missing == 0 or hopeless) and not self.future.done():
            self.future.set_result(None)


class _Job:
    """One input on its way, from the first request that wants it to its outcome."""

    __slots__ = ("bound", "deadline", "flight", "input", "key", "outcome", "waiters")

    def __init__(self, key: bytes, text: str, deadline: float) -> None:
        self.key = key
        self.input = text
        self.bound = tokens.bound(text)
        self.deadline = deadline
        self.waiters: list[_Waiter] = []
        self.flight: _Flight | None = None
        self.outcome: Embedding | GatewayError | None = None


class _Queue:
    """Inputs of one group that wait for a slot, query lane first. `waiting` counts them for the metrics."""

    __slots__ = ("_lanes", "_waiting")

    def __init__(self, waiting: Mapping[Lane, Gauge]) -> None:
        self._lanes: dict[Lane, deque[_Job]] = {lane: deque() for lane in _LANES}
        self._waiting = waiting

    def extend(self, lane: Lane, jobs: list[_Job]) -> None:
        self._lanes[lane].extend(jobs)
        self._waiting[lane].inc(len(jobs))

    def size(self) -> tuple[int, int]:
        """Inputs, and the bytes in them."""
        return sum(map(len, self._lanes.values())), sum(job.bound for jobs in self._lanes.values() for job in jobs)

    def lane(self) -> Lane | None:
        """The lane to serve next, or None when the queue is empty."""
        return next((lane for lane, jobs in self._lanes.items() if jobs), None)

    def drop_abandoned(self) -> list[_Job]:
        """Takes inputs nobody waits for off the front of each lane, and returns them."""
        dropped: list[_Job] = []
        for lane, jobs in self._lanes.items():
            before = len(jobs)
            while jobs and not jobs[0].waiters:
                dropped.append(jobs.popleft())
            if len(jobs) < before:
                self._waiting[lane].dec(before - len(jobs))
        return dropped

    def take_due(self, before: float) -> list[_Job]:
        """Takes out the inputs whose callers wait no longer than `before`."""
        due: list[_Job] = []
        for lane, jobs in self._lanes.items():
            stay = [job for job in jobs if job.deadline > before]
            if len(stay) < len(jobs):
                self._waiting[lane].dec(len(jobs) - len(stay))
                due += (job for job in jobs if job.deadline <= before)
                jobs.clear()
                jobs.extend(stay)
        return due

    def take(self, limits: Limits) -> tuple[list[_Job], list[_Job]]:
        """The fullest batch that is legal within `limits`, and abandoned inputs met on the way.

        Bulk inputs fill up a batch of queries. One input over the token limit goes alone.
        """
        batch: list[_Job] = []
        dropped: list[_Job] = []
        room = limits.max_tokens_per_batch
        for lane, jobs in self._lanes.items():
            before = len(jobs)
            while jobs and len(batch) < limits.max_batch:
                job = jobs[0]
                if not job.waiters:
                    dropped.append(jobs.popleft())
                    continue
                if room is not None:
                    if batch and job.bound > room:
                        break
                    room -= job.bound
                batch.append(jobs.popleft())
            self._waiting[lane].dec(before - len(jobs))
        return batch, dropped


class Batcher:
    """Embeds requests over a model's route. What may queue is bounded by who is let in (`Admit`)."""

    def __init__(self, route: Route, metrics: Metrics, clock: Clock) -> None:
        self._route, self._clock = route, clock
        self._jobs: dict[bytes, _Job] = {}
        self._queues: dict[_Group, _Queue] = {}
        self._scheduled = False
        self._alarm: asyncio.Task[None] | None = None
        self._alarm_at = 0.0
        self._served = 0.0
        """When it last had a slot: among those who wait for one, longest ago is first."""
        self._tasks: set[asyncio.Task[None]] = set()
        # An input waits for whichever deployment is free first; it is counted where it would rather go.
        upstream = route.deployments[0].upstream
        self._waiting = {lane: metrics.queued_inputs.labels(upstream, lane) for lane in _LANES}

    async def __call__(self, request: EmbedRequest) -> EmbedResult:
        reason = self._route.closed()
        if reason is not None:
            raise UpstreamUnavailable(f"no deployment of this model takes traffic: {reason}", retry_after=60)
        jobs, sources = self._enlist(request)
        distinct = dict.fromkeys(jobs)
        waiter = _Waiter(asyncio.get_running_loop().create_future(), len(distinct))
        for job in distinct:
            job.waiters.append(waiter)
            job.deadline = max(job.deadline, request.deadline)
        try:
            await waiter.future
        finally:
            if waiter.missing:
                _leave(waiter, distinct)
        return _collect(jobs, sources, request)

    async def aclose(self) -> None:
        """Waits for the calls under way: they are paid for, and their results go to the cache."""
        if self._alarm is not None:
            self._alarm.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _enlist(self, request: EmbedRequest) -> tuple[list[_Job], list[Source]]:
        """A job per input: the one already on its way where there is one, a new one in the queue otherwise."""
        jobs: list[_Job] = []
        sources: list[Source] = []
        new: list[_Job] = []
        for key, text in zip(request.keys, request.inputs, strict=True):
            job = self._jobs.get(key)
            if job is None:
                job = self._jobs[key] = _Job(key, text, request.deadline)
                new.append(job)
                sources.append(Source.UPSTREAM)
            else:
                sources.append(Source.INFLIGHT)
            jobs.append(job)
        if new:
            lane = request.caller.lane or ("bulk" if len(request.inputs) > BULK else "query")
            group = (request.model, request.params, request.write_cache)
            queue = self._queues.get(group)
            if queue is None:
                queue = self._queues[group] = _Queue(self._waiting)
            queue.extend(lane, new)
            self._schedule()
        return jobs, sources

    def _schedule(self) -> None:
        """Fills slots at the end of this turn of the event loop, with all that arrives in it."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """While there is an input that can have a slot: the fullest legal batch goes, queries first."""
        self._scheduled = False
        # Asked before trying: a rest that ends in between would else be neither tried nor waited for.
        rests = {group: self._route.resting(group[1]) for group in self._queues}
        launched = False
        while self._launch_one("query") or self._launch_one("bulk"):
            launched = True
        if launched and self._queues:
            # Once more: how long the rest must wait was asked before these calls were charged.
            self._served = self._clock.monotonic()
            self._schedule()
        elif self._queues:
            self._route.when_free(self._schedule, self._served)
            self._wait_out({group: rest for group, rest in rests.items() if rest and group in self._queues})

    def _wait_out(self, rests: Mapping[_Group, float]) -> None:
        """Where every deployment rests, after a rate limit or for its pace: until the first is back, for those who
        can wait so long; the others are told now."""
        now = asyncio.get_running_loop().time()
        for group, rest in rests.items():
            queue = self._queues[group]
            due = queue.take_due(before=now + rest)
            if due:
                # Those who stay go first, and each byte is a quarter of a token or a little more.
                inputs, size = queue.size()
                wait = max(rest, self._route.drain(group[1], inputs + 1, size / 4))
                told = RateLimited("every upstream of this model is at its rate limit", retry_after=wait)
                for job in due:
                    self._end(job, told)
        if rests:
            self._wake_in(min(rests.values()))

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

    def _launch_one(self, lane: Lane) -> bool:
        """One call for the first group that has inputs in this lane and can have a slot; then it is the last."""
        for group, queue in list(self._queues.items()):
            self._forget(queue.drop_abandoned())
            if queue.lane() is None:
                del self._queues[group]
            if queue.lane() != lane:
                continue
            slot = self._route.take(lane, group[1])
            if slot is None:
                continue
            jobs, dropped = queue.take(slot.deployment.limits)
            self._forget(dropped)
            slot.charge([job.input for job in jobs])
            self._launch(group, jobs, slot, lane)
            self._queues[group] = self._queues.pop(group)
            return True
        return False

    def _forget(self, dropped: Iterable[_Job]) -> None:
        for job in dropped:
            if self._jobs.get(job.key) is job:
                del self._jobs[job.key]

    def _launch(self, group: _Group, jobs: list[_Job], slot: Slot, lane: Lane) -> None:
        task = asyncio.get_running_loop().create_task(self._fly(group, jobs, slot, lane))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fly(self, group: _Group, jobs: list[_Job], slot: Slot, lane: Lane) -> None:
        model, params, store = group
        flight = _Flight(slot.deployment)
        for job in jobs:
            job.flight = flight
        batch = Batch(
            model=model,
            inputs=[job.input for job in jobs],
            keys=[job.key for job in jobs],
            params=params,
            store=store,
            deadline=max(job.deadline for job in jobs),
        )
        result: BatchResult | None = None
        try:
            result = await self._route.run(batch, slot, lane)
        finally:
            # Whatever happened, even a bug of ours: nobody may be left waiting.
            self._land(jobs, flight, result)

    def _land(self, jobs: list[_Job], flight: _Flight, result: BatchResult | None) -> None:
        outcomes: list[Embedding | GatewayError]
        if result is None:
            outcomes = [GatewayError("internal error while embedding")] * len(jobs)
        else:
            outcomes = result.outcomes
            flight.calls = result.calls
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._end(job, outcome)

    def _end(self, job: _Job, outcome: Embedding | GatewayError) -> None:
        job.outcome = outcome
        self._forget([job])
        hopeless = _hopeless(outcome)
        for waiter in job.waiters:
            waiter.arrived(hopeless=hopeless)


def _hopeless(outcome: Embedding | GatewayError) -> bool:
    """Whether the request need not wait for its other inputs: they would meet the same refusal.

    Otherwise it waits, for what is embedded meanwhile is cached, and asking again then costs only the rest.
    """
    return not isinstance(outcome, Embedding) and not outcome.retryable and not outcome.blames_input


def _leave(waiter: _Waiter, jobs: Iterable[_Job]) -> None:
    for job in jobs:
        if job.outcome is None:
            job.waiters.remove(waiter)


def _collect(jobs: list[_Job], sources: list[Source], request: EmbedRequest) -> EmbedResult:
    embeddings = [job.outcome for job in jobs if isinstance(job.outcome, Embedding)]
    too_long: dict[int, GatewayError] = {}
    if len(embeddings) < len(jobs):
        positions = request.positions or range(len(jobs))
        others = [job.outcome for job in jobs if not isinstance(job.outcome, Embedding | ContextLengthExceeded)]
        if others or not request.spares_long:
            raise _error(jobs, positions)
        for i, job in enumerate(jobs):
            if isinstance(job.outcome, ContextLengthExceeded):
                too_long[i] = job.outcome.at_input(positions[i])
        embeddings = [job.outcome if isinstance(job.outcome, Embedding) else NOTHING for job in jobs]
    flights = dict.fromkeys(job.flight for job in jobs)
    return EmbedResult(
        embeddings=embeddings,
        sources=sources,
        calls=sum(flight.calls for flight in flights if flight),
        deployments=tuple(dict.fromkeys(flight.deployment for flight in flights if flight)),
        too_long=too_long,
    )


def _error(jobs: list[_Job], positions: Sequence[int]) -> GatewayError:
    """The request's one error: a refusal of its inputs, naming each by the caller's own index, or else
    the first trouble in input order. A refusal tells the caller more than trouble that may pass."""
    errors = [
        (position, job.outcome)
        for position, job in zip(positions, jobs, strict=True)
        if isinstance(job.outcome, GatewayError)
    ]
    refused = [(position, error) for position, error in errors if isinstance(error, InvalidRequest)]
    position, error = (refused or errors)[0]
    told = error.at_input(position)
    places = list(dict.fromkeys(position for position, _ in refused))
    if error.blames_input and len(places) > 1:
        names = ", ".join(map(str, places[:20]))
        told.message += f" (inputs {names}{' …' if len(places) > 20 else ''})"
    return told
