"""Which inputs a batch takes off the queue."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count
from math import inf

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from app import tokens
from app.metrics import BufferedGauge, Metrics
from app.pipeline.adapt import _split
from app.pipeline.deployment import CallLimits
from app.pipeline.queue import LANES, TARGET_BATCH, BatchKey, Job, Queue, Queues, QueueSet, Waiter
from app.types import Input, Lane, Media, Params

INPUTS: st.SearchStrategy[Input] = st.one_of(
    st.text(alphabet="aé한", min_size=1, max_size=12),
    st.sampled_from([Media("image", "https://example.com/1"), Media("video", "https://example.com/2")]),
)
JOBS = st.lists(st.tuples(INPUTS | st.text(alphabet="a", min_size=1, max_size=9), st.integers(0, 9)), max_size=12)
PORTIONS = st.none() | st.integers(1, 12)
LIMITS = st.builds(CallLimits, st.integers(1, 8), st.none() | st.integers(1, 200), st.integers(0, 2), st.integers(0, 2))


class Case:
    """A queue of (input, number of waiting callers) per lane; nobody waits any more for an input with 0."""

    def __init__(self, lanes: Sequence[Sequence[tuple[Input, int]]]) -> None:
        metrics = Metrics()
        self._waiting = {lane: metrics.queued_inputs.labels("up", lane) for lane in LANES}
        queues = Queues(self._waiting)
        loop, number = asyncio.new_event_loop(), count()
        self._waiter = Waiter(loop.create_future())
        loop.close()
        for lane, jobs in zip(LANES, lanes, strict=True):
            queues.put(PLAIN, lane, [self._job(next(number), given, waited) for given, waited in jobs], inf)
        self.queue = queues.by_key[PLAIN]

    def _job(self, number: int, given: Input, waited: int) -> Job:
        return Job(b"%d" % number, given, inf, (self._waiter,) if waited else (), True)

    def state(self) -> dict[Lane, tuple[list[bytes], float]]:
        """What is left in each lane, and the metric's count of it."""
        return {lane: ([job.key for job in self.queue.lanes[lane]], amount(self._waiting[lane])) for lane in LANES}


def amount(gauge: BufferedGauge) -> float:
    return gauge._value


def keys(jobs: Sequence[Job]) -> list[bytes]:
    return [job.key for job in jobs]


@settings(max_examples=500, deadline=None)
@given(st.tuples(JOBS, JOBS), LIMITS, PORTIONS)
def test_a_batch_is_what_looking_at_each_input_finds(
    lanes: tuple[list[tuple[Input, int]], list[tuple[Input, int]]], limits: CallLimits, tokens_per_call: int | None
) -> None:
    quick, careful = Case(lanes), Case(lanes)
    taken, dropped = quick.queue.take(limits, scarce=True, tokens_per_call=tokens_per_call)
    expected, abandoned = careful.queue._pick(limits, limits.max_batch, tokens_per_call, LANES)
    assert (keys(taken), keys(dropped)) == (keys(expected), keys(abandoned))
    assert quick.state() == careful.state()
    assert all(left == len(waiting) for waiting, left in quick.state().values())


@settings(max_examples=300, deadline=None)
@given(st.tuples(JOBS, JOBS), LIMITS, PORTIONS)
def test_a_batch_is_legal_and_in_order(
    lanes: tuple[list[tuple[Input, int]], list[tuple[Input, int]]], limits: CallLimits, tokens_per_call: int | None
) -> None:
    taken, _ = Case(lanes).queue.take(limits, scarce=True, tokens_per_call=tokens_per_call)
    assert keys(taken) == sorted(keys(taken), key=int)
    assert all(job.waiters for job in taken)
    assert len(taken) <= limits.max_batch
    texts = [job.input for job in taken if isinstance(job.input, str)]
    if limits.max_tokens_per_batch is not None and len(taken) > 1:
        assert sum(len(text.encode()) for text in texts) <= limits.max_tokens_per_batch
    if tokens_per_call is not None and len(taken) > 1:
        assert sum(tokens.estimates(job.input for job in taken)) <= tokens_per_call
    media = [job.input.kind for job in taken if isinstance(job.input, Media)]
    assert media.count("image") <= limits.images
    assert media.count("video") <= limits.videos


@settings(max_examples=500, deadline=None)
@given(st.tuples(JOBS, JOBS), LIMITS)
def test_what_is_taken_for_one_call_is_not_split_for_the_same_limits(
    lanes: tuple[list[tuple[Input, int]], list[tuple[Input, int]]], limits: CallLimits
) -> None:
    taken, _ = Case(lanes).queue.take(limits, scarce=True)
    assert len(_split([job.input for job in taken], limits)) == 1


def test_what_has_no_room_is_passed_over_and_goes_with_the_next_call() -> None:
    """Large and small alternate: strictly in order, each would be a call of its own."""
    several = Case([[], [("a" * size, 1) for size in (3, 10) * 8]])
    calls = [keys(several.queue.take(CallLimits(100, 10), scarce=True)[0]) for _ in range(11)]
    assert calls[:4] == [[b"0", b"2", b"4"], [b"1"], [b"3"], [b"5"]]
    assert list(map(len, calls)) == [3, 1, 1, 1, 3, 1, 1, 1, 2, 1, 1]
    assert [len(left) for left, _ in several.state().values()] == [0, 0]


SIZES = st.lists(st.sampled_from([1, 2, 63, 64, 65, 126, 127, 128, 129]) | st.integers(1, 300), max_size=6)


