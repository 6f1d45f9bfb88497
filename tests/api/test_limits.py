"""When the gateway gives up: no room, no time, no caller any more; and what it logs about it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import httpx
import numpy as np
import pytest

from app.http import protocol
from app.pipeline.prepare import Prepare
from app.types import EmbedRequest, EmbedResult
from tests.api.support import MODEL, Wire, config, error_of, head, log_lines, post, settled, wire
from tests.clock import settle
from tests.fakes import FakeOpenAI, faults
from tests.fakes.wire import Reply
from tests.harness import Running, running


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as fake:
        yield fake


def body(*texts: str) -> dict[str, Any]:
    return {"model": MODEL, "input": list(texts)}


def statuses(gateway: Running) -> list[str]:
    return [line["status"] for line in log_lines(gateway)]


def vectors_are_right(fake: FakeOpenAI, response: httpx.Response, *texts: str) -> bool:
    assert response.status_code == 200, response.text
    rows = response.json()["data"]
    return len(rows) == len(texts) and all(
        np.array_equal(np.array(row["embedding"], "<f4"), fake.expected(MODEL, text))
        for row, text in zip(rows, texts, strict=True)
    )


# --- no room ------------------------------------------------------------------------------------------------------


def test_one_request_too_many_is_told_at_once_to_come_back(fake: FakeOpenAI) -> None:
    with running(config(fake, server={"max_inflight": 3})) as gateway, ThreadPoolExecutor() as pool:
        fake.hold()
        inside = [pool.submit(gateway.post, body(f"inside {i}")) for i in range(3)]
        settled(gateway, lambda: gateway.metric("inflight_requests") == 3)
        for _ in range(2):
            response = gateway.post(body("one too many"))  # the fake still holds its calls: only the gateway can answer
            assert response.status_code == 503
            error = error_of(response)
            assert (error["type"], error["code"], error["param"]) == ("overloaded_error", "overloaded", None)
            assert response.headers["retry-after"] == "1"
            assert response.headers["retry-after-ms"] == "1000"
            assert "x-should-retry" not in response.headers
            assert response.headers["connection"] == "close", "its body was not read"
        for path in ("/healthz", "/readyz", "/metrics", "/v1/models"):
            assert gateway.get(path).status_code == 200
        assert gateway.metric("inflight_requests") == 3
        fake.release()
        for i, each in enumerate(inside):
            assert vectors_are_right(fake, each.result(), f"inside {i}")
        assert gateway.post(body("room again")).status_code == 200
        assert gateway.metric("inflight_requests") == 0
        assert gateway.metric("rejected_requests_total", reason="overloaded") == 2
        assert gateway.metric("requests_total", status="503") == 2
        assert not any("one too many" in call.texts for call in fake.calls)


@pytest.mark.parametrize("told", [True, False], ids=["content-length", "chunked"])
def test_bytes_that_queue_are_bounded_and_what_is_over_is_told_at_once_to_come_back(
    fake: FakeOpenAI, told: bool
) -> None:
    def sent(text: str) -> Any:
        raw = json.dumps(body(text)).encode()
        return raw if told else iter([raw[:500], raw[500:]])

    def ask(text: str) -> httpx.Response:
        return httpx.post(f"{gateway.base_url}/embeddings", content=sent(text), timeout=30)

    server = {"max_body": 2000, "max_inputs": 4, "max_inflight_size": 9000}
    with running(config(fake, server=server)) as gateway, ThreadPoolExecutor() as pool:
        fake.hold()
        inside = [pool.submit(ask, f"{i}" * 1500) for i in range(3)]
        settled(gateway, lambda: gateway.metric("inflight_requests") == 3)
        response = ask("x" * 1500)
        assert (response.status_code, error_of(response)["code"]) == (503, "overloaded")
        assert "bytes" in error_of(response)["message"]
        assert response.headers["retry-after"] == "1"
        small = pool.submit(ask, "small")  # there is room for a small one
        settled(gateway, lambda: gateway.metric("inflight_requests") == 4)
        fake.release()
        assert [each.result().status_code for each in (*inside, small)] == [200] * 4
        assert ask("x" * 1500).status_code == 200, "all of it is given back"
        assert gateway.metric("rejected_requests_total", reason="overloaded") == 1


def test_token_ids_count_by_the_text_that_they_stand_for(fake: FakeOpenAI) -> None:
    def ask(i: int) -> httpx.Response:
        ids = [[i, *[58040] * 15]]  # a body of 120 bytes for 15 times 128 spaces
        return gateway.post({"model": MODEL, "input": ids})

    server = {"max_body": 2000, "max_inputs": 4, "max_inflight_size": 9000}
    with running(config(fake, server=server)) as gateway, ThreadPoolExecutor() as pool:
        fake.hold()
        inside = [pool.submit(ask, i) for i in range(100, 103)]
        settled(gateway, lambda: gateway.metric("inflight_requests") == 3)
        response = ask(103)
        assert (response.status_code, error_of(response)["code"]) == (503, "overloaded")
        assert "bytes" in error_of(response)["message"]
        fake.release()
        assert [each.result().status_code for each in inside] == [200] * 3
        assert ask(103).status_code == 200, "all of it is given back"


def test_the_largest_request_that_is_allowed_always_has_room_when_it_is_alone(fake: FakeOpenAI) -> None:
    with running(config(fake, server={"max_body": 2000, "max_inputs": 100, "max_inflight_size": 1})) as gateway:
        assert gateway.post(body(*(f"{i}" for i in range(100)))).status_code == 200


def test_a_body_that_is_only_announced_takes_no_bytes(fake: FakeOpenAI) -> None:
    server = {"max_body": 2000, "max_inputs": 1, "max_inflight_size": 4000}
    begun = head("POST", "/v1/embeddings", "Content-Length: 2000") + b"{"
    with running(config(fake, server=server)) as gateway, ExitStack() as open_:
        for _ in range(10):
            open_.enter_context(wire(gateway.url)).send(begun)
        settled(gateway, lambda: gateway.metric("inflight_requests") == 10)
        assert gateway.post(body("x")).status_code == 200


def test_a_body_that_is_still_coming_takes_room_too(fake: FakeOpenAI) -> None:
    with running(config(fake, server={"max_inflight": 1})) as gateway:
        whole = post(body("slow"))
        with wire(gateway.url) as connection:
            connection.send(whole[:-5])
            settled(gateway, lambda: gateway.metric("inflight_requests") == 1)
            assert gateway.post(body("no room")).status_code == 503
            connection.send(whole[-5:])
            assert connection.must_reply().status_code == 200
        assert gateway.post(body("room")).status_code == 200


async def test_of_a_crowd_as_many_get_in_as_there_is_room_for(fake: FakeOpenAI) -> None:
    with running(config(fake, server={"max_inflight": 10})) as gateway:
        fake.hold()
        async with httpx.AsyncClient(
            base_url=gateway.url, timeout=30, limits=httpx.Limits(max_connections=100)
        ) as client:
            crowd = [asyncio.create_task(client.post("/v1/embeddings", json=body(f"{i}"))) for i in range(60)]
            refused = 0
            for done in asyncio.as_completed(crowd):
                response = await done
                if response.status_code == 503:
                    assert error_of(response)["code"] == "overloaded"
                    refused += 1
                    if refused == 50:
                        fake.release()
            assert sorted(task.result().status_code for task in crowd) == [200] * 10 + [503] * 50
        assert gateway.metric("inflight_requests") == 0


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (post(b"{"), 400),
        (post(body("")), 400),
        (post({"model": "unknown", "input": "x"}), 404),
        (post(body("x"), "Content-Encoding: gzip"), 415),
        (post(b" " * 2000), 413),
        (head("GET", "/v1/embeddings"), 405),
    ],
)
def test_no_refusal_keeps_the_room_it_took(data: bytes, status: int, fake: FakeOpenAI) -> None:
    with running(config(fake, server={"max_inflight": 1, "max_body": 1000})) as gateway:
        for _ in range(3):
            with wire(gateway.url) as connection:
                connection.send(data)
                assert connection.must_reply().status_code == status
        assert gateway.post(body("room")).status_code == 200


# --- callers that do not read -------------------------------------------------------------------------------------

BIG = {"model": "lexical", "input": ["x"] * 2000, "dimensions": 1024}
"""Its answer is far larger than the system's buffers."""
SMALL = {"model": "lexical", "input": "x", "dimensions": 64}


