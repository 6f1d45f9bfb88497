"""Access tokens shared in a real Redis: which replica fetches a new one."""

from __future__ import annotations

import asyncio
import time

import pytest

from app.cache.shared_tokens import PREFIX, SharedTokens
from app.clock import SystemClock
from app.metrics import Metrics
from tests.cache.support import LIMIT
from tests.clock import HandClock
from tests.redis_server import RedisServer


async def test_one_replica_claims_and_lets_go_of_no_other_ones_claim() -> None:
    with RedisServer() as server:
        one, other = (SharedTokens(server.url, LIMIT, SystemClock(), Metrics()) for _ in range(2))
        assert await one.claim(b"name", 60)
        assert not await other.claim(b"name", 60)
        await one.release(b"name")
        assert await one.claim(b"name", 60)
        await other._ask((b"DEL", PREFIX + b"name:claim"))  # as if it had expired
        assert await other.claim(b"name", 60)
        await one.release(b"name")  # too late: the other one owns it now
        assert not await one.claim(b"name", 60)
        await one.close()
        await other.close()


async def test_what_the_server_has_answered_while_this_process_was_at_other_work_is_taken() -> None:
    with RedisServer() as server:
        shared = SharedTokens(server.url, 0.2, SystemClock(), Metrics())
        await shared.put(b"name", b"sealed", 60)
        server.pause()
        asking = asyncio.create_task(shared.get(b"name"))
        for _ in range(9):
            await asyncio.sleep(0)
        server.resume()
        time.sleep(0.6)  # noqa: ASYNC251  # as where many large answers are written
        assert await asking == b"sealed"
        await shared.close()


async def test_a_server_that_is_away_is_logged_once_and_asked_again_in_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = HandClock()
    with RedisServer() as server:
        shared = SharedTokens(server.url, LIMIT, clock, Metrics())
        server.kill()
        for _ in range(4):
            assert await shared.get(b"name") is None
            assert await shared.claim(b"name", 60), "or nobody would fetch one"
        assert len(caplog.records) == 1
        server.start()
        await clock.advance(1)
        await shared.put(b"name", b"sealed", 60)
        assert await shared.get(b"name") == b"sealed"
        await shared.close()
