"""LiteLLM's library as a client: `openai/` and the model's name, `api_base` and the key."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from app import tokens
from tests.clients import extra
from tests.clients.extra import ALIAS, SLASHED, Asked, assert_numbers
from tests.clients.support import BGE, SMALL, TEXTS, same


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    command = [*extra.python(), str(extra.CLIENT), "litellm"]
    with extra.gateway() as (fake, base_url):
        yield fake, extra.asked(command, base_url, tmp_path_factory.mktemp("home"))


def rows(answer: Any) -> list[Any]:
    assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0
    return [row["embedding"] for row in answer["data"]]


@pytest.mark.parametrize("name", ["list", "asynchronous", "slash", "as its own proxy", "slashed"])
def test_a_list_gets_its_vectors(asked: Asked, name: str) -> None:
    fake, results = asked
    model, shown = (BGE, SLASHED) if name == "slashed" else (SMALL, SMALL)
    answer = results.value(name)
    assert answer["model"] == shown
    assert_numbers(rows(answer), [fake.expected(model, text) for text in TEXTS])


def test_a_string_gets_its_vector(asked: Asked) -> None:
    fake, results = asked
    assert_numbers(rows(results.value("string")), [fake.expected(SMALL, TEXTS[0])])


def test_base64_is_passed_on(asked: Asked) -> None:
    fake, results = asked
    for text, row in zip(TEXTS, rows(results.value("base64")), strict=True):
        assert same(np.frombuffer(base64.b64decode(row), "<f4"), fake.expected(SMALL, text)), text


def test_token_ids_get_the_vectors_of_their_texts(asked: Asked) -> None:
    fake, results = asked
    wanted = [fake.expected(SMALL, tokens.decode(ids)) for ids in ([15339, 1917], [9906])]
    assert_numbers(rows(results.value("ids")), wanted)


@pytest.mark.parametrize("name", ["dimensions", "dimensions, allowed"])
def test_dimensions_are_taken(asked: Asked, name: str) -> None:
    fake, results = asked
    answer = results.value(name)
    assert answer["model"] == (ALIAS if "allowed" in name else SMALL)
    assert_numbers(rows(answer), [fake.expected(SMALL, text, 256) for text in TEXTS])


def test_it_refuses_dimensions_of_a_model_it_does_not_know_by_itself(asked: Asked) -> None:
    """Its workaround is `allowed_openai_params`, as the README says."""
    asked[1].error("dimensions, unknown model", "UnsupportedParamsError", 400, "dimensions is not supported")


def test_errors_are_of_the_right_class_and_carry_the_gateways_words(asked: Asked) -> None:
    results = asked[1]
    results.error("wrong key", "AuthenticationError", 401, "Incorrect API key provided")
    results.error("unknown model", "NotFoundError", 404, "The model 'text-embedding-9' does not exist")
    results.error("empty", "BadRequestError", 400, r"input\[1\] must not be an empty string")
    results.error("many", "BadRequestError", 400, "input has 2100 items; at most 2048 are allowed")