@contextmanager
def lexical(**server: Any) -> Iterator[Running]:
    with running({"upstreams": {"lexical": {"type": "lexical"}}, "server": server}) as gateway:
        yield gateway


@contextmanager
def unread(gateway: Running, *behind: bytes, last: str = "Connection: keep-alive") -> Iterator[Wire]:
    """A connection that never reads the big answer sent to it."""
    answers = len(log_lines(gateway))
    with wire(gateway.url) as connection:
        connection.send(b"".join((post(BIG, last), *behind)))
        settled(gateway, lambda: len(log_lines(gateway)) > answers)
        assert statuses(gateway)[answers] == "200"
        yield connection


def test_an_answer_counts_among_the_requests_inside_until_it_is_taken() -> None:
    with lexical(max_inflight=1) as gateway:
        with unread(gateway) as connection:
            assert gateway.metric("inflight_requests") == 1
            assert gateway.post(SMALL).status_code == 503
            for path in ("/healthz", "/readyz", "/metrics", "/v1/models"):
                assert gateway.get(path).status_code == 200
            assert len(json.loads(connection.must_reply().content)["data"]) == 2000
            connection.send(post(SMALL))
            assert connection.must_reply().status_code == 200
            assert gateway.post(SMALL).status_code == 200
        assert gateway.metric("rejected_requests_total", reason="answer_not_taken") == 0


