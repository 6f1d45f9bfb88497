"""Several deployments of one model: if one fails, another takes over, and a dead one is not hammered."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest

from app.clock import SystemClock
from app.pipeline import canary
from tests.fakes import FakeDashScope, FakeOpenAI, faults, unused_url
from tests.harness import Running, no_descriptors, running

MODEL = "text-embedding-3-small"


class FastClock(SystemClock):
    """Pauses between retries take no time, but health and caches see the clock advance by them.
    Longer sleeps are housekeeping and never end."""

    def __init__(self) -> None:
        self.slept = 0.0
        self.jumped = 0.0
        """Seconds by which the machine's clock has been set, in either direction."""

    def monotonic(self) -> float:
        return super().monotonic() + self.slept

    def time(self) -> float:
        return super().time() + self.jumped

    async def sleep(self, seconds: float) -> None:
        if seconds >= canary.ROUND:
            await asyncio.Event().wait()
        self.slept += seconds
        await asyncio.sleep(0)


def two(one: str, other: str, **more: Any) -> dict[str, Any]:
    upstreams = {
        name: {"type": "openai", "api_key": "sk-fake", "base_url": url + "/v1"}
        for name, url in (("one", one), ("other", other))
    }
    deployments = [{"upstream": name, "model": MODEL} for name in upstreams]
    return {"upstreams": upstreams, "models": {"m": {"deployments": deployments}}, "cache": {"memory": None}, **more}


async def ask(gateway: Running, fake: FakeOpenAI, count: int, *, tag: str = "text", at_once: int = 16) -> list[int]:
    """The statuses of `count` one-text requests; every vector is compared."""
    room = asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, text: str) -> int:
        async with room:
            response = await client.post(f"{gateway.base_url}/embeddings", json={"model": "m", "input": text})
        if response.status_code == 200:
            vector = np.array(response.json()["data"][0]["embedding"], "<f4")
            assert np.array_equal(vector, fake.expected(MODEL, text))
        return response.status_code

    async with httpx.AsyncClient(timeout=60, trust_env=False, limits=httpx.Limits(max_connections=at_once)) as client:
        return await asyncio.gather(*(one(client, f"{tag} {i}") for i in range(count)))


async def test_killing_one_of_two_deployments_under_load_fails_no_request() -> None:
    with FakeOpenAI(api_key="sk-fake") as one, FakeOpenAI(api_key="sk-fake") as other:
        with running(two(one.url, other.url), clock=FastClock()) as gateway:
            before = await ask(gateway, one, 200, tag="before")
            load = asyncio.create_task(ask(gateway, other, 600, tag="during"))
            while not one.calls or not other.calls:
                await asyncio.sleep(0)
            await asyncio.to_thread(one.stop)
            during = await load
            assert set(before) | set(during) == {200}


async def test_against_a_dead_upstream_200_requests_cause_at_most_a_fifth_more_calls() -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        upstream = {"type": "openai", "api_key": "sk-fake", "base_url": fake.url + "/v1"}
        config = {
            "upstreams": {"up": upstream},
            "models": {"m": {"deployments": [{"upstream": "up", "model": MODEL}], "max_batch": 1}},
            "cache": {"memory": None},
        }
        with running(config, clock=FastClock()) as gateway:
            fake.fail(faults.vendor_error("unavailable"), times=None)
            statuses = await ask(gateway, fake, 200)
            assert set(statuses) <= {502, 503}
            assert 200 <= len(fake.calls) <= 240
            last = gateway.post({"model": "m", "input": "one more"})
            assert last.headers.get("x-should-retry") == "false" or int(last.headers["retry-after"]) >= 1


async def test_a_rate_limited_deployment_rests_as_long_as_it_says_and_the_other_one_works() -> None:
    with FakeOpenAI(api_key="sk-fake") as one, FakeOpenAI(api_key="sk-fake") as other:
        with running(two(one.url, other.url), clock=FastClock()) as gateway:
            await asyncio.gather(one.calls_arrived(1), other.calls_arrived(1))  # the canary's
            await asyncio.gather(one.idle(), other.idle())
            limited = faults.http_error(429, b'{"error":{"message":"slow"}}', {"retry-after": "1000"})
            one.fail(limited, times=None)
            statuses = await ask(gateway, other, 60, at_once=4)
            assert set(statuses) == {200}
            assert len(one.calls) <= 5, "the canary, those under way when it first said so, and none after"
            assert gateway.metric("upstream_available", upstream="one", model=MODEL) == 1


