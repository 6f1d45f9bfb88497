"""Sparse vectors, alone and with dense ones, from DashScope's native API to the caller and through every cache."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.end_to_end.cases import dashscope_alone as config
from tests.fakes import FakeDashScope, faults
from tests.fakes.vectors import sparse_vector
from tests.fakes.wire import json_reply
from tests.harness import Running, running
from tests.redis_server import RedisServer

MODEL = "text-embedding-v3"
KINDS = ["sparse", "dense&sparse"]


@pytest.fixture
def fake() -> Iterator[FakeDashScope]:
    with FakeDashScope(api_key="sk-fake") as fake:
        yield fake


def ask(gateway: Running, texts: list[str], kind: str, **body: Any) -> httpx.Response:
    return gateway.post({"model": MODEL, "input": texts, "output_type": kind, **body})


def right(fake: FakeDashScope, response: httpx.Response, texts: list[str], kind: str) -> None:
    assert response.status_code == 200, response.text
    for text, row in zip(texts, response.json()["data"], strict=True):
        assert row["sparse_embedding"] == sparse_vector(MODEL, text)
        if kind == "sparse":
            assert row["embedding"] == []
        else:
            assert np.array_equal(np.array(row["embedding"], "<f4"), fake.expected(MODEL, text))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tier", ["memory", "disk", "redis"])
def test_they_are_split_merged_shared_and_cached_like_the_others(
    kind: str, tier: str, fake: FakeDashScope, tmp_path: Path
) -> None:
    texts = [f"text {i % 20}" for i in range(25)]
    with RedisServer() as redis:
        tiers = {"memory": {}, "disk": {"path": str(tmp_path / "e.sqlite3")}, "redis": {"url": redis.url}}
        cache = {"memory": None} | {tier: tiers[tier]}
        with running(config(fake, cache=cache)) as gateway:
            right(fake, ask(gateway, texts, kind), texts, kind)
            assert len(fake.calls) == 2
            again = ask(gateway, texts, kind)
            right(fake, again, texts, kind)
            assert (len(fake.calls), again.headers["x-embedding-cache"]) == (2, "hit")
            if tier == "memory":
                return
        with running(config(fake, cache=cache)) as gateway:
            right(fake, ask(gateway, texts, kind), texts, kind)
            assert len(fake.calls) == 2, "they outlive the process"


def test_each_kind_is_another_answer(fake: FakeDashScope) -> None:
    with running(config(fake)) as gateway:
        for kind in ("dense", *KINDS):
            assert ask(gateway, ["a text"], kind).headers["x-embedding-cache"] == "miss"
        spaces = {kind: ask(gateway, ["a text"], kind).headers["x-embedding-space"] for kind in ("dense", *KINDS)}
        assert spaces["dense"] == spaces["dense&sparse"] != spaces["sparse"]
        assert "sparse_embedding" not in ask(gateway, ["a text"], "dense").json()["data"][0]


def test_base64_is_for_the_dense_one(fake: FakeDashScope) -> None:
    with running(config(fake)) as gateway:
        (row,) = ask(gateway, ["a text"], "dense&sparse", encoding_format="base64").json()["data"]
        assert np.array_equal(np.frombuffer(base64.b64decode(row["embedding"]), "<f4"), fake.expected(MODEL, "a text"))
        assert row["sparse_embedding"] == sparse_vector(MODEL, "a text")
        (row,) = ask(gateway, ["a text"], "sparse", encoding_format="base64").json()["data"]
        assert row["embedding"] == ""


def test_a_model_or_a_way_to_it_that_cannot_is_a_400(fake: FakeDashScope) -> None:
    compatible = {"type": "dashscope", "mode": "compatible", "api_key": "sk-fake", "base_url": fake.url}
    with running({**config(fake), "upstreams": {**config(fake)["upstreams"], "other": compatible}}) as gateway:
        for model in ("text-embedding-v2", "other/text-embedding-v3", "multimodal-embedding-v1"):
            response = gateway.post({"model": model, "input": "a text", "output_type": "sparse"})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "output_type"), model
        response = gateway.post({"model": "up/text-embedding-v3", "input": "a text", "output_type": "sparse"})
        assert response.status_code == 200
    assert not [call for call in fake.calls if "compatible" in call.path]


def test_pieces_have_no_mean_that_is_sparse(fake: FakeDashScope) -> None:
    with running(config(fake)) as gateway:
        response = ask(gateway, ["word " * 9000], "sparse", on_long_input="split")
        assert (response.status_code, response.json()["error"]["param"]) == (400, "on_long_input")


@pytest.mark.parametrize(
    "sparse",
    [
        None,
        {},
        [{"index": -1, "value": 0.5}],
        [{"index": 1.5, "value": 0.5}],
        [{"index": 1, "value": "0.5"}],
        [{"index": 1}],
        [{"index": 1, "value": 0.5}, {"index": 1, "value": 0.6}],
        [{"index": True, "value": 0.5}],
        [5],
    ],
    ids=str,
)
def test_a_sparse_vector_that_is_none_is_a_502_and_is_never_cached(fake: FakeDashScope, sparse: Any) -> None:
    row = {"text_index": 0, "embedding": [0.5] * 1024} | ({} if sparse is None else {"sparse_embedding": sparse})
    answer = json_reply({"output": {"embeddings": [row]}, "usage": {"total_tokens": 2}})
    with running(config(fake)) as gateway:
        fake.fail(faults.Answer("no sparse vector", answer), times=None)
        response = ask(gateway, ["a text"], "dense&sparse")
        assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_invalid_response")
        fake.heal()
        right(fake, ask(gateway, ["a text"], "dense&sparse"), ["a text"], "dense&sparse")
