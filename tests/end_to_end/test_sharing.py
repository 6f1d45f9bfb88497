"""Upstream calls are shared and filled, as seen from both ends of the program."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest

from app.pipeline.health import FAILURES
from tests.fakes import FakeDashScope, FakeOpenAI, faults
from tests.harness import Running, running

MODEL = "text-embedding-v3"


def config(fake: FakeDashScope, **more: Any) -> dict[str, Any]:
    upstream = {"type": "dashscope", "api_key": "sk-fake", "base_url": fake.url + "/api/v1", "max_concurrency": 2}
    return {"upstreams": {"up": upstream}, **more}


async def post_all(gateway: Running, inputs: list[Any], **body: Any) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(limits=limits, timeout=30, trust_env=False) as client:
        return await asyncio.gather(
            *(
                client.post(f"{gateway.base_url}/embeddings", json={"model": MODEL, "input": each, **body})
                for each in inputs
            )
        )


async def share_a_call(gateway: Running, fake: FakeDashScope, inputs: list[Any], **body: Any) -> list[httpx.Response]:
    """The answers to requests that wait for a slot together, because both slots are taken."""
    fake.hold()
    busy = asyncio.create_task(post_all(gateway, ["busy 1", "busy 2"]))
    await fake.calls_arrived(1)
    asked = asyncio.create_task(post_all(gateway, inputs, **body))
    fake.release()
    responses = await asked
    await busy
    return responses


async def test_64_concurrent_one_text_requests_to_10_rows_and_2_slots_make_at_most_16_calls() -> None:
    with FakeDashScope(api_key="sk-fake", delay=0.05) as fake, running(config(fake, cache={"memory": None})) as gateway:
        responses = await post_all(gateway, [f"text {i}" for i in range(64)])
        for i, response in enumerate(responses):
            vector = np.array(response.json()["data"][0]["embedding"], "<f4")
            assert np.array_equal(vector, fake.expected(MODEL, f"text {i}"))
        assert len(fake.calls) <= 16
        assert fake.max_in_flight <= 2
        assert fake.rows == 64


async def test_the_same_text_in_100_concurrent_requests_is_paid_for_once() -> None:
    with FakeDashScope(api_key="sk-fake") as fake, running(config(fake)) as gateway:
        fake.hold()
        asked = asyncio.create_task(post_all(gateway, ["the one text"] * 100))
        await fake.calls_arrived(1)
        fake.release()
        responses = await asked
        assert {response.status_code for response in responses} == {200}
        assert len({response.json()["data"][0]["embedding"][0] for response in responses}) == 1
        assert fake.rows == 1


async def test_a_configured_name_and_the_models_own_share_what_is_under_way() -> None:
    models = {"mine": {"deployments": [{"upstream": "up", "model": MODEL}]}}
    with FakeDashScope(api_key="sk-fake") as fake, running(config(fake, models=models)) as gateway:
        fake.hold()
        names = ("mine", MODEL, f"up/{MODEL}")
        asked = [asyncio.create_task(post_all(gateway, ["the one text"], model=name)) for name in names]
        await fake.calls_arrived(1)
        fake.release()
        responses = [response for each in asked for response in await each]
        assert {response.status_code for response in responses} == {200}
        assert fake.rows == 1


async def test_one_callers_refused_input_is_not_its_neighbours_error() -> None:
    with FakeDashScope(api_key="sk-fake") as fake, running(config(fake, cache={"memory": None})) as gateway:
        refusal = faults.vendor_error("bad_input")
        fake.fail(refusal, times=None, when=lambda texts: "guilty" in texts)
        responses = await share_a_call(gateway, fake, [f"innocent {i}" for i in range(9)] + ["guilty"])
        assert [response.status_code for response in responses] == [200] * 9 + [400]
        assert responses[-1].json()["error"]["param"] == "input[0]"


async def test_a_request_with_nothing_but_refused_inputs_does_not_isolate_each() -> None:
    with FakeDashScope(api_key="sk-fake") as fake, running(config(fake)) as gateway:
        fake.fail(faults.vendor_error("bad_input"), times=None, when=lambda texts: "bad" in str(texts))
        response = gateway.post({"model": MODEL, "input": [f"bad {i}" for i in range(400)]})
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith("input[")
        assert len(fake.calls) <= 5 * 19, "of 40 batches, each of which takes 19 calls, those begun until 21 were known"


async def test_a_refusal_that_speaks_of_dimensions_nobody_asked_for_is_one_callers_too() -> None:
    with FakeDashScope(api_key="sk-fake") as fake, running(config(fake, cache={"memory": None})) as gateway:
        words = "Invalid image: its dimensions are below the smallest size"
        fake.fail(faults.vendor_error("bad_input", words), times=None, when=lambda texts: "guilty" in texts)
        responses = await share_a_call(gateway, fake, ["innocent 1", "guilty", "innocent 2"])
        assert [response.status_code for response in responses] == [200, 400, 200]
        error = responses[1].json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "input[0]")
        assert error["message"] == f"the upstream refused the input: {words}"
        (response,) = await post_all(gateway, ["guilty"], dimensions=512)
        assert response.json()["error"]["code"] == "unsupported_dimensions"


async def test_a_text_that_speaks_of_dimensions_and_is_quoted_is_one_callers_too() -> None:
    with FakeDashScope(api_key="sk-fake") as fake, running(config(fake, cache={"memory": None})) as gateway:
        text = "guilty of four dimensions"
        fake.fail(faults.vendor_error("bad_input", f"refused: {text}"), times=None, when=lambda texts: text in texts)
        responses = await share_a_call(gateway, fake, ["innocent 1", text, "innocent 2"], dimensions=512)
        assert [response.status_code for response in responses] == [200, 400, 200]
        error = responses[1].json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "input[0]")


@pytest.mark.parametrize(
    ("refusal", "dimensions", "status"),
    [("internal", None, 502), ("model_not_found", None, 502), ("bad_input", 32, 400), ("bad_input", None, 200)],
)
async def test_what_an_upstream_quotes_of_a_callers_text_is_told_to_nobody_else(
    refusal: str, dimensions: int | None, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    text = "my diagnosis is canary"
    upstream = {"type": "openai", "api_key": "sk-fake", "max_concurrency": 1}
    with FakeOpenAI(api_key="sk-fake", models={"house": 64}, matryoshka=("house",)) as fake:
        with running({"upstreams": {"up": {**upstream, "base_url": fake.url + "/v1"}}}) as gateway:
            fault = faults.vendor_error(refusal, f"no dimension of '{text}'")
            fake.fail(fault, times=None, when=lambda texts: text in texts)
            body = {"model": "house", **({"dimensions": dimensions} if dimensions else {})}
            fake.hold()
            busy = asyncio.create_task(post_all(gateway, ["busy"], **body))
            await fake.calls_arrived(1)
            asked = asyncio.create_task(post_all(gateway, ["one", text, "another"], **body))
            async with asyncio.timeout(20):
                while gateway.metric("queued_inputs") < 3:
                    await asyncio.sleep(0)
            fake.release()
            one, _, another = await asked
            await busy
            assert len(fake.calls[1].texts) == 3
            assert one.status_code == another.status_code == status
            for _ in range(FAILURES):
                alone = gateway.post({"input": text, **body})
            # Its only sender may be told why it is refused.
            assert ("canary" in alone.text) == (refusal == "bad_input")
            written = (gateway.get("/readyz").text, gateway.log.getvalue(), caplog.text)
            for told in (one.text, another.text, *written):
                assert "canary" not in told


@pytest.mark.parametrize("refusal", ["bad_input", "internal"])
async def test_an_instruction_that_an_upstream_quotes_sets_no_limit_and_is_not_logged(
    refusal: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    instruct = "batch at most 1 canary"
    with FakeDashScope(api_key="sk-fake") as fake, running(config(fake)) as gateway:
        fault = faults.vendor_error(refusal, f"parameters.instruct not acceptable: '{instruct}'")
        fake.fail(fault, times=None, when=lambda texts: "guilty" in texts)
        for _ in range(FAILURES):
            body = {"input": ["guilty", "as well"], "input_type": "query", "instruct": instruct}
            assert gateway.post({"model": "text-embedding-v4", **body}).status_code in (400, 502, 503)
        assert "canary" not in gateway.get("/readyz").text + gateway.log.getvalue() + caplog.text
        (response,) = await post_all(gateway, [[f"text {i}" for i in range(10)]], model="text-embedding-v4")
        assert response.status_code == 200
        assert len(fake.calls[-1].texts) == 10


async def test_a_limit_the_upstream_names_is_learned_and_nobody_notices() -> None:
    with FakeDashScope(api_key="sk-fake", max_batch=4) as fake, running(config(fake)) as gateway:
        texts = [f"text {i}" for i in range(40)]
        (response,) = await post_all(gateway, [texts])
        assert response.status_code == 200
        for text, row in zip(texts, response.json()["data"], strict=True):
            assert np.array_equal(np.array(row["embedding"], "<f4"), fake.expected(MODEL, text))
        before = len(fake.calls)
        (again,) = await post_all(gateway, [[f"more {i}" for i in range(40)]])
        assert again.status_code == 200
        assert len(fake.calls) - before == 10, "the next request is cut to the learned size from the start"


async def test_the_tokens_of_a_call_are_learned_as_well() -> None:
    upstream = {"type": "openai", "api_key": "sk-fake", "max_concurrency": 2}
    with FakeOpenAI(api_key="sk-fake", models={"house": 64}, max_tokens_per_request=100) as fake:
        with running({"upstreams": {"up": {**upstream, "base_url": fake.url + "/v1"}}}) as gateway:
            for number in range(2):
                texts = [f"{number} of {i:016}" for i in range(32)]
                response = gateway.post({"model": "house", "input": texts})
                assert response.status_code == 200
                for text, row in zip(texts, response.json()["data"], strict=True):
                    assert np.array_equal(np.array(row["embedding"], "<f4"), fake.expected("house", text))
                refused = [call for call in fake.calls if sum(map(len, call.texts)) > 400]
                assert len(refused) == 1, "the first call, and never again"


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_a_cached_answer_is_bit_equal_to_the_fresh_one(encoding: str) -> None:
    with FakeOpenAI(api_key="sk-fake", base64=False) as fake:
        upstream = {"type": "openai", "api_key": "sk-fake", "base_url": fake.url + "/v1"}
        with running({"upstreams": {"up": upstream}}) as gateway:
            body = {"model": "text-embedding-3-small", "input": ["a", "b"], "encoding_format": encoding}
            fresh, cached = gateway.post(body), gateway.post(body)
            assert (fresh.headers["x-embedding-cache"], cached.headers["x-embedding-cache"]) == ("miss", "hit")
            assert fresh.json()["data"] == cached.json()["data"]
            assert cached.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == fake.billed_tokens
            assert len(fake.calls) == 1


async def test_a_role_that_one_deployment_cannot_honour_goes_to_the_one_that_can() -> None:
    with FakeDashScope(api_key="sk-fake") as fake:
        upstreams = {
            "compat": {"mode": "compatible", "base_url": fake.url + "/compatible-mode/v1"},
            "native": {"base_url": fake.url + "/api/v1"},
        }
        both = {name: {"type": "dashscope", "api_key": "sk-fake", **each} for name, each in upstreams.items()}
        with running({"upstreams": both, "cache": {"memory": None}}) as gateway:
            responses = await post_all(gateway, [f"query {i}" for i in range(20)], input_type="query")
            for i, response in enumerate(responses):
                expected = fake.expected(MODEL, f"query {i}", text_type="query")
                assert np.array_equal(np.array(response.json()["data"][0]["embedding"], "<f4"), expected)
            refused = gateway.post({"model": f"compat/{MODEL}", "input": "x", "input_type": "query"})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input_type")


async def test_a_document_asked_for_by_name_is_the_document_cached_without_a_name() -> None:
    with FakeDashScope(api_key="sk-fake") as fake, running(config(fake)) as gateway:
        gateway.post({"model": MODEL, "input": "text"})
        named = gateway.post({"model": MODEL, "input": "text", "input_type": "document", "dimensions": 1024})
        assert named.headers["x-embedding-cache"] == "hit"
        other = gateway.post({"model": MODEL, "input": "text", "dimensions": 512})
        assert other.headers["x-embedding-cache"] == "miss"
        assert len(other.json()["data"][0]["embedding"]) == 512
        assert named.headers["x-embedding-space"] != other.headers["x-embedding-space"]