async def test_out_of_descriptors_we_have_no_room_and_the_upstream_keeps_its_traffic() -> None:
    with FakeDashScope(api_key="sk-fake") as fake:  # its models are not fetched: no connection yet
        upstream = {"type": "dashscope", "api_key": "sk-fake", "base_url": fake.url + "/api/v1"}
        with running({"upstreams": {"up": upstream}}) as gateway:
            texts = [{"model": "text-embedding-v4", "input": f"too many {i}"} for i in range(6)]  # 5 would eject it
            async with httpx.AsyncClient(base_url=gateway.url, trust_env=False) as client:
                assert (await client.get("/healthz")).status_code == 200  # opens the connection that is used below
                with no_descriptors():
                    refused = [await client.post("/v1/embeddings", json=each) for each in texts]
                available = gateway.metric("upstream_available", upstream="up", model="text-embedding-v4")
                served = await client.post("/v1/embeddings", json=texts[0])
            for response in refused:
                assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded"), response.text
                assert "Too many open files" in response.json()["error"]["message"]
                assert int(response.headers["retry-after"]) >= 1
            assert (available, served.status_code, len(fake.calls)) == (1, 200, 1)


async def test_out_of_descriptors_the_deployment_that_has_a_connection_is_asked() -> None:
    with FakeOpenAI(api_key="sk-fake") as one, FakeOpenAI(api_key="sk-fake") as other:
        with running(two(one.url, other.url), clock=FastClock()) as gateway:
            await asyncio.gather(one.calls_arrived(1), other.calls_arrived(1))  # the canary's
            await asyncio.gather(one.idle(), other.idle())
            async with httpx.AsyncClient(base_url=gateway.url, trust_env=False) as client:
                assert (await client.get("/healthz")).status_code == 200  # opens the connection that is used below
                one.stop()  # closes its connections
                with no_descriptors():
                    texts = [{"model": "m", "input": f"text {i}"} for i in range(30)]
                    statuses = [(await client.post("/v1/embeddings", json=each)).status_code for each in texts]
            assert statuses == [200] * 30
            assert gateway.metric("upstream_available", upstream="one", model=MODEL) == 1


async def test_a_deployment_that_failed_comes_back_by_one_call() -> None:
    clock = FastClock()
    with FakeOpenAI(api_key="sk-fake") as one, FakeOpenAI(api_key="sk-fake") as other:
        with running(two(one.url, other.url), clock=clock) as gateway:
            await asyncio.gather(one.calls_arrived(1), other.calls_arrived(1))  # the canary's
            await asyncio.gather(one.idle(), other.idle())
            one.fail(faults.vendor_error("internal"), times=None)
            for second in range(7):  # for a second after a failure, others come first
                assert set(await ask(gateway, other, 10, tag=f"a{second}", at_once=1)) == {200}
                clock.slept += 1.1
            assert len(one.calls) == 6, "the canary's, and five in a row"
            assert gateway.metric("upstream_available", upstream="one", model=MODEL) == 0
            asked = len(one.calls)
            assert set(await ask(gateway, other, 20, tag="b", at_once=1)) == {200}
            assert len(one.calls) == asked, "while it is out it is left alone"
            one.heal()
            clock.slept += 31
            assert set(await ask(gateway, other, 20, tag="c", at_once=1)) == {200}
            assert len(one.calls) > asked
            assert gateway.metric("upstream_available", upstream="one", model=MODEL) == 1


