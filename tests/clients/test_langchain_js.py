"""LangChain JS, which sends text, with line breaks removed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.clients import extra
from tests.clients.extra import MANY, Asked, assert_float32, assert_numbers
from tests.clients.support import BGE, SMALL, TEXTS

FLAT = [text.replace("\n", " ") for text in TEXTS]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    command = [*extra.node(), "langchain.mjs"]
    with extra.gateway() as (fake, base_url):
        yield fake, extra.asked(command, base_url, tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize(("name", "model"), [("documents", SMALL), ("slashed", BGE)])
def test_documents_get_the_vectors_of_their_text_without_line_breaks(asked: Asked, name: str, model: str) -> None:
    fake, results = asked
    assert_float32(results.value(name), [fake.expected(model, text) for text in FLAT])


def test_a_query_gets_its_vector(asked: Asked) -> None:
    fake, results = asked
    assert_float32([results.value("query")], [fake.expected(SMALL, TEXTS[0])])


def test_told_to_keep_line_breaks_it_sends_the_text_as_it_is(asked: Asked) -> None:
    fake, results = asked
    assert_float32(results.value("newlines kept"), [fake.expected(SMALL, text) for text in TEXTS])


def test_dimensions_and_numbers_are_taken(asked: Asked) -> None:
    fake, results = asked
    assert_float32(results.value("dimensions"), [fake.expected(SMALL, text, 256) for text in FLAT])
    assert_numbers(results.value("numbers"), [fake.expected(SMALL, text) for text in FLAT])


def test_more_documents_than_it_sends_at_once_come_back_in_order(asked: Asked) -> None:
    fake, results = asked
    assert_float32(results.value("many"), [fake.expected(SMALL, text, 16) for text in MANY])


def test_errors_carry_the_gateways_words(asked: Asked) -> None:
    results = asked[1]
    results.error("wrong key", "Error", 401, "^401 Incorrect API key provided")
    results.error("unknown model", "Error", 404, "^404 The model 'text-embedding-9' does not exist")
    results.error("empty", "Error", 400, r"^400 input\[1\] must not be an empty string")


def test_the_lock_file_names_no_registry_and_pins_every_package() -> None:
    text = (extra.NODE / "package-lock.json").read_text()
    assert not re.search(r"resolved|registry", text)
    packages = json.loads(text)["packages"]
    assert packages[""]["dependencies"] == json.loads((extra.NODE / "package.json").read_text())["dependencies"]
    for name, package in packages.items():
        assert not name or package["integrity"].startswith("sha512-"), name
