"""Callers' limits as callers see them: refusals, headers, and effects on others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from app.api.render import duration
from app.config import Settings
from tests.api.support import MODEL, config, error_of, head, settled, wire
from tests.clock import HandClock
from tests.fakes import FakeOpenAI, faults
from tests.harness import Running, running, settings_of
from tests.redis_server import RedisServer

KINDS = ("requests", "tokens")


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as fake:
        yield fake


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def keys(**callers: dict[str, Any]) -> dict[str, Any]:
    """Callers whose keys are their names, padded to the required length."""
    return {"keys": {name: {"key": secret(name), **limits} for name, limits in callers.items()}}


def secret(name: str) -> str:
    return f"key-of-{name}-0123456789"


def ask(gateway: Running, name: str, *texts: str, model: str = MODEL) -> httpx.Response:
    return gateway.post({"model": model, "input": list(texts) or "hi"}, authorization=f"Bearer {secret(name)}")


def left(response: httpx.Response, kind: str) -> tuple[int, int, str]:
    """The limit, remaining and reset headers of a response."""
    limit, remaining, reset = (
        response.headers[f"x-ratelimit-{what}-{kind}"] for what in ("limit", "remaining", "reset")
    )
    return int(limit), int(remaining), reset


@pytest.mark.parametrize("allowed", [56, 100])
def test_the_wait_that_a_refusal_states_is_the_one_in_its_headers_and_long_enough(
    fake: FakeOpenAI, allowed: int
) -> None:
    """1.0714… s, and less than headers can say."""
    clock = HandClock()
    with running(config(fake, auth=keys(team={"requests_per_minute": allowed})), clock=clock) as gateway:
        gateway.app.gateway.quotas["team"].adjust(allowed, 0)
        refused = ask(gateway, "team")
        stated = float(error_of(refused)["message"].rpartition("try again in ")[2].removesuffix(" s"))
        assert refused.status_code == 429
        assert round(stated * 1000) == int(refused.headers["retry-after-ms"])
        gateway.call(clock.advance(stated))
        assert ask(gateway, "team").status_code == 200


def test_every_answer_to_a_limited_key_says_what_is_left_and_the_refusal_when_to_come_back(fake: FakeOpenAI) -> None:
    clock = HandClock()
    auth = keys(team={"requests_per_minute": 3, "tokens_per_minute": 600}, free={})
    with running(config(fake, auth=auth), clock=clock) as gateway:
        first = ask(gateway, "team", "今天" * 50)
        assert first.status_code == 200
        assert left(first, "requests") == (3, 2, "20s")
        used = first.json()["usage"]["total_tokens"]
        assert used != 100, "else nothing shows that the estimate was put right"
        assert left(first, "tokens")[:2] == (600, 600 - used)
        unknown = ask(gateway, "team", model="unknown")
        assert unknown.status_code == 404
        assert left(unknown, "requests") == (3, 1, "40s"), "what is refused for what it says counts as well"
        assert ask(gateway, "team").status_code == 200
        refused = ask(gateway, "team")
        assert refused.status_code == 429
        error = error_of(refused)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "3 requests per minute" in error["message"]
        assert refused.headers["retry-after"] == "20"
        assert refused.headers["retry-after-ms"] == "20000"
        assert left(refused, "requests") == (3, 0, "1m0s")
        assert "x-should-retry" not in refused.headers
        assert gateway.metric("rejected_requests_total", reason="rate_limit_exceeded") == 1
        assert gateway.metric("requests_total", status="429", client="team") == 1
        gateway.call(clock.advance(20))
        assert ask(gateway, "team").status_code == 200
        free = ask(gateway, "free")
        assert free.status_code == 200
        assert not [name for name in free.headers if name.startswith("x-ratelimit")]


def test_a_limit_that_is_not_set_is_not_spoken_of(fake: FakeOpenAI) -> None:
    with running(config(fake, auth=keys(team={"tokens_per_minute": 100}))) as gateway:
        names = {name for name in ask(gateway, "team").headers if name.startswith("x-ratelimit")}
        assert names == {f"x-ratelimit-{what}-tokens" for what in ("limit", "remaining", "reset")}


def test_who_is_out_of_tokens_is_told_when_a_request_of_this_size_fits(fake: FakeOpenAI) -> None:
    clock = HandClock()
    with running(config(fake, auth=keys(team={"tokens_per_minute": 120})), clock=clock) as gateway:
        _, remaining, _ = left(ask(gateway, "team"), "tokens")
        gateway.app.gateway.quotas["team"].adjust(0, remaining + 1)  # as if the bill had been this high
        before = ask(gateway, "team", "今天" * 30)
        assert before.status_code == 429
        gateway.call(clock.advance(int(before.headers["retry-after"])))
        assert ask(gateway, "team", "今天" * 30).status_code == 200


def test_what_may_be_an_image_is_not_waited_for_as_if_it_were_text(fake: FakeOpenAI) -> None:
    with running(config(fake, auth=keys(team={"tokens_per_minute": 60_000})), clock=HandClock()) as gateway:
        gateway.app.gateway.quotas["team"].adjust(0, 60_000)
        refused = ask(gateway, "team", "x" * 3_000_000)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) <= 10


def test_a_request_that_could_never_fit_is_told_so(fake: FakeOpenAI) -> None:
    with running(config(fake, auth=keys(team={"tokens_per_minute": 100}))) as gateway:
        response = ask(gateway, "team", *(["x" * 40] * 20))
        assert response.status_code == 400
        assert error_of(response)["param"] == "input"
        assert "more than the 100 tokens per minute" in error_of(response)["message"]
        assert "retry-after" not in response.headers
        assert not fake.calls


@pytest.mark.parametrize(
    ("stated", "counted"), [(4_000, 4_000), (2**32 - 1, 1), (2**64, 1), (-1, 1), (2.5, 1), ("12", 1), (True, 1)]
)
def test_a_bill_that_no_text_comes_to_puts_nobody_into_debt(fake: FakeOpenAI, stated: Any, counted: int) -> None:
    rows = [{"object": "embedding", "index": 0, "embedding": [1.0] * 1536}]
    reply = {"object": "list", "data": rows, "model": MODEL, "usage": {"total_tokens": stated}}
    fake.fail(faults.http_error(200, reply))
    limits = {"tokens_per_minute": 10_000}
    cache = {"memory": {"max_size": "1MiB"}}
    with running(config(fake, limits, auth=keys(team=limits), cache=cache)) as gateway:
        for _ in range(2):
            answer = ask(gateway, "team", "one")
            assert (answer.status_code, answer.json()["usage"]["total_tokens"]) == (200, counted)
        assert answer.headers["x-embedding-cache"] == "hit"
        assert ask(gateway, "team", "two").status_code == 200
        assert gateway.metric("tokens_total", source="billed") == counted + 1


def test_what_comes_from_the_cache_counts_as_well(fake: FakeOpenAI) -> None:
    clock = HandClock()
    auth = keys(team={"requests_per_minute": 2})
    with running(config(fake, auth=auth, cache={}), clock=clock) as gateway:
        assert [ask(gateway, "team").status_code for _ in range(3)] == [200, 200, 429]
        assert len(fake.calls) == 1


async def test_who_floods_takes_neither_room_nor_time_from_others(fake: FakeOpenAI) -> None:
    clock = HandClock()
    auth = keys(flood={"requests_per_minute": 1}, calm={})
    with running(config(fake, auth=auth, server={"max_inflight": 2}), clock=clock) as gateway:
        assert (await asyncio.to_thread(ask, gateway, "flood")).status_code == 200
        # Bodies that never arrive would take all the room if their callers were admitted.
        with wire(gateway.url) as one, wire(gateway.url) as two, wire(gateway.url) as three:
            for each in (one, two, three):
                each.send(
                    head("POST", "/v1/embeddings", "Content-Length: 1000", f"Authorization: Bearer {secret('flood')}")
                )
                assert each.must_reply().status_code == 429
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=gateway.url, limits=limits, timeout=30) as client:

            async def post(name: str, text: str) -> int:
                body = {"model": MODEL, "input": text}
                headers = {"authorization": f"Bearer {secret(name)}"}
                return (await client.post("/v1/embeddings", json=body, headers=headers)).status_code

            flood = [asyncio.create_task(post("flood", f"flood {i}")) for i in range(200)]
            calm = [await post("calm", f"calm {i}") for i in range(20)]
            assert set(calm) == {200}
            assert set(await asyncio.gather(*flood)) == {429}
        assert not [call for call in fake.calls if "flood" in str(call.texts)]
        assert gateway.metric("inflight_requests") == 0


def test_bodies_to_come_are_no_more_than_the_requests_that_a_caller_has_left(fake: FakeOpenAI) -> None:
    auth = keys(flood={"requests_per_minute": 2}, calm={})
    with running(config(fake, auth=auth, server={"max_inflight": 3}), clock=HandClock()) as gateway:
        body = f'{{"model": "{MODEL}", "input": "hi"}}'.encode()
        start = head(
            "POST", "/v1/embeddings", f"Content-Length: {len(body)}", f"Authorization: Bearer {secret('flood')}"
        )

        def inside(requests: int) -> None:
            settled(gateway, lambda: gateway.metric("inflight_requests") == requests)

        for _ in range(2):  # those who hang up give back what they had
            with wire(gateway.url) as one, wire(gateway.url) as two:
                for n, each in enumerate((one, two), 1):
                    each.send(start + body[:1])
                    inside(n)
                for _ in range(3):
                    refused = ask(gateway, "flood")
                    assert (refused.status_code, refused.headers["retry-after"]) == (429, "30")
                    assert "2 requests per minute" in error_of(refused)["message"]
                assert left(refused, "requests") == (2, 2, "0s")
                assert ask(gateway, "calm").status_code == 200
            inside(0)
        with wire(gateway.url) as one:
            one.send(start + body[:1])
            inside(1)
            assert ask(gateway, "flood").status_code == 200
            assert ask(gateway, "flood").status_code == 429
            one.send(body[1:])
            assert one.must_reply().status_code == 200
        assert left(ask(gateway, "flood"), "requests")[1] == 0


def test_a_503_for_lack_of_room_costs_a_caller_nothing(fake: FakeOpenAI) -> None:
    auth = keys(other={}, team={"requests_per_minute": 2})
    with running(config(fake, auth=auth, server={"max_inflight": 1}), clock=HandClock()) as gateway:
        fake.hold()
        with ThreadPoolExecutor() as pool:
            inside = pool.submit(ask, gateway, "other")
            settled(gateway, lambda: gateway.metric("inflight_requests") == 1)
            for _ in range(3):
                refused = ask(gateway, "team", "hi")
                assert (refused.status_code, error_of(refused)["code"]) == (503, "overloaded")
                assert left(refused, "requests") == (2, 2, "0s")
            fake.release()
            assert inside.result().status_code == 200
        assert ask(gateway, "team", "").status_code == 400
        assert left(ask(gateway, "team", "hi"), "requests")[1] == 0
        assert ask(gateway, "team", "hi").status_code == 429


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.012, "12ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (90.951, "1m30.951s"),
        (360, "6m0s"),
        (86400, "1440m0s"),
    ],
)
def test_times_are_written_as_openai_writes_them(seconds: float, told: str) -> None:
    assert duration(seconds) == told.encode()


# --- own cache --------------------------------------------------------------------------------------------


def test_a_caller_with_a_cache_of_its_own_shares_nothing(fake: FakeOpenAI) -> None:
    auth = keys(a={}, b={}, own={"cache": "own"}, also={"cache": "own"})
    with running(config(fake, auth=auth, cache={})) as gateway:
        states = [ask(gateway, name).headers["x-embedding-cache"] for name in ("a", "b", "own", "own", "also", "a")]
        assert states == ["miss", "hit", "miss", "hit", "miss", "hit"]
        assert len(fake.calls) == 3


def test_a_caller_with_a_cache_of_its_own_waits_for_nobody_elses_input(fake: FakeOpenAI) -> None:
    auth = keys(a={}, b={}, own={"cache": "own"})
    with running(config(fake, auth=auth)) as gateway, ThreadPoolExecutor() as pool:
        fake.hold()
        asked = [pool.submit(ask, gateway, name, "the same") for name in ("a", "b", "own")]
        settled(gateway, lambda: gateway.metric("inflight_requests") == 3)
        fake.wait_until(lambda: sum(call.rows for call in fake.calls) == 2)
        fake.release()
        assert {each.result().status_code for each in asked} == {200}
        assert fake.rows == 2, "one for a and b, and one that is the third one's own"


# --- reload -----------------------------------------------------------------------------------------------


def test_a_changed_configuration_forgets_no_callers_use_unless_the_limit_has_changed(fake: FakeOpenAI) -> None:
    def settings(requests: int) -> Settings:
        return settings_of(
            config(fake, auth=keys(same={"requests_per_minute": 5}, new={"requests_per_minute": requests}))
        )

    async def successor(gateway: Running) -> tuple[bool, bool]:
        before = gateway.app.gateway
        after = gateway.app._build_gateway(settings(7), before)
        try:
            return after.quotas["same"] is before.quotas["same"], after.quotas["new"] is before.quotas["new"]
        finally:
            await after.aclose(before)

    auth = keys(same={"requests_per_minute": 5}, new={"requests_per_minute": 6})
    with running(config(fake, auth=auth)) as gateway:
        assert gateway.call(successor(gateway)) == (True, False)


# --- several gateways -------------------------------------------------------------------------------------


def test_two_gateways_on_one_redis_keep_one_limit(fake: FakeOpenAI, redis: RedisServer) -> None:
    cache = {"memory": None, "redis": {"url": redis.url, "timeout": 20}}
    shared = config(fake, auth=keys(team={"requests_per_minute": 2}, free={}), cache=cache)
    with running(shared) as one, running(shared) as other:
        assert ask(one, "team").status_code == 200
        assert left(ask(other, "team"), "requests")[:2] == (2, 0)
        assert [ask(each, "team").status_code for each in (one, other)] == [429, 429]
        before = one.metric("cache_operations_total", operation="limit")
        assert ask(one, "free").status_code == 200
        assert one.metric("cache_operations_total", operation="limit") == before, "no limit, no round trip"


def test_a_request_whose_time_is_up_while_redis_is_asked_counts_once(fake: FakeOpenAI, redis: RedisServer) -> None:
    cache = {"memory": None, "redis": {"url": redis.url, "timeout": 20}}
    auth, server = keys(team={"requests_per_minute": 10}), {"request_timeout": "200ms"}
    with running(config(fake, auth=auth, cache=cache, server=server)) as gateway:
        redis.pause()
        answer = ask(gateway, "team")
        assert answer.status_code == 504
        assert left(answer, "requests")[:2] == (10, 10), "the question that is still under way counts it"


def test_without_redis_callers_are_let_in_by_each_gateways_part(fake: FakeOpenAI, redis: RedisServer) -> None:
    cache = {"memory": None, "redis": {"url": redis.url, "timeout": 20}}
    shared = config(fake, auth=keys(team={"requests_per_minute": 6}), cache=cache)
    with running(shared) as one, running(shared) as other:
        assert ask(one, "team").status_code == 200
        assert ask(other, "team").status_code == 200
        redis.kill()
        served = [ask(other, "team").status_code for _ in range(4)]
        assert served[:2] == [200, 200], "4 of 6 are left, for two"
        assert served[-1] == 429


def test_a_gateway_that_nobody_has_asked_yet_has_its_part_too(fake: FakeOpenAI, redis: RedisServer) -> None:
    cache = {"memory": None, "redis": {"url": redis.url, "timeout": 20}}
    shared = config(fake, auth=keys(team={"requests_per_minute": 6}), cache=cache)
    with running(shared) as one, running(shared):
        assert ask(one, "team").status_code == 200
        redis.kill()
        assert [ask(one, "team").status_code for _ in range(4)][1:] == [200, 429, 429], "5 of 6 are left, for two"


# --- upstreams' pace --------------------------------------------------------------------------------------


def test_an_upstreams_pace_is_kept_by_waiting_and_what_cannot_wait_is_told_for_how_long(fake: FakeOpenAI) -> None:
    clock = HandClock()
    settings = config(fake, {"requests_per_minute": 2}, server={"request_timeout": "20s"})
    with running(settings, clock=clock) as gateway, ThreadPoolExecutor() as pool:
        assert gateway.post({"model": MODEL, "input": "first"}).status_code == 200
        refused = gateway.post({"model": MODEL, "input": "second"})
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert 25 < int(refused.headers["retry-after"]) <= 60
        gateway.call(clock.advance(15))
        waiting = pool.submit(gateway.post, {"model": MODEL, "input": "third"})
        settled(gateway, lambda: gateway.metric("queued_inputs") == 1)
        assert len(fake.calls) == 1
        gateway.call(clock.advance(15))
        assert waiting.result().status_code == 200
        assert gateway.metric("rejected_requests_total") == 0, "it is no caller's limit"


@pytest.mark.parametrize("changed", [{"timeout": 9}, {"max_concurrency": 3}, {"headers": {"x": "y"}}])
def test_an_upstreams_pace_goes_on_whatever_else_of_it_changes(changed: dict[str, Any], fake: FakeOpenAI) -> None:
    def paced(requests: int, **other: Any) -> dict[str, Any]:
        return config(fake, {"requests_per_minute": requests, **other}, server={"request_timeout": "20s"})

    with running(paced(2), clock=HandClock()) as gateway:
        gateway.call(gateway.app._change_to(settings_of(paced(2, timeout=8))))
        gateway.app.gateway._slots["up"].shrink()  # as by a rate limit
        assert gateway.post({"model": MODEL, "input": "first"}).status_code == 200
        gateway.call(gateway.app._change_to(settings_of(paced(2, **changed))))
        refused = gateway.post({"model": MODEL, "input": "second"})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 40, "it is about one a minute, as the upstream has taught it"
        gateway.call(gateway.app._change_to(settings_of(paced(3, **changed))))
        assert gateway.post({"model": MODEL, "input": "third"}).status_code == 200, "another rate begins anew"


def test_calls_in_flight_for_the_configuration_before_take_slots(fake: FakeOpenAI) -> None:
    def one_slot(**other: Any) -> dict[str, Any]:
        return config(fake, {"max_concurrency": 1, **other})

    with running(one_slot()) as gateway, ThreadPoolExecutor() as pool:
        fake.hold()
        first = pool.submit(gateway.post, {"model": MODEL, "input": "first"})
        fake.wait_for_calls(1)
        gateway.call(gateway.app._change_to(settings_of(one_slot(timeout=9))))
        second = pool.submit(gateway.post, {"model": MODEL, "input": "second"})
        settled(gateway, lambda: gateway.metric("queued_inputs") == 1)
        assert len(fake.calls) == 1
        fake.release()
        assert [each.result().status_code for each in (first, second)] == [200, 200]


# --- lanes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 8])
def test_behind_2000_bulk_inputs_a_query_waits_for_two_upstream_calls_at_most(slots: int, fake: FakeOpenAI) -> None:
    models = {"m": {"deployments": [{"upstream": "up", "model": MODEL}], "max_batch": 10}}
    settings = config(fake, {"max_concurrency": slots, "timeout": 60}, models=models)
    bulk = [f"bulk {i}" for i in range(2000)]
    with running(settings) as gateway, ThreadPoolExecutor() as pool:
        fake.hold()
        waiting = pool.submit(gateway.post, {"model": "m", "input": bulk})
        busy = slots - slots // 4
        fake.wait_for_calls(busy)
        query = pool.submit(gateway.post, {"model": "m", "input": "query"})
        if slots == 1:
            settled(gateway, lambda: gateway.metric("queued_inputs", lane="query") == 1)
            fake.release(1)
        fake.wait_for_calls(busy + 1)
        assert fake.calls[busy].texts[0] == "query", "it is in the next call, or has a slot at once"
        fake.release(busy)  # in order of arrival: the calls before it, and its own if there is one slot
        if slots > 1:
            fake.release(1)
        assert query.result().status_code == 200
        assert not waiting.done()
        assert fake.rows <= 10 * (busy + 1)
        fake.release()
        assert len(waiting.result().json()["data"]) == 2000
