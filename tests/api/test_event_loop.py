"""No request waits for another's work: long work yields to the event loop, and short work is shown to be short."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from app import main
from app.api import embeddings, render
from app.api.embeddings import Embeddings
from app.api.guard import Guard
from app.api.usage import Usage
from app.catalog import Model
from app.clock import SystemClock
from app.errors import GatewayError, UnsupportedDimensions, UpstreamInvalidResponse, UpstreamInvalidVector
from app.logs import RequestLog
from app.main import create_app
from app.metrics import Metrics
from app.pipeline import call as call_module
from app.pipeline.call import INLINE_PARSE_LIMIT, Call
from app.types import (
    Adapter,
    Batch,
    Embedding,
    EmbedResult,
    Params,
    Parsed,
    Source,
    WireReply,
    WireRequest,
)
from app.upstreams import openai
from app.upstreams.upstream import Upstream
from tests.api.support import MODEL, PATIENCE, config, log_lines, post, settled, wire
from tests.fakes import FakeOpenAI
from tests.harness import running, settings_of


class Turns:
    """Counts the turns that another task gets on the event loop."""

    count = 0


@asynccontextmanager
async def turns() -> AsyncIterator[Turns]:
    seen = Turns()

    async def look() -> None:
        while True:
            seen.count += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(look())
    await asyncio.sleep(0)
    seen.count = 0
    yield seen
    task.cancel()


class NextTurn(ThreadPoolExecutor):
    """Starts work on the event loop's next turn: a thread might otherwise finish before its starter continues."""

    def submit(self, work: Any, /, *args: Any, **named: Any) -> Any:
        begins = threading.Event()
        asyncio.get_running_loop().call_soon(begins.set)

        def begin() -> Any:
            begins.wait()
            return work(*args, **named)

        return super().submit(begin)


