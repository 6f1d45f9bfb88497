"""One timer ends whatever exceeds its time, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from app.deadlines import Deadline, Deadlines

LIMIT = 20.0


async def ended(deadlines: Deadlines, after: float, *, takes: float) -> str:
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        with deadlines.timeout(after):
            await asyncio.sleep(takes)
    except TimeoutError:
        assert after - 0.002 <= loop.time() - began < after + 5  # a timer may fire early by its resolution
        return "late"
    return "done"


async def test_each_has_its_time_and_what_is_done_in_time_is_left_alone() -> None:
    deadlines = Deadlines()

    async def soon(wait: float, takes: float) -> str:
        await asyncio.sleep(wait)
        return await ended(deadlines, 0.1, takes=takes)

    asked = [soon(0, 0.01), soon(0, 30), soon(0.02, 0.01), soon(0.03, 30), soon(0.05, 30), soon(0.05, 0)]
    assert await asyncio.gather(*asked) == ["done", "late", "done", "late", "late", "done"]
    # The timer left over finds nothing to end, and the next one starts afresh.
    assert await soon(0.15, 30) == "late"


async def test_who_comes_later_may_be_due_sooner() -> None:
    deadlines = Deadlines()
    order: list[float] = []

    async def one(after: float) -> None:
        assert await ended(deadlines, after, takes=30) == "late"
        order.append(after)

    await asyncio.gather(*(one(after) for after in (0.2, 0.05, 0.3, 0.1)))
    assert order == [0.05, 0.1, 0.2, 0.3]


async def test_one_that_has_passed_ends_at_once() -> None:
    assert await ended(Deadlines(), -1, takes=30) == "late"


async def test_of_two_within_each_other_the_one_that_is_due_ends() -> None:
    outer, inner = Deadlines(), Deadlines()

    async def nested(first: float, second: float) -> list[str]:
        told = []
        try:
            with outer.timeout(first):
                told.append(await ended(inner, second, takes=30))
                await asyncio.sleep(30)
        except TimeoutError:
            told.append("outer late")
        await asyncio.sleep(0)  # no cancellation is left over
        return told

    assert await nested(0.1, 0.05) == ["late", "outer late"]
    assert await nested(0.05, 0.1) == ["outer late"]
    assert await nested(0.05, 0.05) in (["late", "outer late"], ["outer late"])


async def test_who_is_cancelled_from_outside_is_cancelled() -> None:
    task = asyncio.create_task(ended(Deadlines(), 30, takes=30))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_who_is_cancelled_while_it_is_due_is_cancelled() -> None:
    deadlines = Deadlines()

    async def both() -> str:
        with deadlines.timeout(30):
            await asyncio.sleep(30)
        return "done"

    task = asyncio.create_task(both())
    await asyncio.sleep(0)
    [deadline] = deadlines._running
    deadline.stop(TimeoutError)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_an_error_of_the_block_stays_what_it_is() -> None:
    with pytest.raises(KeyError, match="own"), Deadlines().timeout(30):
        raise KeyError("own")


def work(seconds: float) -> None:
    """Keeps this thread, and so its event loop, busy."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


async def test_who_waits_for_another_does_not_wait_while_its_own_thread_is_at_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_work = [time.thread_time()]
    monkeypatch.setattr("app.deadlines.time.thread_time", lambda: at_work[0])
    with Deadlines().io_timeout(0.1):
        at_work[0] += LIMIT
        await asyncio.sleep(0.3)


@pytest.mark.parametrize("limit", [Deadlines.timeout, Deadlines.io_timeout])
async def test_what_came_while_the_event_loop_stood_still_is_read_before_a_wait_is_over(
    limit: Callable[[Deadlines, float], Deadline],
) -> None:
    with limit(Deadlines(), 0.1):
        await asyncio.sleep(0)
        time.sleep(0.3)  # noqa: ASYNC251  # as a machine does that has no turn for this process
        for _ in range(5):
            await asyncio.sleep(0)


async def test_a_thread_at_work_lengthens_no_call() -> None:
    """Or a busy gateway would wait for many times a call's time."""

    async def wait() -> None:
        with Deadlines().timeout(0.1):
            for _ in range(200):
                work(0.005)
                await asyncio.sleep(0)

    began = time.thread_time()
    with pytest.raises(TimeoutError):
        await wait()
    assert time.thread_time() - began < 0.2


async def test_who_waits_for_what_does_not_come_is_late_after_its_time() -> None:
    async def wait() -> None:
        with Deadlines().io_timeout(0.1):
            await asyncio.sleep(0)
            work(0.05)
            await asyncio.sleep(30)

    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(TimeoutError):
        await wait()
    assert 0.148 <= loop.time() - began < 5


@pytest.mark.parametrize("extends", [False, True])
async def test_after_a_pause_a_block_has_a_little_more_time_and_then_ends(
    monkeypatch: pytest.MonkeyPatch, extends: bool
) -> None:
    monkeypatch.setattr("app.deadlines._READING_TIME", 0.5)
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(extend_after_pause=extends)

    async def wait(seconds: float) -> float:
        with pytest.raises(TimeoutError), deadlines.timeout(seconds):
            await asyncio.sleep(30)
        return loop.time()

    waiting = [asyncio.create_task(wait(seconds)) for seconds in (0.1, 0.2, 0.5)]  # the last is due soon afterwards
    await asyncio.sleep(0)
    time.sleep(0.4)  # noqa: ASYNC251  # the process is paused
    resumed = loop.time()
    extra = [ended - resumed for ended in await asyncio.gather(*waiting)]
    assert all(0.49 <= each < 5 for each in extra) if extends else max(extra[:2]) < 0.49, extra


async def test_an_event_loop_that_is_always_late_keeps_no_block_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.deadlines._READING_TIME", 0.01)

    async def wait() -> None:
        with Deadlines(extend_after_pause=True).timeout(0.01):
            for _ in range(20):
                time.sleep(0.12)  # noqa: ASYNC251  # at every turn
                await asyncio.sleep(0)

    with pytest.raises(TimeoutError):
        await wait()