def test_its_bytes_count_in_place_of_the_requests() -> None:
    with lexical(max_body="1MiB", max_inputs=2000, max_inflight_size="4MiB") as gateway:
        capacity = gateway.app.gateway.capacity
        with unread(gateway) as connection:
            length = int(connection.reply(head_only=True).headers["content-length"])  # type: ignore[union-attr]
            assert capacity.size == 4 * 2**20 - length < 0, "there was no room for it, but it was paid for"
            refused = gateway.post(SMALL)
            assert (refused.status_code, "bytes" in error_of(refused)["message"]) == (503, True)
        settled(gateway, lambda: gateway.metric("inflight_requests") == 0)
        assert capacity.size == 4 * 2**20
        assert gateway.post(SMALL).status_code == 200


def test_a_caller_that_hangs_up_on_its_answer_leaves_its_place() -> None:
    with lexical(max_inflight=1) as gateway:
        with unread(gateway):
            assert gateway.metric("inflight_requests") == 1
        settled(gateway, lambda: gateway.metric("inflight_requests") == 0)
        assert gateway.post(SMALL).status_code == 200
        assert statuses(gateway) == ["200", "200"], "it was answered"


@pytest.mark.parametrize("last", ["Connection: keep-alive", "Connection: close"])
@pytest.mark.parametrize("behind", [[], [post(SMALL)], [post(BIG)]], ids=["alone", "before a small one", "a big one"])
def test_an_answer_that_is_not_taken_in_the_requests_time_is_dropped(last: str, behind: list[bytes]) -> None:
    with lexical(request_timeout="2s") as gateway, unread(gateway, *behind, last=last) as connection:
        settled(gateway, lambda: gateway.metric("inflight_requests") == 0)
        reply = connection.must_reply()
        assert len(reply.content) < int(reply.headers["content-length"])
        assert gateway.metric("rejected_requests_total", reason="answer_not_taken") >= 1


