"""Servers that speak OpenAI's API in their own way, each by configuration alone and through the whole program."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from tests.fakes import FakeOpenAI
from tests.harness import running

HOSTED = "BAAI/bge-m3"


def config(fake: FakeOpenAI, base: str = "/v1", **upstream: Any) -> dict[str, Any]:
    return {"upstreams": {"up": {"type": "openai", "base_url": fake.url + base, **upstream}}}


def right(fake: FakeOpenAI, response: httpx.Response, model: str, texts: list[str]) -> None:
    assert response.status_code == 200, response.text
    for text, row in zip(texts, response.json()["data"], strict=True):
        assert np.array_equal(np.array(row["embedding"], "<f4"), fake.expected(model, text))


def test_azure_is_asked_at_the_deployment_with_its_own_header_and_version() -> None:
    deployed = {"DEPLOYMENT": "text-embedding-3-small"}
    with FakeOpenAI(api_key="sk-azure", deployments=deployed) as fake:
        settings = config(
            fake,
            "/openai/deployments/DEPLOYMENT",
            auth="api-key",
            api_key="sk-azure",
            query={"api-version": "2024-10-21"},
        )
        models = {"my-embedding": {"deployments": [{"upstream": "up", "model": "text-embedding-3-small"}]}}
        with running({**settings, "models": models}) as gateway:
            right(fake, gateway.post({"model": "my-embedding", "input": ["a"]}), "text-embedding-3-small", ["a"])
        (call,) = fake.calls
        assert call.path == "/openai/deployments/DEPLOYMENT/embeddings"
        assert call.query == {"api-version": "2024-10-21"}
        assert call.headers["api-key"] == "sk-azure"
        assert "authorization" not in call.headers


def test_tei_gets_32_rows_a_call_and_a_smaller_limit_is_learned_from_its_own_words() -> None:
    texts = [f"text {i}" for i in range(100)]
    with FakeOpenAI(None, flavour="tei") as fake, running(config(fake)) as gateway:
        right(fake, gateway.post({"model": HOSTED, "input": texts}), HOSTED, texts)
        assert sorted(call.rows for call in fake.calls) == [4, 32, 32, 32]
    with FakeOpenAI(None, flavour="tei", max_batch=10) as fake, running(config(fake)) as gateway:
        right(fake, gateway.post({"model": HOSTED, "input": texts}), HOSTED, texts)
        before = len(fake.calls)
        right(
            fake,
            gateway.post({"model": HOSTED, "input": [f"more {t}" for t in texts]}),
            HOSTED,
            [f"more {t}" for t in texts],
        )
        assert [call.rows for call in fake.calls[before:]] == [10] * 10


@pytest.mark.parametrize("flavour", ["vllm", "vllm_old"])
def test_vllm_is_not_sent_dimensions_that_it_gives_anyway(flavour: Any) -> None:
    with FakeOpenAI(None, flavour=flavour) as fake:
        models = {"m": {"dimensions": 1024, "deployments": [{"upstream": "up", "model": HOSTED}]}}
        with running({**config(fake), "models": models}) as gateway:
            right(fake, gateway.post({"model": HOSTED, "input": ["a"]}), HOSTED, ["a"])
            refused = gateway.post({"model": HOSTED, "input": "a", "dimensions": 256})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")
        assert all("dimensions" not in call.json for call in fake.calls if call.status == 200)
        assert all(None not in call.json.values() for call in fake.calls), "fields that are not asked for are left out"


def test_a_server_that_takes_text_only_and_answers_numbers_gets_text_and_is_understood() -> None:
    with FakeOpenAI(None, flavour="vllm", base64=False) as fake, running(config(fake)) as gateway:
        ids = gateway.post({"model": HOSTED, "input": [[15339, 1917]]})
        right(fake, ids, HOSTED, ["hello world"])
        assert fake.calls[-1].texts == ["hello world"]
        encoded = gateway.post({"model": HOSTED, "input": "hello world", "encoding_format": "base64"})
        assert isinstance(encoded.json()["data"][0]["embedding"], str)


def test_a_server_that_refuses_encoding_format_is_not_sent_any() -> None:
    with FakeOpenAI(None, flavour="vllm") as fake, running(config(fake, encoding_format="omit")) as gateway:
        right(fake, gateway.post({"model": HOSTED, "input": ["a"]}), HOSTED, ["a"])
        assert "encoding_format" not in fake.calls[-1].json
