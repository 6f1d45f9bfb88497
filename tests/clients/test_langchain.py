"""LangChain with its defaults, which sends token ids made by tiktoken; and our table compared with tiktoken's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from app import tokens
from tests.clients.support import BGE, KEY, SMALL, TEXTS, exactly_float32
from tests.fakes import FakeOpenAI, Vector
from tests.harness import Running

if TYPE_CHECKING:
    from tiktoken import Encoding

IDS = 100_256
CONTEXT = 8191
"""Tokens after which LangChain cuts a text."""

Embeddings = Callable[..., OpenAIEmbeddings]


@pytest.fixture
def embeddings(gateway: Running, cl100k: Encoding) -> Iterator[Embeddings]:
    """LangChain's class for this gateway, with only the options that a user must set."""
    made: list[OpenAIEmbeddings] = []

    def make(model: str = SMALL, **options: Any) -> OpenAIEmbeddings:
        told = {"base_url": gateway.base_url, "api_key": KEY, **options}
        made.append(OpenAIEmbeddings(model=model, **told))
        return made[-1]

    yield make
    for each in made:
        each.client._client.close()


def test_documents_get_the_vectors_of_their_plain_text(embeddings: Embeddings, fake: FakeOpenAI) -> None:
    for text, got in zip(TEXTS, embeddings().embed_documents(TEXTS), strict=True):
        assert exactly_float32(got, fake.expected(SMALL, text)), text
    assert [call.texts for call in fake.calls] == [TEXTS], "the upstream was sent text, in one call"


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_query_gets_the_vector_of_its_plain_text(embeddings: Embeddings, fake: FakeOpenAI, text: str) -> None:
    assert exactly_float32(embeddings().embed_query(text), fake.expected(SMALL, text))


@pytest.mark.parametrize("model", [BGE, f"up/{BGE}"])
def test_a_model_that_tiktoken_does_not_know_is_sent_cl100k_ids_too(
    embeddings: Embeddings, fake: FakeOpenAI, model: str
) -> None:
    for text, got in zip(TEXTS, embeddings(model).embed_documents(TEXTS), strict=True):
        assert exactly_float32(got, fake.expected(BGE, text)), text


async def test_the_asynchronous_methods_do_the_same(embeddings: Embeddings, fake: FakeOpenAI) -> None:
    made = embeddings()
    async with made.async_client._client:
        for text, got in zip(TEXTS, await made.aembed_documents(TEXTS), strict=True):
            assert exactly_float32(got, fake.expected(SMALL, text)), text
        assert exactly_float32(await made.aembed_query(TEXTS[0]), fake.expected(SMALL, TEXTS[0]))


def test_dimensions_are_taken(embeddings: Embeddings, fake: FakeOpenAI) -> None:
    got = embeddings(dimensions=256).embed_documents(["a", "风"])
    assert exactly_float32(got[0], fake.expected(SMALL, "a", 256))
    assert exactly_float32(got[1], fake.expected(SMALL, "风", 256))


def test_without_its_length_check_it_sends_text_and_gets_the_same(embeddings: Embeddings, fake: FakeOpenAI) -> None:
    got = embeddings(check_embedding_ctx_length=False).embed_documents(TEXTS)
    for text, vector in zip(TEXTS, got, strict=True):
        assert exactly_float32(vector, fake.expected(SMALL, text)), text


def test_more_documents_than_it_sends_at_once_come_back_in_order(embeddings: Embeddings, fake: FakeOpenAI) -> None:
    texts = [f"文档 {i}" for i in range(1100)]
    got = embeddings(BGE).embed_documents(texts)
    assert len(got) == 1100
    for i in (0, 1, 999, 1000, 1099):
        assert exactly_float32(got[i], fake.expected(BGE, texts[i]))


def cut_inside_a_character(cl100k: Encoding) -> str:
    """A text longer than two contexts, whose first cut falls between the bytes of an emoji."""
    for lead in ("", " fox", " fox fox", " fox fox fox"):
        text = lead + "🦜🙂" * 4000
        ids = cl100k.encode_ordinary(text)
        if cl100k.decode(ids[:CONTEXT]).endswith("\ufffd"):
            assert len(ids) > 2 * CONTEXT
            return text
    raise AssertionError("no lead puts the cut inside a character")


def average(vectors: list[Vector], weights: list[int]) -> Any:
    """LangChain's vector of a text in pieces: their mean weighted by tokens, at unit length."""
    mean = np.average(np.array(vectors, np.float64), axis=0, weights=weights)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("kind", ["Chinese", "English", "cut inside a character"])
