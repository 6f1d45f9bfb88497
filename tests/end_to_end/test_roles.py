"""Queries and documents, marked for each model in its own way; two public names of one model with a role each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from app.pipeline.lengths import InputLimit
from tests.fakes import FakeDashScope, FakeOllama, FakeOpenAI, Vector
from tests.fakes.vectors import Text
from tests.harness import Running, running

NOMIC = "nomic-ai/nomic-embed-text-v1.5"
QWEN = "Qwen/Qwen3-Embedding-0.6B"
SEARCH = "Represent this sentence for searching relevant passages: "
LENGTHS = {
    NOMIC: 768,
    QWEN: 1024,
    "intfloat/e5-large-v2": 1024,
    "BAAI/bge-large-en-v1.5": 1024,
    "BAAI/bge-large-zh-v1.5": 1024,
    "mixedbread-ai/mxbai-embed-large-v1": 1024,
    "Snowflake/snowflake-arctic-embed-l-v2.0": 1024,
    "google/embeddinggemma-300m": 768,
    "BAAI/bge-m3": 1024,
    "somebody/own-model": 512,
}


@contextmanager
def serving(**config: Any) -> Iterator[tuple[FakeOpenAI, Running]]:
    """A gateway in front of a vLLM with every open model."""
    with FakeOpenAI(None, LENGTHS, flavour="vllm") as fake:
        upstream = {"type": "openai", "base_url": fake.url + "/v1"}
        with running({"upstreams": {"up": upstream}, **config}) as gateway:
            yield fake, gateway


def vector_of(response: httpx.Response) -> Vector:
    assert response.status_code == 200, response.text
    return np.array(response.json()["data"][0]["embedding"], "<f4")


@pytest.mark.parametrize(
    ("model", "query", "document"),
    [
        (NOMIC, "search_query: ", "search_document: "),
        ("intfloat/e5-large-v2", "query: ", "passage: "),
        ("BAAI/bge-large-en-v1.5", SEARCH, ""),
        ("BAAI/bge-large-zh-v1.5", "为这个句子生成表示以用于检索相关文章：", ""),
        ("mixedbread-ai/mxbai-embed-large-v1", SEARCH, ""),
        ("Snowflake/snowflake-arctic-embed-l-v2.0", "query: ", ""),
        ("google/embeddinggemma-300m", "task: search result | query: ", "title: none | text: "),
        (
            QWEN,
            "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
            "",
        ),
        ("BAAI/bge-m3", "", ""),
        ("somebody/own-model", "", ""),
    ],
)
def test_a_role_stands_before_the_text_and_nothing_does_without_one(model: str, query: str, document: str) -> None:
    with serving() as (fake, gateway):
        for role, prefix in ((None, ""), ("query", query), ("document", document)):
            for _ in ("fresh", "cached"):
                response = gateway.post({"model": model, "input": "the text", "input_type": role})
                assert np.array_equal(vector_of(response), fake.expected(model, prefix + "the text"))
        assert fake.rows == len({"", query, document}), "a role told by no word is no other text"
        assert all(set(call.json) == {"model", "input", "encoding_format"} for call in fake.calls)


def test_ollama_gets_prefixes_too() -> None:
    spaces = []
    with FakeOllama() as fake, running({"upstreams": {"up": {"type": "ollama", "base_url": fake.url}}}) as gateway:
        for name in ("nomic-embed-text", "nomic-embed-text:latest"):
            response = gateway.post({"model": name, "input": "q", "text_type": "query"})
            assert np.array_equal(vector_of(response), fake.expected("nomic-embed-text", "search_query: q"))
            spaces.append(response.headers["x-embedding-space"])
        assert len(set(spaces)) == 1, "one model by two names"
        assert fake.rows == 1
        row = gateway.get("/v1/models/nomic-embed-text").json()
        assert row["prefixes"] == {"query": "search_query: ", "document": "search_document: "}
        assert row["source"] == "the server's list, huggingface.co/nomic-ai/nomic-embed-text-v1.5"


def test_two_names_of_one_model_carry_its_roles_for_clients_that_cannot_send_them() -> None:
    deployments = [{"upstream": "up", "model": NOMIC}]
    models = {
        "docs": {"deployments": deployments, "input_type": "document", "aliases": ["text-embedding-3-small"]},
        "queries": {"deployments": deployments, "input_type": "query"},
    }
    with serving(models=models) as (fake, gateway):
        for name, prefix in (("docs", "search_document: "), ("queries", "search_query: ")):
            vector = vector_of(gateway.post({"model": name, "input": "same"}))
            assert np.array_equal(vector, fake.expected(NOMIC, prefix + "same"))
        alias = gateway.post({"model": "text-embedding-3-small", "input": "same"})
        assert alias.headers["x-embedding-cache"] == "hit"
        told = gateway.post({"model": "docs", "input": "same", "input_type": "query"})
        assert (told.headers["x-embedding-cache"], fake.rows) == ("hit", 2), "the request decides over the name"


def test_names_that_carry_roles_reach_a_model_that_is_told_by_a_parameter() -> None:
    with FakeDashScope(api_key="sk-fake") as fake:
        upstream = {"type": "dashscope", "api_key": "sk-fake", "base_url": fake.url + "/api/v1"}
        deployments = [{"upstream": "up", "model": "text-embedding-v4"}]
        models = {role: {"deployments": deployments, "input_type": role} for role in ("query", "document")}
        with running({"upstreams": {"up": upstream}, "models": models}) as gateway:
            for role in models:
                vector = vector_of(gateway.post({"model": role, "input": "same"}))
                assert np.array_equal(vector, fake.expected("text-embedding-v4", "same", text_type=role))


def test_an_instruction_is_put_where_the_model_wants_it() -> None:
    with serving() as (fake, gateway):
        body = {"model": QWEN, "input": "q", "input_type": "query", "instruct": "Find the answer"}
        assert np.array_equal(vector_of(gateway.post(body)), fake.expected(QWEN, "Instruct: Find the answer\nQuery:q"))
        for role in (None, "document"):
            error = gateway.post({**body, "input_type": role}).json()["error"]
            assert (error["code"], error["param"]) == ("invalid_value", "instruct")
        error = gateway.post({**body, "model": NOMIC}).json()["error"]
        assert error["message"] == f"model '{NOMIC}' takes no instruction"


def test_an_operators_own_prefixes_tell_roles_and_others_are_another_space() -> None:
    def served(fake: FakeOpenAI, prefixes: dict[str, str]) -> dict[str, Any]:
        upstream = {"type": "openai", "api_key": "sk-fake", "base_url": fake.url + "/v1"}
        models = {"public": {"deployments": [{"upstream": "up", "model": "house"}], "prefixes": prefixes}}
        return {"upstreams": {"up": upstream}, "models": models}

    spaces = []
    for prefixes in ({"query": "ask: ", "document": "doc: "}, {"query": "q: "}):
        with (
            FakeOpenAI(api_key="sk-fake", models={"house": 64}) as fake,
            running(served(fake, prefixes)) as gateway,
        ):
            for role in ("query", "document"):
                response = gateway.post({"model": "public", "input": "a text", "input_type": role})
                assert response.status_code == 200, response.text
                spaces.append(response.headers["x-embedding-space"])
            assert gateway.post({"model": "public", "input": "a text"}).status_code == 200
            told = [f"{prefixes.get(role, '')}a text" for role in ("query", "document")]
            assert [call.texts[0] for call in fake.calls] == list(dict.fromkeys([*told, "a text"]))
    assert spaces[0] == spaces[1] != spaces[2] == spaces[3]


@pytest.mark.parametrize("model", ["house", "Qwen/Qwen3-Embedding-0.6B"])
def test_an_operators_own_prefix_stands_before_the_text_letter_by_letter(model: str) -> None:
    prefix = "fill in {instruct}: "
    models = {"public": {"deployments": [{"upstream": "up", "model": model}], "prefixes": {"query": prefix}}}
    with FakeOpenAI(api_key="sk-fake", models={model: 64}) as fake:
        upstream = {"type": "openai", "api_key": "sk-fake", "base_url": fake.url + "/v1"}
        with running({"upstreams": {"up": upstream}, "models": models}) as gateway:
            response = gateway.post({"model": "public", "input": "a text", "input_type": "query"})
            assert np.array_equal(vector_of(response), fake.expected(model, prefix + "a text"))


def test_a_named_space_is_another_one_for_other_prefixes() -> None:
    prefixes = {"one": {"query": "ask: "}, "other": {"query": "q: "}}
    deployments = [{"upstream": "up", "model": "house", "space": "ours"}]
    models = {name: {"deployments": deployments, "prefixes": each} for name, each in prefixes.items()}
    with FakeOpenAI(api_key="sk-fake", models={"house": 64}) as fake:
        upstream = {"type": "openai", "api_key": "sk-fake", "base_url": fake.url + "/v1"}
        with running({"upstreams": {"up": upstream}, "models": models}) as gateway:
            bodies = {name: {"model": name, "input": "a text", "input_type": "query"} for name in models}
            responses = {name: gateway.post(body) for name, body in bodies.items()}
            for name, response in responses.items():
                expected = fake.expected("house", prefixes[name]["query"] + "a text")
                assert np.array_equal(vector_of(response), expected)
            assert len({response.headers["x-embedding-space"] for response in responses.values()}) == 2


def test_a_prefix_counts_for_the_limit() -> None:
    model = "intfloat/e5-large-v2"
    with serving() as (fake, gateway):
        text = "word " * 512
        assert vector_of(gateway.post({"model": model, "input": text})).shape == (1024,)
        error = gateway.post({"model": model, "input": text, "input_type": "query"}).json()["error"]
        assert error["message"] == (
            "input[0] has at least 513 tokens with its role or instruction; this model takes at most 512"
            "; shorten it, or send on_long_input: truncate or split"
        )
        long = "words " * 5000
        body = {"model": model, "input": long, "input_type": "document", "on_long_input": "truncate"}
        kept = "passage: " + InputLimit(512, None).without("passage: ").first(long)
        assert np.array_equal(vector_of(gateway.post(body)), fake.expected(model, kept))
        assert len(kept.encode()) <= 512


class OneModel(FakeOpenAI):
    """It serves one model under all its names, and so in one space."""

    def expected(self, model: str, text: Text, dimensions: int | None = None) -> Vector:
        return super().expected(next(iter(self.models)), text, dimensions)


@contextmanager
def one_model(*names: str, **settings: Any) -> Iterator[tuple[FakeOpenAI, Running]]:
    """A gateway with deployments under these names, of which only some tell what the model is."""
    deployments = [{"upstream": "up", "model": name, "space": "ours"} for name in names]
    with OneModel(None, dict.fromkeys(names, 64), flavour="vllm") as fake:
        upstreams = {"up": {"type": "openai", "base_url": fake.url + "/v1"}}
        models = {"public": {"deployments": deployments, **settings}}
        with running({"upstreams": upstreams, "models": models}) as gateway:
            yield fake, gateway


@pytest.mark.parametrize("names", [("house", NOMIC), (NOMIC, "house")], ids=["house first", "nomic first"])
@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_room_is_left_for_the_prefix_of_whichever_deployment_has_one(names: tuple[str, str], policy: str) -> None:
    with one_model(*names, max_tokens_per_input=100, cuts_silently=True, on_long_input=policy) as (fake, gateway):
        texts = ["word " * count for count in (15, 18, 19, 60)]
        response = gateway.post({"model": "public", "input": texts, "input_type": "query"})
        assert response.status_code == 200, response.text
        assert response.headers[f"x-embedding-{'split' if policy == 'split' else 'truncated'}-inputs"] == "3"
        sent = [text for call in fake.calls for text in map(str, call.texts) if text.startswith("search_query: ")]
        assert 80 < max(map(len, sent)) <= 96
        row = gateway.get("/v1/models/public").json()
        assert row["prefixes"] == {"query": "search_query: ", "document": "search_document: "}


@pytest.mark.parametrize("names", [("house", QWEN), (QWEN, "house")], ids=["house first", "qwen first"])
def test_no_instruction_is_left_out_whichever_deployment_has_a_place_for_it(names: tuple[str, str]) -> None:
    with one_model(*names) as (fake, gateway):
        body = {"model": "public", "input": "q", "instruct": "Find the answer"}
        for role in (None, "document"):
            error = gateway.post({**body, "input_type": role}).json()["error"]
            assert (error["code"], error["param"]) == ("invalid_value", "instruct")
            assert error["message"].endswith("takes an instruction for queries only; say input_type: query")
        assert "q" not in [text for call in fake.calls for text in call.texts]
        vector = vector_of(gateway.post({**body, "input_type": "query"}))
        assert np.array_equal(vector, fake.expected(QWEN, "Instruct: Find the answer\nQuery:q"))


def test_an_instruction_that_leaves_no_room_for_the_text_is_refused() -> None:
    with FakeDashScope(api_key="sk-fake") as fake:
        upstream = {"type": "dashscope", "api_key": "sk-fake", "base_url": fake.url + "/api/v1"}
        with running({"upstreams": {"up": upstream}}) as gateway:
            body = {"model": "text-embedding-v4", "input": "x" * 50, "instruct": "指" * 4000}
            error = gateway.post({**body, "on_long_input": "truncate"}).json()["error"]
            assert (error["param"], error["message"]) == (
                "input[0]", "not even the beginning of input[0] certainly fits this model after its prefix",
            )  # fmt: skip
