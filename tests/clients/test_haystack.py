"""Haystack's embedders, for OpenAI and for Azure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients import extra
from tests.clients.extra import MANY, Asked, assert_numbers
from tests.clients.support import BGE, SMALL, TEXTS


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    command = [*extra.python(), str(extra.CLIENT), "haystack"]
    with extra.gateway() as (fake, base_url):
        yield fake, extra.asked(command, base_url, tmp_path_factory.mktemp("home"))


def test_a_text_gets_its_vector_and_the_usage(asked: Asked) -> None:
    fake, results = asked
    assert_numbers(results.value("texts"), [fake.expected(SMALL, text) for text in TEXTS])
    meta = results.value("text, all")["meta"]
    assert meta["model"] == SMALL
    assert meta["usage"]["prompt_tokens"] == meta["usage"]["total_tokens"] > 0


@pytest.mark.parametrize(("name", "model"), [("documents", SMALL), ("slashed", BGE)])
def test_documents_get_their_vectors(asked: Asked, name: str, model: str) -> None:
    fake, results = asked
    assert_numbers(results.value(name)["embeddings"], [fake.expected(model, text) for text in TEXTS])


def test_the_asynchronous_methods_do_the_same(asked: Asked) -> None:
    fake, results = asked
    assert_numbers(results.value("asynchronous"), [fake.expected(SMALL, text) for text in TEXTS])


def test_dimensions_are_taken(asked: Asked) -> None:
    fake, results = asked
    got = results.value("dimensions")["embeddings"]
    assert_numbers(got, [fake.expected(SMALL, text, 256) for text in TEXTS])


def test_more_documents_than_it_sends_at_once_come_back_in_order(asked: Asked) -> None:
    fake, results = asked
    assert_numbers(results.value("many")["embeddings"], [fake.expected(SMALL, text, 16) for text in MANY])


def test_the_text_that_it_puts_together_is_embedded(asked: Asked) -> None:
    fake, results = asked
    assert_numbers(results.value("meta")["embeddings"], [fake.expected(SMALL, "passage: a title\ntext")])


def test_its_class_for_azure_works(asked: Asked) -> None:
    fake, results = asked
    assert_numbers([results.value("azure")], [fake.expected(BGE, TEXTS[0])])


def test_an_empty_document_costs_the_whole_batch_its_vectors_unless_it_is_told_to_fail(asked: Asked) -> None:
    """Haystack logs the gateway's 400 and continues, which the README warns of."""
    results = asked[1]
    assert results.value("empty")["embeddings"] == [None, None, None]
    results.error("empty, strict", "BadRequestError", 400, r"input\[1\] must not be an empty string")


def test_errors_are_the_sdks_own(asked: Asked) -> None:
    results = asked[1]
    results.error("wrong key", "AuthenticationError", 401, "Incorrect API key provided")
    results.error("unknown model", "NotFoundError", 404, "The model 'text-embedding-9' does not exist")