def test_a_text_longer_than_the_context_is_cut_by_langchain_and_each_piece_embedded_as_text(
    embeddings: Embeddings, fake: FakeOpenAI, cl100k: Encoding, kind: str
) -> None:
    long = {
        "Chinese": "风急天高猿啸哀，渚清沙白鸟飞回。" * 700,
        "English": "fox" + " fox" * 9000,
        "cut inside a character": cut_inside_a_character(cl100k),
    }[kind]
    ids = cl100k.encode_ordinary(long)
    assert len(ids) > CONTEXT
    parts = [ids[i : i + CONTEXT] for i in range(0, len(ids), CONTEXT)]
    pieces = [cl100k.decode(part) for part in parts]

    before, got, after = embeddings().embed_documents(["before", long, "after"])

    assert fake.calls[-1].texts == ["before", *pieces, "after"]
    wanted = average([fake.expected(SMALL, piece) for piece in pieces], [len(part) for part in parts])
    assert np.allclose(got, wanted, rtol=0, atol=1e-12)
    assert exactly_float32(before, fake.expected(SMALL, "before"))
    assert exactly_float32(after, fake.expected(SMALL, "after"))


def test_an_empty_document_fails_with_words_that_say_why(embeddings: Embeddings, fake: FakeOpenAI) -> None:
    """LangChain then asks for the vector of "", which OpenAI refuses as well."""
    with pytest.raises(openai.BadRequestError, match="input must not be an empty string") as caught:
        embeddings().embed_documents(["a", "", "b"])
    assert caught.value.param == "input"
    with pytest.raises(openai.BadRequestError) as caught:
        embeddings(check_embedding_ctx_length=False).embed_documents(["a", "", "b"])
    assert caught.value.param == "input[1]"


def test_a_wrong_key_is_an_authentication_error(embeddings: Embeddings) -> None:
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key provided"):
        embeddings(api_key="sk-wrong").embed_query("hi")


# --- our table and tiktoken's --------------------------------------------------------------------


def test_every_single_id_decodes_as_in_tiktoken(cl100k: Encoding) -> None:
    assert [tokens.decode([i]) for i in range(IDS)] == [cl100k.decode([i]) for i in range(IDS)]


def test_all_ids_in_a_row_decode_as_in_tiktoken(cl100k: Encoding) -> None:
    rng = random.Random(1)
    for _ in range(5):
        ids = rng.sample(range(IDS), IDS)
        assert tokens.decode(ids) == cl100k.decode(ids)


def test_random_lists_of_ids_decode_as_in_tiktoken(cl100k: Encoding) -> None:
    rng = random.Random(2)
    for _ in range(5000):
        ids = [rng.randrange(IDS) for _ in range(rng.randrange(1, 60))]
        assert tokens.decode(ids) == cl100k.decode(ids), ids


def test_texts_of_all_scripts_survive_tiktoken_and_our_decoding(cl100k: Encoding) -> None:
    rng = random.Random(3)
    ranges = [(0x00, 0x7F), (0xA0, 0x24F), (0x400, 0x4FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0xE000, 0x10FFFF)]
    texts = list(TEXTS)
    for _ in range(2000):
        picked = [rng.choice(ranges) for _ in range(rng.randrange(1, 40))]
        texts.append("".join(chr(rng.randint(*each)) for each in picked))
    for text in texts:
        assert tokens.decode(cl100k.encode_ordinary(text)) == text


def test_a_character_cut_in_two_becomes_the_replacement_character_as_in_tiktoken(cl100k: Encoding) -> None:
    cuts = 0
    for text in ("🦜🙂👩‍👩‍👧", "猿啸哀渚", "𠮷野家", "naïve"):
        ids = cl100k.encode_ordinary(text)
        for at in range(1, len(ids)):
            for part in (ids[:at], ids[at:]):
                assert tokens.decode(part) == cl100k.decode(part)
                cuts += "\ufffd" in tokens.decode(part)
    assert cuts > 10


@pytest.mark.parametrize("bad", [-1, IDS, 100_257, 100_258, 100_276, 2**31, 2**63])
def test_ids_that_stand_for_no_text_are_refused_by_their_position(bad: int) -> None:
    with pytest.raises(IndexError) as caught:
        tokens.decode([1, 2, bad, 3])
    assert caught.value.args == (2,)