async def asked(body: dict[str, Any], **sections: Any) -> tuple[int, int]:
    """The status of a request whose body is complete at once, and the turns other tasks had until it was answered."""
    app = create_app(
        settings_of({"upstreams": {"built-in": {"type": "lexical"}}, **sections}), request_log=RequestLog("text", len),
        clock=SystemClock(),
    )  # fmt: skip
    answered: list[tuple[int, int]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answered.append((message["status"], others.count))

    asyncio.get_running_loop().set_default_executor(NextTurn(1))
    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": []}
    async with turns() as others:
        await app(scope, receive, send)
    [answer] = answered
    return answer


async def test_a_big_body_is_not_parsed_while_others_wait() -> None:
    """Its last token id is invalid, so that only parsing takes time."""
    ids = [[100] * 8000 for _ in range(50)] + [[10**9]]
    small, big = ({"model": "lexical", "input": some} for some in (ids[-1:], ids))
    assert len(json.dumps(big)) > embeddings.INLINE_PARSE_LIMIT > len(json.dumps(small))
    assert await asked(small) == (400, 0)
    status, had = await asked(big)
    assert status == 400
    assert had > 0


async def test_many_texts_are_not_looked_at_while_others_wait() -> None:
    """The last is too long for the model by any count, so that only looking at them takes time."""
    models = {"m": {"deployments": [{"upstream": "built-in", "model": "lexical"}], "max_tokens_per_input": 8192}}
    texts = ["x" * 500] * 250 + ["word " * 9000]
    few, many = ({"model": "m", "input": some} for some in (texts[-1:], texts))
    assert len(json.dumps(many)) < embeddings.INLINE_PARSE_LIMIT
    assert await asked(few, models=models) == (400, 0)
    status, had = await asked(many, models=models)
    assert status == 400
    assert had > 0


async def test_an_answer_of_many_vectors_is_written_in_slices() -> None:
    count = 1000
    vector = Embedding(np.ones(1024, "<f4").tobytes(), 1)
    result = EmbedResult([vector] * count, [Source.UPSTREAM] * count)
    async with turns() as others:
        await render.embeddings(result, Usage.of(result), MODEL, "float")
        assert others.count >= count // render.VECTORS_PER_TURN["float"] - 1


AT = openai.OpenAISettings(base_url="http://up.invalid", auth="none", encoding_format="omit")
DIALECT = openai.adapter(AT)
ASKED = Batch(MODEL, ["a"], [b""], Params(), True, 0.0)


def call_that_gets(body: bytes, metrics: Metrics, adapter: Adapter = DIALECT) -> Call:
    """A call whose upstream answers with `body` at once."""

    async def send(_request: WireRequest) -> WireReply:
        return WireReply(200, {}, body)

    upstream = Upstream("up", AT, openai.KIND, SystemClock())
    upstream.adapter, upstream.send = adapter, send
    return Call(upstream, Model(MODEL, 1024), metrics)


def reply_of(numbers: str, size: int = 0) -> bytes:
    """A reply with one vector, padded to `size` bytes."""
    return f'{{"data":[{{"index":0,"embedding":[{numbers}]}}]}}'.encode().ljust(size)


NUMBERS = ",".join(["0.5"] * 1024)
LARGE = INLINE_PARSE_LIMIT + 1


async def test_a_large_reply_is_not_parsed_while_others_wait() -> None:
    async with turns() as others:
        small = await call_that_gets(reply_of(NUMBERS), Metrics())(ASKED)
        assert others.count == 0
        assert await call_that_gets(reply_of(NUMBERS, LARGE), Metrics())(ASKED) == small
        assert others.count > 0


async def test_a_refusal_that_speaks_of_dimensions_is_not_looked_for_in_large_texts() -> None:
    async def send(_request: WireRequest) -> WireReply:
        return WireReply(400, {}, b'{"error": {"message": "This model gives at most 1024 dimensions."}}')

    call = call_that_gets(b"", Metrics())
    call._send = send
    started = time.thread_time()
    with pytest.raises(UnsupportedDimensions):
        await call(replace(ASKED, inputs=["of two dimensional " * 2**19], params=Params(dimensions=4096)))
    assert time.thread_time() - started < 1  # searching 10 MB for the words as they are sought in a message takes 3 s


async def test_a_deployment_that_is_never_called_takes_no_room_in_a_scrape() -> None:
    metrics = Metrics()
    before = len((await metrics.exposition()).splitlines())
    call = call_that_gets(reply_of(NUMBERS), metrics)
    assert len((await metrics.exposition()).splitlines()) == before
    await call(ASKED)
    assert b'upstream_batch_inputs_count{model="%b",upstream="up"} 1.0' % MODEL.encode() in await metrics.exposition()


async def test_a_scrape_is_not_written_while_others_wait() -> None:
    metrics = Metrics()
    for number in range(100):
        metrics.request_duration.labels(str(number)).observe(1)
    async with turns() as others:
        assert b'request_duration_seconds_count{model="99"} 1.0' in await metrics.exposition()
        assert others.count > 0


async def test_of_large_replies_that_come_together_each_has_a_turn_of_its_own() -> None:
    call = call_that_gets(reply_of(NUMBERS, call_module.ONE_PER_TURN + 1), Metrics())
    async with turns() as others:
        calls = [asyncio.create_task(call(ASKED)) for _ in range(5)]
        for done, each in enumerate(calls):
            before = others.count
            await each
            assert others.count > before
            assert [task.done() for task in calls] == [place <= done for place in range(5)]


@pytest.mark.parametrize(
    ("numbers", "error"),
    [
        (NUMBERS + ",NaN", UpstreamInvalidVector),
        (NUMBERS + ",", UpstreamInvalidResponse),
        (NUMBERS + ",0.5", UpstreamInvalidResponse),
    ],
)
async def test_and_is_judged_as_a_small_one(numbers: str, error: type[GatewayError]) -> None:
    told = []
    for size in (0, LARGE):
        with pytest.raises(error) as raised:
            await call_that_gets(reply_of(numbers, size), Metrics())(ASKED)
        told.append((type(raised.value), raised.value.message))
    assert told[0] == told[1]


async def test_a_call_whose_time_is_up_does_not_wait_for_its_reply_to_be_parsed() -> None:
    begun, over, metrics = threading.Event(), threading.Event(), Metrics()

    def parse(_reply: WireReply, _batch: Batch) -> Parsed:
        begun.set()
        over.wait(PATIENCE)
        return Parsed([], [])

    call = call_that_gets(reply_of(NUMBERS, LARGE), metrics, replace(DIALECT, parse_response=parse))
    task = asyncio.ensure_future(call(ASKED))
    try:
        while not begun.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not over.is_set()
    finally:
        over.set()
    assert b'outcome="upstream_timeout"' in await metrics.exposition()


@pytest.fixture
def come(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Requests whose bodies have arrived; one that is parsed in a thread is heavy."""
    watch, come = Guard.watch, []

    def watched(guard: Guard, scope: Any) -> None:
        come.append(scope)
        watch(guard, scope)

    monkeypatch.setattr(embeddings, "SERIAL_PARSE_LIMIT", embeddings.INLINE_PARSE_LIMIT)
    monkeypatch.setattr(Guard, "watch", watched)
    return come


HEAVY: dict[str, Any] = {"model": MODEL, "input": ["text " * 1000] * 100}


def test_of_heavy_bodies_one_is_parsed_at_a_time(come: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    parse, inside, most = Embeddings._parse_large, [0], [0]

    def counted(self: Embeddings, *args: Any) -> Any:
        inside[0] += 1
        while len(come) < 3:  # by now the others' may be parsed, if that is allowed
            time.sleep(0.001)
        time.sleep(0.05)  # in which another's would be, too: what must not happen has no event
        most[0] = max(most[0], inside[0])
        inside[0] -= 1
        return parse(self, *args)

    monkeypatch.setattr(Embeddings, "_parse_large", counted)
    with FakeOpenAI() as fake, running(config(fake)) as gateway, ThreadPoolExecutor() as callers:
        answers = list(callers.map(gateway.post, [HEAVY] * 3))
    assert [answer.status_code for answer in answers] == [200] * 3
    assert most[0] == 1


def test_one_that_is_not_parsed_in_its_time_finds_the_gateway_overloaded(
    come: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = threading.Event()
    monkeypatch.setattr(Embeddings, "_parse_large", lambda *_: late.wait(PATIENCE))
    try:
        with FakeOpenAI() as fake, running(config(fake, server={"request_timeout": 0.2})) as gateway:
            answer = gateway.post(HEAVY)
            late.set()
            told = answer.json()["error"]
            assert (answer.status_code, told["code"]) == (503, "overloaded")
            assert told["message"] == "the request body could not be read in time"  # and no other request was in flight
            assert answer.headers["retry-after"] == "1"
            assert gateway.metric("rejected_requests_total", reason="overloaded") == 1
    finally:
        late.set()


def test_a_heavy_body_whose_caller_has_gone_is_still_parsed_and_the_next_one_waits_for_that(
    come: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parse, begun, released = Embeddings._parse_large, [], threading.Event()

    def held(self: Embeddings, *args: Any) -> Any:
        begun.append(args)
        released.wait(PATIENCE)
        return parse(self, *args)

    monkeypatch.setattr(Embeddings, "_parse_large", held)
    with FakeOpenAI() as fake, running(config(fake)) as gateway, ThreadPoolExecutor() as callers:
        with wire(gateway.url) as leaver:
            leaver.send(post({**HEAVY, "input": [*HEAVY["input"], ""]}))  # refused, but the caller has gone
            settled(gateway, lambda: len(begun) == 1)
        settled(gateway, lambda: any(line["status"] == "499" for line in log_lines(gateway)))
        answer = callers.submit(gateway.post, HEAVY)
        settled(gateway, lambda: len(come) == 2)
        assert gateway.get("/healthz").status_code == 200
        before = len(begun)
        released.set()
        assert answer.result().status_code == 200
        assert (before, len(begun)) == (1, 2)
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_by_how_much_the_event_loop_is_late_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "LAG_INTERVAL", 0.005)
    with FakeOpenAI() as fake, running(config(fake)) as gateway:
        settled(gateway, lambda: gateway.metric("event_loop_lag_seconds_count") > 3)
        late = gateway.metric("event_loop_lag_seconds_sum")

        async def hold_up() -> None:
            time.sleep(0.2)  # noqa: ASYNC251  # the fault itself

        gateway.call(hold_up())
        settled(gateway, lambda: gateway.metric("event_loop_lag_seconds_sum") >= late + 0.19)