@pytest.mark.parametrize("last", ["Connection: keep-alive", "Connection: close"])
def test_who_stops_does_not_wait_for_those_who_take_nothing(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SHUTDOWN_STALL_TIMEOUT", 1)
    with ExitStack() as callers, lexical() as gateway:
        for _ in range(2):
            callers.enter_context(unread(gateway, last=last))


def test_an_answer_that_is_given_while_stopping_counts_as_long() -> None:
    with lexical(max_inflight=1) as gateway:
        gateway.app.drain()
        with unread(gateway) as connection:
            assert gateway.metric("inflight_requests") == 1
            assert connection.must_reply().headers["connection"] == "close"
            assert connection.closed


def test_an_answer_that_is_taken_at_once_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []

    async def take(*about: object) -> None:
        waited.append(about)

    monkeypatch.setattr(protocol.Protocol, "_wait_taken", take)
    with lexical() as gateway, wire(gateway.url) as connection:
        for _ in range(3):
            connection.send(post(SMALL) * 5)
            assert [connection.must_reply().status_code for _ in range(5)] == [200] * 5
        assert not waited
        with unread(gateway):
            assert waited, "as others are"


# --- no time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [faults.hang, faults.dribble()], ids=lambda fault: fault.name)
def test_an_upstream_that_takes_too_long_is_a_504_when_the_requests_time_is_up(
    fault: faults.Wire, fake: FakeOpenAI
) -> None:
    with running(config(fake, server={"request_timeout": "400ms"})) as gateway:
        fake.fail(fault, times=None)
        before = time.monotonic()
        response = gateway.post(body("never whole"))
        elapsed = time.monotonic() - before
        assert response.status_code == 504
        error = error_of(response)
        assert (error["type"], error["code"], error["param"]) == ("upstream_error", "upstream_timeout", None)
        assert 0.39 <= elapsed < 20, "the request's own time, not the upstream's 30 s"
        assert "connection" not in response.headers
        assert response.headers["x-embedding-upstream-calls"] == "1", "what it waited for, as the log says too"
        fake.wait_until_idle()
        assert gateway.metric("inflight_requests") == 0
        assert gateway.metric("requests_total", status="504", model=MODEL) == 1
        fake.heal()
        assert vectors_are_right(fake, gateway.post(body("afterwards")), "afterwards")


def test_a_reply_larger_than_its_inputs_can_fill_is_not_read_to_its_end(fake: FakeOpenAI) -> None:
    with running(config(fake)) as gateway:
        told = {}
        for texts in (["one"], ["one", "two"]):
            fake.fail(faults.Answer("large", Reply(200, b"[" + b"0," * (2 * 2**20))), times=2)
            response = gateway.post(body(*texts))
            assert (response.status_code, error_of(response)["code"]) == (502, "upstream_invalid_response")
            told[len(texts)] = error_of(response)["message"]
        assert "larger than" in told[1]
        assert "is not an embeddings reply" in told[2], "it may be as large as that"


def test_waiting_for_a_slot_is_part_of_the_requests_time(fake: FakeOpenAI) -> None:
    server = {"request_timeout": "400ms"}
    with running(config(fake, {"max_concurrency": 1}, server=server)) as gateway, ThreadPoolExecutor() as pool:
        fake.hold()
        first = pool.submit(gateway.post, body("holds the slot"))
        fake.wait_for_calls(1)
        second = pool.submit(gateway.post, body("waits for the slot"))
        assert {first.result().status_code, second.result().status_code} == {504}
        fake.release()
        assert gateway.post(body("afterwards")).status_code == 200
        assert gateway.metric("queued_inputs") == 0
        assert gateway.metric("inflight_requests") == 0


@pytest.mark.parametrize(
    ("second", "status", "code", "param", "says"),
    [
        ("c", 504, "upstream_timeout", None, "3 of the inputs had no answer before the request's deadline"),
        ("refused", 400, "invalid_value", "input[2]", "refused"),
    ],
)
def test_whose_time_is_up_is_told_what_has_failed_or_how_many_inputs_had_no_answer(
    second: str, status: int, code: str, param: str | None, says: str, fake: FakeOpenAI
) -> None:
    models = {"m": {"deployments": [{"upstream": "up", "model": MODEL}], "max_batch": 1}}
    settings = config(fake, {"max_concurrency": 1}, server={"request_timeout": "2s"}, models=models, cache={})
    fake.fail(faults.vendor_error("bad_input"), times=None, when=lambda texts: texts == ["refused"])
    with running(settings) as gateway, ThreadPoolExecutor() as pool:
        assert gateway.post({"model": "m", "input": "cached"}).status_code == 200
        fake.hold()
        asked = pool.submit(gateway.post, {"model": "m", "input": ["cached", "b", second, "d", "e", "f"]})
        for calls in (2, 3):
            fake.wait_for_calls(calls)
            fake.release(1)
        fake.wait_for_calls(4)
        response = asked.result()
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (status, code, param)
        assert says in error["message"]
        assert response.headers["x-embedding-upstream-calls"] == "3"


def test_who_had_no_call_until_its_time_was_up_is_told_of_overload_and_not_of_a_slow_upstream(fake: FakeOpenAI) -> None:
    models = {"m": {"deployments": [{"upstream": "up", "model": MODEL}], "max_batch": 1}}
    settings = config(fake, {"max_concurrency": 1}, server={"request_timeout": "1s"}, models=models)
    with running(settings) as gateway, ThreadPoolExecutor() as pool:
        fake.hold()
        first = pool.submit(gateway.post, {"model": "m", "input": "holds the slot"})
        fake.wait_for_calls(1)
        bulk = pool.submit(gateway.post, {"model": "m", "input": [f"text {i}" for i in range(20)]})
        settled(gateway, lambda: gateway.metric("queued_inputs") == 20)
        time.sleep(0.3)  # its time is up so much later
        query = pool.submit(gateway.post, {"model": "m", "input": "goes before bulk"})
        assert first.result().status_code == 504
        response = bulk.result()
        assert (response.status_code, error_of(response)["code"]) == (503, "overloaded")
        assert response.headers["retry-after"] == "1"
        assert query.result().status_code == 504, "it was asked"
        assert gateway.metric("rejected_requests_total", reason="overloaded") == 1
        assert len(fake.calls) == 2


@pytest.mark.parametrize("begins", ["alone", "behind another"])
def test_a_head_that_comes_in_pieces_is_part_of_the_requests_time(begins: str, fake: FakeOpenAI) -> None:
    request = post(body("slow"))
    with running(config(fake, server={"request_timeout": "2s"})) as gateway, wire(gateway.url) as connection:
        if begins == "behind another":
            connection.send(post(body("before")) + request[:40])
            assert connection.must_reply().status_code == 200
        else:
            connection.send(request[:40])
        before = time.monotonic()
        fake.hold()
        time.sleep(1.8)  # of its two
        connection.send(request[40:])
        assert connection.must_reply().status_code == 504
        assert time.monotonic() - before < 1.8 + 2
        assert float(log_lines(gateway)[-1]["ms"]) >= 1700, "nor does it take less than its time"


def test_a_head_that_takes_longer_than_a_request_may_is_refused(fake: FakeOpenAI) -> None:
    with running(config(fake, server={"request_timeout": "300ms"})) as gateway, wire(gateway.url) as connection:
        connection.send(post(body("never whole"))[:40])
        reply = connection.must_reply()
        assert (reply.status_code, reply.headers["connection"]) == (400, "close")
        assert b"did not arrive in time" in reply.content
        assert connection.closed


def test_the_time_before_a_requests_first_byte_is_not_part_of_its_time(fake: FakeOpenAI) -> None:
    with running(config(fake, server={"request_timeout": "1s"})) as gateway, wire(gateway.url) as connection:
        for text in ("behind nothing", "behind another"):
            time.sleep(1.2)  # longer than a request may take
            request = post(body(text))
            connection.send(request[:40])
            gateway.call(settle())  # so that its head comes in pieces
            connection.send(request[40:])
            assert connection.must_reply().status_code == 200


@pytest.mark.parametrize("whole", [True, False], ids=["before its turn", "in its turn"])
def test_nor_is_that_in_which_the_request_before_it_is_answered(whole: bool, fake: FakeOpenAI) -> None:
    fake.delay = 1.6
    request = post(body("behind"))
    with running(config(fake, server={"request_timeout": "3s"})) as gateway, wire(gateway.url) as connection:
        connection.send(post(body("before")) + request[:40])
        fake.wait_for_calls(1)
        if whole:
            connection.send(request[40:])
        assert connection.must_reply().status_code == 200
        if not whole:
            connection.send(request[40:])
        assert connection.must_reply().status_code == 200


# --- callers that have gone ---------------------------------------------------------------------------------------


def test_when_a_caller_hangs_up_its_unsent_inputs_are_not_sent_and_shared_ones_are(fake: FakeOpenAI) -> None:
    with running(config(fake, {"max_concurrency": 1})) as gateway, ThreadPoolExecutor() as pool:
        fake.hold()
        first = pool.submit(gateway.post, body("under way"))
        fake.wait_for_calls(1)
        with wire(gateway.url) as leaves:
            leaves.send(post(body("only mine", "shared")))
            settled(gateway, lambda: gateway.metric("queued_inputs") == 2)
            stays = pool.submit(gateway.post, body("shared", "its own"))
            settled(gateway, lambda: gateway.metric("queued_inputs") == 3)
        settled(gateway, lambda: statuses(gateway) == ["499"])
        assert gateway.metric("inflight_requests") == 2
        fake.release()
        assert vectors_are_right(fake, first.result(), "under way")
        assert vectors_are_right(fake, stays.result(), "shared", "its own")
        assert [call.texts for call in fake.calls] == [["under way"], ["shared", "its own"]]
        assert gateway.metric("queued_inputs") == 0
        assert gateway.metric("inflight_requests") == 0
        assert gateway.metric("requests_total", status="499", model=MODEL) == 1
        assert gateway.metric("rejected_requests_total", reason="client_gone") == 1
        assert sorted(statuses(gateway)) == ["200", "200", "499"]


def test_a_call_under_way_outlives_its_first_caller_for_the_second_and_for_the_cache(fake: FakeOpenAI) -> None:
    gateway_config = config(fake, {"max_concurrency": 1}, cache={})
    with running(gateway_config) as gateway, ThreadPoolExecutor() as pool:
        fake.hold()
        with wire(gateway.url) as leaves:
            leaves.send(post(body("shared", "only of the one that leaves")))
            fake.wait_for_calls(1)
            stays = pool.submit(gateway.post, body("shared", "its own"))
            settled(gateway, lambda: gateway.metric("queued_inputs") == 1)
        settled(gateway, lambda: statuses(gateway) == ["499"])
        fake.release()
        assert vectors_are_right(fake, stays.result(), "shared", "its own")
        assert not any(call.abandoned for call in fake.calls)
        later = gateway.post(body("only of the one that leaves"))
        assert later.headers["x-embedding-cache"] == "hit", "it was paid for"
        assert [call.texts for call in fake.calls] == [["shared", "only of the one that leaves"], ["its own"]]


def test_a_caller_that_hangs_up_before_its_body_is_whole_leaves_nothing_behind(fake: FakeOpenAI) -> None:
    with running(config(fake)) as gateway:
        for data in (post(body("x"))[:-3], head("POST", "/v1/embeddings", "Transfer-Encoding: chunked") + b"5\r\nabc"):
            with wire(gateway.url) as connection:
                connection.send(data)
                settled(gateway, lambda: gateway.metric("inflight_requests") == 1)
            settled(gateway, lambda: gateway.metric("inflight_requests") == 0)
        settled(gateway, lambda: statuses(gateway) == ["499", "499"])
        assert not fake.calls


@pytest.mark.parametrize("apart", [False, True], ids=["at once", "one after another"])
def test_a_caller_that_hangs_up_with_requests_behind_the_first_is_no_error_of_ours(
    fake: FakeOpenAI, caplog: pytest.LogCaptureFixture, apart: bool
) -> None:
    with running(config(fake)) as gateway:
        fake.hold()
        first, *behind = [post(body(f"pipelined {i}")) for i in range(3)]
        with wire(gateway.url) as connection:
            connection.send(first if apart else first + b"".join(behind))
            fake.wait_for_calls(1)
            for each in behind if apart else ():
                connection.send(each)
                gateway.call(settle())  # so that it is read separately
        settled(gateway, lambda: gateway.metric("inflight_requests") == 0)
        fake.release()
        assert gateway.post(body("another")).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_whole_crowd_that_hangs_up_leaves_the_gateway_as_it_was(fake: FakeOpenAI) -> None:
    with running(config(fake, {"max_concurrency": 1}, server={"max_inflight": 50})) as gateway:
        fake.hold()
        with ExitStack() as crowd:
            for i in range(50):
                crowd.enter_context(wire(gateway.url)).send(post(body(*(f"{i}/{j}" for j in range(20)))))
            settled(gateway, lambda: gateway.metric("inflight_requests") == 50)
        settled(gateway, lambda: statuses(gateway) == ["499"] * 50)
        assert gateway.metric("inflight_requests") == 0
        fake.release()
        assert gateway.post(body("afterwards")).status_code == 200
        assert gateway.metric("queued_inputs") == 0
        assert len(fake.calls) == 2, "the one under way, and the one afterwards"


# --- internal errors ----------------------------------------------------------------------------------------------


def test_a_bug_of_ours_is_a_500_in_the_same_shape_that_tells_nothing(
    fake: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(request: EmbedRequest) -> EmbedResult:
        raise RuntimeError("canary of the inside")

    def broken_status() -> dict[str, Any]:
        raise RuntimeError("canary of the inside")

    with running(config(fake)) as gateway:
        names = gateway.app.gateway.names
        monkeypatch.setitem(names, MODEL, dataclasses.replace(names[MODEL], embed=cast("Prepare", broken)))
        monkeypatch.setattr(gateway.app.gateway, "status", broken_status)
        for response in (gateway.post(body("x")), gateway.get("/readyz")):
            assert response.status_code == 500
            error = error_of(response)
            assert (error["type"], error["code"], error["param"]) == ("server_error", "internal_error", None)
            assert "canary" not in response.text
        assert gateway.metric("inflight_requests") == 0
        assert gateway.metric("requests_total", status="500") == 1
    assert "canary of the inside" in caplog.text, "we are told"


# --- the log --------------------------------------------------------------------------------------------------------

CANARY = "canary"
FIELDS = {"timestamp", "level", "event", "request_id", "client", "model", "status"} | {
    *("error", "inputs", "cached", "calls", "ms")
}


def test_every_request_leaves_one_line_of_names_and_numbers(fake: FakeOpenAI) -> None:
    with running(config(fake, cache={}, auth={"keys": {"team": {"key": "k" * 20}}})) as gateway:
        asked: list[tuple[str, dict[str, str]]] = []

        def ask(what: object, status: str, **told: str) -> None:
            own = f"id-{len(asked)}"
            headers = {"api_key": told.pop("key", "k" * 20), "x_request_id": own}
            assert str(gateway.post(what, **headers).status_code) == status
            asked.append((own, {"status": status, **told}))

        good = {"client": "team", "model": MODEL, "error": ""}
        ask(body("a", "b"), "200", inputs="2", cached="0", calls="1", **good)
        ask(body("a", "b", "c"), "200", inputs="3", cached="2", calls="1", **good)
        ask(body("a"), "200", inputs="1", cached="1", calls="0", **good)
        ask(body(""), "400", client="team", model=MODEL, error="invalid_value", inputs="0", calls="0")
        ask(
            {"model": "unknown", "input": "x"}, "404", client="team", model="other", error="model_not_found", inputs="1"
        )
        ask(body("a"), "401", key="wrong", client="anonymous", model="other", error="invalid_api_key")
        fake.fail(faults.vendor_error("auth"))
        ask(body("d"), "502", client="team", model=MODEL, error="upstream_auth", inputs="1")
        gateway.get("/healthz")
        gateway.get("/v1/models")

        lines = log_lines(gateway)
        assert [line["request_id"] for line in lines] == [own for own, _ in asked], "embeddings only, in their order"
        for line, (_, told) in zip(lines, asked, strict=True):
            assert set(line) == FIELDS
            assert line["event"] == "request"
            assert float(line["ms"]) >= 0
            assert {name: line[name] for name in told} == told


def test_no_text_key_user_or_name_that_a_caller_sends_is_ever_logged_or_told(
    fake: FakeOpenAI, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    fake.api_key = "sk-canary-upstream"
    key = "canary-client-key-0123456789"
    text = "canary text"
    gateway_config = config(
        fake, {"api_key": "sk-canary-upstream"}, cache={}, auth={"keys": {"team": {"key": key}}},
        server={"request_timeout": "2s", "max_body": "10KiB"},
    )  # fmt: skip
    full = {"model": MODEL, "input": [text], "user": "canary user"}
    with running(gateway_config) as gateway:
        answers = [
            gateway.post(full, api_key=key),
            gateway.post(full, api_key=key),  # a cache hit
            gateway.post(full, api_key="canary-wrong-key"),
            gateway.post(full, authorization="Bearer canary-wrong-key"),
            gateway.post({**full, "input": [text, 1]}, api_key=key),
            gateway.post({**full, "user": {"canary": "canary"}}, api_key=key),
            gateway.post(b'{"canary": ', api_key=key),
            gateway.post(b"canary" * 5000, api_key=key),
            gateway.post(full, api_key=key, content_encoding="canary"),
        ]
        for fault in (
            faults.vendor_error("auth", "Incorrect API key provided: sk-canary-upstream."),
            faults.vendor_error("internal", "trouble with sk-canary-upstream"),
            faults.html_page(502),
            faults.reset_mid_body,
            faults.invalid_json,
            faults.nan_literal,
        ):
            fake.fail(fault, times=4)
            answers.append(gateway.post({**full, "input": [f"{text} {fault.name}"]}, api_key=key))
            fake.heal()
        statuses_seen = [answer.status_code for answer in answers]
        down = [502, 502, 503, 503, 502, 502]  # 503 once all deployments have five failures in a row, at two a request
        assert statuses_seen == [200, 200, 401, 401, 400, 400, 400, 413, 415, *down]
        for answer in answers:
            assert CANARY not in answer.text
            assert CANARY not in str(answer.headers)
        # An unknown model name is the caller's own text: it is sent back, cut, and never logged.
        gateway.post({**full, "model": "canary-model"}, api_key=key)
        gateway.post(full, path="/v1/engines/canary-model/embeddings", api_key=key)
        gateway.get("/v1/canary", api_key=key)
        gateway.get("/v1/models/canary", api_key=key)
        with wire(gateway.url) as connection:
            connection.send(b"CANARY canary HTTP/1.1\r\ncanary: canary\r\n\r\n")
            assert connection.must_reply().status_code == 400
        exposed = gateway.get("/metrics").text
        written = gateway.log.getvalue()
        assert len(written.splitlines()) == len(answers) + 2
    out, err = capfd.readouterr()
    ours = "\n".join(
        f"{record.name} {record.getMessage()} {record.exc_text or ''}"
        for record in caplog.records
        if record.name.split(".")[0] not in ("httpx", "httpcore")  # the test's client
    )
    for place in (written, exposed, ours, out, err):
        assert CANARY not in place.lower()