@pytest.mark.parametrize("fault", [faults.null_vector, faults.empty_vector, faults.zero_vector, faults.nan_literal])
async def test_one_that_has_no_vector_of_some_inputs_is_asked_after_the_one_that_has(fault: faults.Fault) -> None:
    """Retries are limited, so it must rarely be tried first."""
    clock = FastClock()
    with FakeOpenAI(api_key="sk-fake") as one, FakeOpenAI(api_key="sk-fake") as other:
        with running(two(one.url, other.url), clock=clock) as gateway:
            await asyncio.gather(one.calls_arrived(1), other.calls_arrived(1))  # the canary's
            await asyncio.gather(one.idle(), other.idle())
            one.fail(fault, times=None)
            for i in range(200):
                response = gateway.post({"model": "m", "input": [f"{i} {part}" for part in "abc"]})
                assert response.status_code == 200
                clock.slept += 1.0
            assert 2 <= len(one.calls) <= 25
            assert "no vectors" in gateway.get("/readyz").json()["upstreams"]["one"]["trouble"][MODEL]


async def test_inputs_that_nobody_has_a_vector_of_speak_against_nobody() -> None:
    clock = FastClock()
    with FakeOpenAI(api_key="sk-fake") as one, FakeOpenAI(api_key="sk-fake") as other:
        both = two(one.url, other.url)
        both["models"]["m"]["deployments"][1]["priority"] = 2
        with running(both, clock=clock) as gateway:
            await asyncio.gather(one.calls_arrived(1), other.calls_arrived(1))  # the canary's
            await asyncio.gather(one.idle(), other.idle())
            for i in range(10):
                for fake in (one, other):
                    fake.fail(faults.nan_as_null.on("poison"), times=None)
                asked = gateway.post({"model": "m", "input": [f"good {i}", "poison"]})
                assert asked.status_code in (200, 502)
                clock.slept += 2  # longer than the pause after any failure
                served = gateway.post({"model": "m", "input": f"text {i}"})
                assert served.headers["x-embedding-upstream"] == f"one/{MODEL}"


async def test_a_clock_that_is_set_brings_nobody_back_and_forgets_nothing() -> None:
    clock, years = FastClock(), 10 * 365 * 86400.0
    with FakeOpenAI(api_key="sk-fake") as one, FakeOpenAI(api_key="sk-fake") as other:
        with running(two(one.url, other.url, cache={}), clock=clock) as gateway:
            one.fail(faults.vendor_error("internal"), times=None)
            for second in range(7):
                assert set(await ask(gateway, other, 10, tag=f"a{second}", at_once=1)) == {200}
                clock.slept += 1.1
            one.heal()
            asked = len(one.calls)
            for clock.jumped in (years, -years):
                assert set(await ask(gateway, other, 20, tag=f"at {clock.jumped}", at_once=1)) == {200}
                assert len(one.calls) == asked, "it is out for half a minute by the other clock"
                again = gateway.post({"model": "m", "input": "a0 0"})
                assert again.headers["x-embedding-cache"] == "hit"


async def test_the_last_deployment_is_asked_however_often_it_fails() -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:  # nothing listens at the other's address
        with running(two(fake.url, unused_url()), clock=FastClock()) as gateway:
            fake.fail(faults.vendor_error("internal"), times=30)
            await ask(gateway, fake, 40, tag="bad", at_once=1)
            fake.heal()
            first, *others = await ask(gateway, fake, 6, tag="good", at_once=1)
            assert first in (200, 503), "which of the two is asked"
            assert set(others) == {200}


async def test_when_all_are_down_callers_are_told_how_long_to_wait_and_hits_are_answered() -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:  # nothing listens at the other's address
        with running(two(fake.url, unused_url(), cache={}), clock=FastClock()) as gateway:
            assert await ask(gateway, fake, 1, tag="paid") == [200]
            fake.fail(faults.vendor_error("internal"), times=None)
            await ask(gateway, fake, 20, tag="bad", at_once=1)
            down = gateway.post({"model": "m", "input": "bad"})
            error = down.json()["error"]
            assert (down.status_code, error["type"], error["code"]) == (503, "overloaded_error", "upstream_unavailable")
            assert (down.headers["retry-after"], down.headers.get("x-should-retry")) == ("5", None)
            assert "every deployment" in error["message"]
            assert await ask(gateway, fake, 1, tag="paid") == [200]
            assert gateway.post({"model": "m", "input": "paid 0"}).headers["x-embedding-cache"] == "hit"
            fake.heal()
            assert gateway.post({"model": "m", "input": "bad"}).status_code == 200