@settings(max_examples=300, deadline=None)
@given(SIZES, SIZES, st.integers(1, 400))
def test_where_calls_are_not_scarce_whole_requests_share_one_up_to_what_is_enough(
    queries: list[int], bulk: list[int], most: int
) -> None:
    assume(queries or bulk)
    taken, _ = requests(queries, bulk).take(CallLimits(most), scarce=False)
    fits = 0
    for size in queries + bulk:
        if fits and fits + size > TARGET_BATCH:
            break
        fits += size
    assert len(taken) == min(most, fits if most > TARGET_BATCH else sum(queries + bulk))


def requests(*lanes: Sequence[int]) -> Queue:
    """A queue of at least one request; each size is a request's number of inputs, and all have a waiting caller."""
    several = Several()
    for lane, sizes in zip(LANES, lanes, strict=True):
        for size in sizes:
            several.put(PLAIN, lane, inf, size)
    (queue,) = several.queues.by_key.values()
    return queue


# --- several of them ----------------------------------------------------------------------------------------

PLAIN: BatchKey = ("m", Params(), True)
GROUPS: list[BatchKey] = [PLAIN, *(("m", Params(instruct=each), True) for each in "ab"), ("other", Params(), True)]


class Watched(float):
    """A deadline; the class counts how often any is read."""

    looks = 0

    def __le__(self, other: float) -> bool:
        Watched.looks += 1
        return float(self) <= other

    def __lt__(self, other: float) -> bool:
        Watched.looks += 1
        return float(self) < other


class Several:
    """Queues whose inputs all have a waiting caller until it leaves."""

    def __init__(self) -> None:
        metrics = Metrics()
        self.queues = Queues({lane: metrics.queued_inputs.labels("up", lane) for lane in LANES})
        self._loop = asyncio.new_event_loop()
        self._loop.close()

    def put(self, batch_key: BatchKey, lane: Lane, deadline: float, size: int) -> None:
        alone = (Waiter(self._loop.create_future()),)
        jobs = [Job(b"", "a", Watched(deadline), alone, True) for _ in range(size)]
        self.queues.put(batch_key, lane, jobs, deadline)

    def step(self, what: str, batch_key: BatchKey, deadline: float, size: int) -> None:
        queue = self.queues.by_key.get(batch_key)
        match what:
            case "query" | "bulk":
                self.put(batch_key, "query" if what == "query" else "bulk", deadline, size)
            case "serve" if queue:
                queue.take(CallLimits(size), scarce=True)
                self.queues.reschedule(queue, served=True)
                if batch_key in self.queues.by_key:
                    assert queue.sequence == max(each.sequence for each in self.queues.by_key.values())
            case "join":
                for job in self._jobs()[:size]:
                    job.deadline = max(job.deadline, Watched(deadline))
            case "promote":
                self.promote(self._jobs()[::size])
            case "leave":
                self.leave(self._jobs()[::size])
            case "due":
                for queue_set in self.queues.queue_sets.values():
                    expected = [job for job in self._jobs(queue_set) if job.deadline <= deadline]
                    due = [job for _, jobs in self.queues.take_expiring(queue_set, deadline) for job in jobs]
                    assert identities(due) == identities(expected)

    def leave(self, left: Sequence[Job]) -> None:
        for job in left:
            job.waiters = ()
        assert identities(self.queues.drop_all_abandoned()) == identities(left)

    def promote(self, wanted: Sequence[Job]) -> None:
        bulk, everything = self._jobs(lanes=["bulk"]), self._jobs()
        assert self.queues.promote(wanted) == any(job in bulk for job in wanted)
        assert identities(self._jobs()) == identities(everything)
        assert identities(self._jobs(lanes=["bulk"])) == identities([job for job in bulk if job not in wanted])

    def check(self) -> None:
        """Every queue with waiting inputs has its turn, and there is no other queue."""
        queues = self.queues.by_key.values()
        assert all(any(queue.lanes.values()) for queue in queues)
        for queue_set in self.queues.queue_sets.values():
            for lane, round_robin in queue_set.round_robin.items():
                assert set(round_robin) == {
                    queue for queue in queues if queue.queue_set is queue_set and queue.lanes[lane]
                }

    def _jobs(self, queue_set: QueueSet | None = None, lanes: Sequence[Lane] = LANES) -> list[Job]:
        queues = [each for each in self.queues.by_key.values() if queue_set in (None, each.queue_set)]
        return [job for queue in queues for lane in lanes for job in queue.lanes[lane]]


def identities(jobs: Sequence[Job]) -> list[int]:
    return sorted(map(id, jobs))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["query", "bulk", "serve", "join", "promote", "leave", "due"]),
        *(st.integers(0, len(GROUPS) - 1), st.integers(0, 9), st.integers(1, 4)),
    ),
    max_size=30,
)


@settings(max_examples=500, deadline=None)
@given(STEPS)
def test_whatever_comes_and_goes_who_waits_has_a_turn_and_whose_time_is_up_is_found(
    steps: list[tuple[str, int, int, int]],
) -> None:
    several = Several()
    for what, number, deadline, size in steps:
        several.step(what, GROUPS[number], deadline, size)
        several.check()


def test_a_backlog_is_looked_through_once_and_not_each_time_somebody_else_may_be_due() -> None:
    several = Several()
    several.put(PLAIN, "bulk", 9, 1000)
    (queue,), (queue_set,) = several.queues.by_key.values(), several.queues.queue_sets.values()
    queue.take(CallLimits(500), scarce=True)
    several.put(PLAIN, "bulk", 60, 1000)
    Watched.looks = 0
    for now in range(1, 50):
        several.put(PLAIN, "query", now, 1)
        due = [len(jobs) for _, jobs in several.queues.take_expiring(queue_set, now)]
        assert due == ([1, 500] if now == 9 else [1])
    assert Watched.looks < 5 * 1500
