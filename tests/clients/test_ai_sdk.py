"""Vercel's AI SDK through both of its providers; it asks for numbers, and validates the answer's form."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients import extra
from tests.clients.extra import MANY, Asked, assert_numbers
from tests.clients.support import BGE, SMALL, TEXTS

PROVIDERS = ["openai", "compatible"]
pytestmark = pytest.mark.parametrize("provider", PROVIDERS)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    command = [*extra.node(), "ai-sdk.mjs"]
    with extra.gateway() as (fake, base_url):
        yield fake, extra.asked(command, base_url, tmp_path_factory.mktemp("home"))


def test_one_value_gets_its_vector(asked: Asked, provider: str) -> None:
    fake, results = asked
    assert_numbers([results.value(f"{provider}: one")], [fake.expected(SMALL, TEXTS[0])])


@pytest.mark.parametrize(("name", "model"), [("list", SMALL), ("slashed", BGE), ("slash", SMALL)])
def test_many_values_get_their_vectors_and_the_usage(asked: Asked, provider: str, name: str, model: str) -> None:
    fake, results = asked
    got = results.value(f"{provider}: {name}")
    assert_numbers(got["embeddings"], [fake.expected(model, text) for text in TEXTS])
    assert got["values"] == len(TEXTS)
    assert got["tokens"] > 0


def test_the_providers_options_are_taken(asked: Asked, provider: str) -> None:
    fake, results = asked
    got = results.value(f"{provider}: dimensions")["embeddings"]
    assert_numbers(got, [fake.expected(SMALL, text, 256) for text in TEXTS])


def test_more_values_than_it_sends_at_once_come_back_in_order(asked: Asked, provider: str) -> None:
    fake, results = asked
    got = results.value(f"{provider}: many")["embeddings"]
    assert_numbers(got, [fake.expected(SMALL, text, 16) for text in MANY])


def test_errors_carry_the_gateways_words(asked: Asked, provider: str) -> None:
    results = asked[1]
    results.error(f"{provider}: wrong key", "AI_APICallError", 401, "^Incorrect API key provided$")
    results.error(f"{provider}: unknown model", "AI_APICallError", 404, "^The model 'text-embedding-9' does not exist")
    results.error(f"{provider}: empty", "AI_APICallError", 400, r"^input\[1\] must not be an empty string")
