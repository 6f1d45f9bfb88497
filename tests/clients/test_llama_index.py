"""LlamaIndex's `OpenAIEmbedding`, batch and single, sync and async."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from llama_index.embeddings.openai import OpenAIEmbedding  # type: ignore[import-untyped]

from tests.clients.support import BGE, KEY, SMALL, TEXTS, exactly_float32
from tests.fakes import FakeOpenAI, faults
from tests.harness import Running

Embedding = Callable[..., OpenAIEmbedding]


@pytest.fixture
def embedding(gateway: Running) -> Iterator[Embedding]:
    made: list[OpenAIEmbedding] = []

    def make(model: str = BGE, **options: Any) -> OpenAIEmbedding:
        told = {"api_base": gateway.base_url, "api_key": KEY, **options}
        made.append(OpenAIEmbedding(model_name=model, **told))
        return made[-1]

    yield make
    for each in made:
        if each._client is not None:
            each._client.close()


def sent(text: str) -> str:
    """The text as LlamaIndex sends it."""
    return text.replace("\n", " ")


@pytest.mark.parametrize("model", [SMALL, BGE, f"up/{BGE}"])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_text_and_a_query_get_their_vector(embedding: Embedding, fake: FakeOpenAI, model: str, text: str) -> None:
    wanted = fake.expected(model.removeprefix("up/"), sent(text))
    assert exactly_float32(embedding(model).get_text_embedding(text), wanted)
    assert exactly_float32(embedding(model).get_query_embedding(text), wanted)


def test_a_batch_larger_than_it_sends_at_once_comes_back_in_order(embedding: Embedding, fake: FakeOpenAI) -> None:
    texts = TEXTS + [f"text {i}" for i in range(250)]
    got = embedding().get_text_embedding_batch(texts)
    for text, vector in zip(texts, got, strict=True):
        assert exactly_float32(vector, fake.expected(BGE, sent(text))), text


async def test_the_asynchronous_methods_do_the_same(embedding: Embedding, fake: FakeOpenAI) -> None:
    made = embedding()
    texts = TEXTS + [f"text {i}" for i in range(250)]
    async with made._get_aclient():
        for text, vector in zip(texts, await made.aget_text_embedding_batch(texts), strict=True):
            assert exactly_float32(vector, fake.expected(BGE, sent(text))), text
        assert exactly_float32(await made.aget_text_embedding("风"), fake.expected(BGE, "风"))
        assert exactly_float32(await made.aget_query_embedding("急"), fake.expected(BGE, "急"))


def test_dimensions_are_taken(embedding: Embedding, fake: FakeOpenAI) -> None:
    got = embedding(SMALL, dimensions=256).get_text_embedding_batch(["a", "b"])
    assert exactly_float32(got[0], fake.expected(SMALL, "a", 256))
    assert exactly_float32(got[1], fake.expected(SMALL, "b", 256))


def test_the_model_of_its_own_list_needs_no_other_name(gateway: Running, fake: FakeOpenAI) -> None:
    made = OpenAIEmbedding(api_base=gateway.base_url, api_key=KEY)
    try:
        got = made.get_text_embedding("hi")
    finally:
        made._get_client().close()
    assert exactly_float32(got, fake.expected("text-embedding-ada-002", "hi"))


def test_a_rate_limit_is_waited_out(embedding: Embedding, fake: FakeOpenAI) -> None:
    fake.fail(faults.vendor_error("rate_limit", headers={"retry-after-ms": "20"}), times=2)
    assert exactly_float32(embedding().get_text_embedding("hi"), fake.expected(BGE, "hi"))


@pytest.mark.parametrize(
    ("model", "key", "text", "kind", "words"),
    [
        (BGE, "sk-wrong", "hi", openai.AuthenticationError, "Incorrect API key provided"),
        ("none", KEY, "hi", openai.NotFoundError, "The model 'none' does not exist"),
        (BGE, KEY, "", openai.BadRequestError, "must not be an empty string"),
    ],
)
def test_errors_are_told_at_once_and_in_words(
    embedding: Embedding, fake: FakeOpenAI, model: str, key: str, text: str, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        embedding(model, api_key=key).get_text_embedding(text)
    assert fake.calls == []
