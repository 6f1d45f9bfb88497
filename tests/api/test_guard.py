"""One timer ends every request that takes longer than its time, and no other."""

from __future__ import annotations

import asyncio

from app.api.guard import Deadlines, Guard


async def ended(deadlines: Deadlines, after: float, *, takes: float) -> str:
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        with Guard(began + after, deadlines):
            await asyncio.sleep(takes)
    except TimeoutError:
        assert loop.time() - began >= after - 0.002  # a timer may be early by its resolution
        return "late"
    return "done"


async def test_each_has_its_time_and_what_is_done_in_time_is_left_alone() -> None:
    deadlines = Deadlines()

    async def soon(wait: float, takes: float) -> str:
        await asyncio.sleep(wait)
        return await ended(deadlines, 0.1, takes=takes)

    asked = [soon(0, 0.01), soon(0, 30), soon(0.02, 0.01), soon(0.03, 30), soon(0.05, 30), soon(0.05, 0)]
    assert await asyncio.gather(*asked) == ["done", "late", "done", "late", "late", "done"]
    # The timer that is left over finds nobody, and the next one starts anew.
    assert await soon(0.15, 30) == "late"


async def test_who_is_cancelled_from_outside_is_cancelled() -> None:
    task = asyncio.create_task(ended(Deadlines(), 30, takes=30))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
