"""Shorter vectors and unit length: who makes them, what the cache stores, and that no two settings mix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from tests.fakes import FakeDashScope, FakeOllama, FakeOpenAI, Vector, cut, unit
from tests.fakes.vectors import Text
from tests.harness import Running, running

OPENAI = "text-embedding-3-large"
NOMIC = "nomic-ai/nomic-embed-text-v1.5"
MXBAI = "mixedbread-ai/mxbai-embed-large-v1"
LENGTHS = {NOMIC: 768, MXBAI: 1024, "BAAI/bge-m3": 1024, "somebody/own-model": 512, "Qwen/Qwen3-Embedding-8B": 16}


@contextmanager
def vllm(**config: Any) -> Iterator[tuple[FakeOpenAI, Running]]:
    """A server that refuses `dimensions`."""
    with FakeOpenAI(None, LENGTHS, flavour="vllm", matryoshka=()) as fake:
        upstream = {"type": "openai", "base_url": fake.url + "/v1"}
        with running({"upstreams": {"up": upstream}, **config}) as gateway:
            yield fake, gateway


def vector_of(response: httpx.Response) -> Vector:
    assert response.status_code == 200, response.text
    return np.array(response.json()["data"][0]["embedding"], "<f4")


@pytest.mark.parametrize(("model", "lengths"), [(NOMIC, (64, 768, 256, 512)), (MXBAI, (1, 1024, 300))])
def test_a_model_made_for_it_is_shortened_here_from_one_cached_vector(model: str, lengths: tuple[int, ...]) -> None:
    with vllm() as (fake, gateway):
        native = fake.expected(model, "text")
        for length in lengths:
            response = gateway.post({"model": model, "input": "text", "dimensions": length})
            expected = native if length == LENGTHS[model] else cut(native, length)
            assert np.array_equal(vector_of(response), expected)
            assert response.headers["x-embedding-space"].endswith(f";{length}")
        assert np.array_equal(vector_of(gateway.post({"model": model, "input": "text"})), native)
        assert fake.rows == 1
        assert "dimensions" not in fake.calls[0].json


@pytest.mark.parametrize(
    ("model", "length", "says"),
    [
        (NOMIC, 384, "gives 64, 128, 256, 512, 768 dimensions, not 384"),
        (NOMIC, 1024, "not 1024"),
        (MXBAI, 2048, "this model's vector has 1024 dimensions, not 2048 or more"),
        ("BAAI/bge-m3", 512, "gives 1024 dimensions, not 512"),
    ],
)
def test_any_other_length_is_a_400(model: str, length: int, says: str) -> None:
    with vllm() as (_, gateway):
        response = gateway.post({"model": model, "input": "text", "dimensions": length})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_dimensions", "dimensions")
        assert says in error["message"]


class LateNumbers(FakeOpenAI):
    """The vectors of some texts begin with zeros."""

    def expected(self, model: str, text: Text, dimensions: int | None = None) -> Vector:
        vector = super().expected(model, text, dimensions)
        return np.where(np.arange(len(vector)) < 64, np.float32(0), vector) if "late" in text else vector


@pytest.mark.parametrize("late", ["late", "so late " * 20], ids=["whole", "in pieces"])
def test_an_input_whose_vector_begins_with_zeros_is_named_and_the_others_are_kept(late: str) -> None:
    deployments = [{"upstream": "up", "model": NOMIC}]
    settings = {"max_tokens_per_input": 100, "cuts_silently": True, "on_long_input": "split"}
    with LateNumbers(None, LENGTHS, flavour="vllm", matryoshka=()) as fake:
        upstream = {"type": "openai", "base_url": fake.url + "/v1"}
        models = {"docs": {"deployments": deployments, **settings}}
        with running({"upstreams": {"up": upstream}, "models": models}) as gateway:
            long = "once upon a time " * 20
            body = {"model": "docs", "input": ["one", long, late, "two"], "dimensions": 64}
            response = gateway.post(body)
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_dimensions", "input[2]")
            assert error["message"] == "input[2] has no vector of 64 dimensions: the first 64 numbers are all zero"
            assert response.headers["x-embedding-upstream-calls"] == f"{len(fake.calls)}"
            rows = fake.rows
            others = gateway.post({**body, "input": ["one", long, "two"]})
            assert (others.status_code, others.headers["x-embedding-cache"]) == (200, "hit")
            assert gateway.post({**body, "dimensions": 128}).status_code == 200
            assert fake.rows == rows


def test_the_full_length_may_be_asked_for_by_name_of_a_server_that_refuses_the_field() -> None:
    with vllm() as (fake, gateway):
        vector = vector_of(gateway.post({"model": "BAAI/bge-m3", "input": "text", "dimensions": 1024}))
        assert np.array_equal(vector, fake.expected("BAAI/bge-m3", "text"))


def test_a_server_that_gives_another_length_than_the_model_card_says_is_believed() -> None:
    with vllm() as (fake, gateway):
        model = "Qwen/Qwen3-Embedding-8B"
        assert np.array_equal(vector_of(gateway.post({"model": model, "input": "t"})), fake.expected(model, "t"))


def test_what_nobody_knows_is_passed_on_and_the_refusal_comes_back() -> None:
    with vllm() as (fake, gateway):
        response = gateway.post({"model": "somebody/own-model", "input": "text", "dimensions": 256})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_dimensions", "dimensions")
        assert fake.calls[0].json["dimensions"] == 256


def test_ollama_shortens_its_vectors_itself() -> None:
    with FakeOllama() as fake, running({"upstreams": {"up": {"type": "ollama", "base_url": fake.url}}}) as gateway:
        for model, length in (("nomic-embed-text", 256), ("bge-m3", 512)):
            response = gateway.post({"model": model, "input": "text", "dimensions": length})
            assert np.array_equal(vector_of(response), fake.expected(model, "text", length))
            assert fake.calls[-1].json["dimensions"] == length


def test_lengths_that_an_operator_says_a_server_gives_are_asked_of_it() -> None:
    models = {"docs": {"deployments": [{"upstream": "up", "model": NOMIC}], "dimension_choices": [100, 768]}}
    with FakeOpenAI(None, LENGTHS, flavour="vllm", matryoshka=(NOMIC,)) as fake:
        upstream = {"type": "openai", "base_url": fake.url + "/v1"}
        with running({"upstreams": {"up": upstream}, "models": models}) as gateway:
            response = gateway.post({"model": "docs", "input": "text", "dimensions": 100})
            assert np.array_equal(vector_of(response), fake.expected(NOMIC, "text", 100))
            assert gateway.post({"model": "docs", "input": "text", "dimensions": 256}).status_code == 400
            row = gateway.get("/v1/models/docs").json()
            assert (row["dimension_choices"], row["shortened_here"]) == ([100, 768], None)


@pytest.mark.parametrize("order", [("vllm", "ollama"), ("ollama", "vllm")])
def test_behind_two_types_of_server_a_model_is_shortened_here_whichever_is_named_first(order: tuple[str, str]) -> None:
    models = {"vllm": NOMIC, "ollama": "nomic-embed-text"}
    deployments = [{"upstream": name, "model": models[name], "space": "nomic"} for name in order]
    with FakeOpenAI(None, LENGTHS, flavour="vllm", matryoshka=()) as fake, FakeOllama() as ollama:
        upstreams = {
            "vllm": {"type": "openai", "base_url": fake.url + "/v1"},
            "ollama": {"type": "ollama", "base_url": ollama.url},
        }
        with running({"upstreams": upstreams, "models": {"docs": {"deployments": deployments}}}) as gateway:
            for length in (768, 256, 64):
                response = gateway.post({"model": "docs", "input": "text", "dimensions": length})
                assert vector_of(response).shape == (length,)
            row = gateway.get("/v1/models/docs").json()
            assert (row["dimension_choices"], row["shortened_here"]) == (None, [768, 512, 256, 128, 64])
        assert not any("dimensions" in call.json for call in (*fake.calls, *ollama.calls) if call.json)


def test_openais_shorter_vectors_come_from_openai_whatever_is_cached() -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        upstream = {"type": "openai", "api_key": "sk-fake", "base_url": fake.url + "/v1"}
        with running({"upstreams": {"up": upstream}}) as gateway:
            for length, state in ((None, "miss"), (256, "miss"), (256, "hit")):
                response = gateway.post({"model": OPENAI, "input": "a", "dimensions": length})
                assert np.array_equal(vector_of(response), fake.expected(OPENAI, "a", length))
                assert response.headers["x-embedding-cache"] == state
            assert fake.calls[1].json["dimensions"] == 256


def test_dashscopes_lengths_are_kept_apart_for_nobody_documents_them_to_be_prefixes() -> None:
    with FakeDashScope(api_key="sk-fake") as fake:
        upstream = {"type": "dashscope", "api_key": "sk-fake", "base_url": fake.url + "/api/v1"}
        with running({"upstreams": {"up": upstream}}) as gateway:
            for length in (1024, 256):
                response = gateway.post({"model": "text-embedding-v4", "input": "text", "dimensions": length})
                assert response.headers["x-embedding-cache"] == "miss"
                assert np.array_equal(vector_of(response), fake.expected("text-embedding-v4", "text", length))


class LongVectors(FakeDashScope):
    """Vectors that are not of unit length, like those of v1 and v2."""

    def expected(self, *args: Any, **kwargs: Any) -> Vector:
        wide: Vector = super().expected(*args, **kwargs) * np.float32(37.5)
        return wide


@pytest.mark.parametrize("order", [("plain", "unit"), ("unit", "plain")])
def test_vectors_come_at_unit_length_where_that_is_set_and_as_the_vendor_gives_them_elsewhere(
    order: tuple[str, str],
) -> None:
    with LongVectors(api_key="sk-fake") as fake:
        upstream = {"type": "dashscope", "api_key": "sk-fake", "base_url": fake.url + "/api/v1"}
        deployments = [{"upstream": "up", "model": "text-embedding-v2"}]
        models = {name: {"deployments": deployments, "normalize": name == "unit"} for name in order}
        with running({"upstreams": {"up": upstream}, "models": models}) as gateway:
            native = fake.expected("text-embedding-v2", "text")
            expected = {"plain": native, "unit": unit(native)}
            spaces = set()
            for name in order * 2:
                response = gateway.post({"model": name, "input": "text"})
                assert np.array_equal(vector_of(response), expected[name])
                spaces.add(response.headers["x-embedding-space"])
            assert fake.rows == 1, "the cache keeps the vendor's own"
            assert spaces == {"dashscope/text-embedding-v2;1536", "dashscope/text-embedding-v2;normalized;1536"}


def test_every_fact_an_operator_corrects_has_its_effect() -> None:
    overrides = {
        "max_batch": 3, "max_tokens_per_input": 5, "max_tokens_per_batch": 40, "price_per_million_tokens": 1_000_000,
    }  # fmt: skip
    with FakeOpenAI(api_key="sk-fake") as fake:
        upstream = {"type": "openai", "api_key": "sk-fake", "base_url": fake.url + "/v1"}
        models = {"own": {"deployments": [{"upstream": "up", "model": OPENAI}], "dimensions": 64, **overrides}}
        with running({"upstreams": {"up": upstream}, "models": models}) as gateway:
            response = gateway.post({"model": "own", "input": [str(i) for i in range(10)]})
            assert vector_of(response).shape == (64,)
            assert max(call.rows for call in fake.calls) == 3
            assert gateway.metric("cost_total") == fake.billed_tokens
            before = len(fake.calls)
            assert (
                gateway.post(
                    {"model": "own", "input": [" internationalization.", " internationalization!"]}
                ).status_code
                == 200
            )
            assert [call.rows for call in fake.calls[before:]] == [1, 1], "two texts of 22 bytes are too much at once"
            assert gateway.post({"model": "own", "input": "one two three four five six"}).status_code == 400
            row = gateway.get("/v1/models/own").json()
            assert (row["max_batch"], row["max_input_tokens"], row["max_batch_tokens"]) == (3, 5, 40)