async def test_an_upstream_that_only_breaks_connections_is_down() -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        with running(two(fake.url, fake.url), clock=FastClock()) as gateway:
            fake.fail(faults.reset_before_answer, times=None)
            await ask(gateway, fake, 20, tag="bad", at_once=1)
            down = gateway.post({"model": "m", "input": "bad"})
            assert (down.status_code, down.json()["error"]["code"]) == (503, "upstream_unavailable")
            assert (down.headers["retry-after"], down.headers.get("x-should-retry")) == ("5", None)


async def test_a_handshake_that_is_refused_is_told_as_that_however_often_it_is_met() -> None:
    async def speak_no_tls(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(speak_no_tls, "127.0.0.1", 0) as listener, httpx.AsyncClient() as client:
        url = f"https://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        with running(two(url, url), clock=FastClock()) as gateway:
            for i in range(20):
                refused = await client.post(f"{gateway.base_url}/embeddings", json={"model": "m", "input": f"text {i}"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (502, "upstream_unreachable")
                assert refused.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (faults.http_error(401, b'{"error":{"message":"no such key"}}'), "upstream_auth"),
        (faults.one_vector_fewer, "upstream_invalid_response"),
    ],
    ids=lambda each: str(each.name if isinstance(each, faults.Fault) else each),
)
async def test_what_is_no_outage_is_told_as_what_it_is_however_often_it_is_met(fault: faults.Fault, code: str) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        with running(two(fake.url, fake.url), clock=FastClock()) as gateway:
            fake.fail(fault, times=None)
            assert set(await ask(gateway, fake, 20, tag="bad", at_once=1)) == {502}
            assert gateway.post({"model": "m", "input": "bad"}).json()["error"]["code"] == code


def test_deployments_in_different_vector_spaces_never_answer_to_one_name() -> None:
    with (
        FakeDashScope(api_key="sk-fake") as ds,
        FakeOpenAI(api_key="sk-fake", models={"text-embedding-v3": 1024}) as ai,
    ):
        upstreams = {
            "ds": {"type": "dashscope", "api_key": "sk-fake", "base_url": ds.url + "/api/v1"},
            "ai": {"type": "openai", "api_key": "sk-fake", "base_url": ai.url + "/v1"},
        }
        with running({"upstreams": upstreams}) as gateway:
            assert gateway.post({"model": "text-embedding-v3", "input": "x"}).status_code == 404
            for name in ("ds/text-embedding-v3", "ai/text-embedding-v3"):
                assert gateway.post({"model": name, "input": "x"}).headers["x-embedding-cache"] == "miss"


@pytest.mark.parametrize("away", [False, True])
def test_an_upstreams_name_before_a_models_means_that_upstream_whatever_another_one_lists(away: bool) -> None:
    with (
        FakeOpenAI(api_key="sk-fake", models={"openai/text-embedding-3-small": 1536}) as proxy,
        FakeOpenAI(api_key="sk-fake", models={"text-embedding-3-small": 1536}) as own,
    ):
        upstreams = {
            "a-proxy": {"type": "openai", "api_key": "sk-fake", "base_url": proxy.url + "/v1"},
            "openai": {"type": "openai", "api_key": "sk-fake", "base_url": own.url + "/v1"},
        }
        if away:
            upstreams["openai"]["base_url"] = "http://127.0.0.1:1"
        with running({"upstreams": upstreams}) as gateway:
            answer = gateway.post({"model": "openai/text-embedding-3-small", "input": "x"})
            assert answer.headers.get("x-embedding-upstream") == (None if away else "openai/text-embedding-3-small")
            assert answer.status_code == (502 if away else 200)
            answer = gateway.post({"model": "a-proxy/openai/text-embedding-3-small", "input": "y"})
            assert answer.headers["x-embedding-upstream"] == "a-proxy/openai/text-embedding-3-small"
