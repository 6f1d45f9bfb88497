"""OpenAI's SDK for Node, unmodified and with its defaults. It trusts the answer's form blindly: given numbers
where it asked for base64, it turns them into a quarter as many near-zero numbers, without an error."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import tokens
from tests.clients import extra
from tests.clients.support import BGE, KEY, MODELS, SMALL, TEXTS, config, exactly_float32, fake_upstream, same
from tests.fakes import FakeOpenAI, faults
from tests.harness import running

FOLDER = Path(__file__).parent / "node"
SLASHED = f"up/{BGE}"
SLOW = "please slow down"


@pytest.fixture(scope="session")
def node() -> str:
    """Node, with the SDK installed from the lock file."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        extra.missing("node is not installed", "javascript")
    if not (FOLDER / "node_modules" / "openai").is_dir():
        command = [npm, "ci", "--no-audit", "--no-fund"]
        ran = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False, timeout=100)
        assert ran.returncode == 0, f"npm ci failed:\n{ran.stdout}{ran.stderr}"
    return node


@pytest.fixture(scope="module")
def answered(node: str) -> Iterator[tuple[FakeOpenAI, dict[str, Any]]]:
    """Runs the script once for all its requests: starting Node costs more than everything else."""
    with fake_upstream() as fake, running(config(fake)) as gateway:
        limit = faults.vendor_error("rate_limit", headers={"retry-after-ms": "20"})
        fake.fail(limit, times=None, when=lambda texts: texts == [SLOW])
        fake.fail(faults.vendor_error("quota"), times=None, when=lambda texts: texts == ["quota"])
        told = {"baseURL": gateway.base_url, "apiKey": KEY, "model": SMALL, "slashed": SLASHED, "texts": TEXTS}
        command = [node, "client.mjs", json.dumps(told | {"slow": SLOW})]
        ran = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False, timeout=60)
        assert ran.returncode == 0, ran.stderr
        yield fake, json.loads(ran.stdout)


@pytest.fixture
def fake(answered: tuple[FakeOpenAI, dict[str, Any]]) -> FakeOpenAI:
    return answered[0]


@pytest.fixture
def results(answered: tuple[FakeOpenAI, dict[str, Any]]) -> dict[str, Any]:
    return answered[1]


def value(results: dict[str, Any], name: str) -> Any:
    assert "value" in results[name], results[name]
    return results[name]["value"]


def error(results: dict[str, Any], name: str, kind: str, status: int, code: str) -> dict[str, Any]:
    assert "error" in results[name], name
    got: dict[str, Any] = results[name]["error"]
    assert (got["class"], got.get("status"), got.get("code")) == (kind, status, code), got
    assert got["requestID"], "the SDK shows the request's id"
    return got


@pytest.mark.parametrize("name", ["default", "slashed", "azure"])
def test_a_list_gets_its_vectors_bit_for_bit(results: dict[str, Any], fake: FakeOpenAI, name: str) -> None:
    got = value(results, name)
    model, asked = (SMALL, SMALL) if name == "default" else (BGE, SLASHED)
    assert got["model"] == asked
    assert [row["index"] for row in got["data"]] == list(range(len(TEXTS)))
    for text, row in zip(TEXTS, got["data"], strict=True):
        assert exactly_float32(row["embedding"], fake.expected(model, text)), text


def test_a_string_gets_its_vector(results: dict[str, Any], fake: FakeOpenAI) -> None:
    (row,) = value(results, "string")["data"]
    assert exactly_float32(row["embedding"], fake.expected(SMALL, TEXTS[0]))


def test_float_gets_numbers(results: dict[str, Any], fake: FakeOpenAI) -> None:
    for text, row in zip(TEXTS, value(results, "float")["data"], strict=True):
        assert same(row["embedding"], fake.expected(SMALL, text)), text


def test_base64_asked_for_by_name_stays_base64(results: dict[str, Any], fake: FakeOpenAI) -> None:
    for text, row in zip(TEXTS, value(results, "base64")["data"], strict=True):
        assert same(np.frombuffer(base64.b64decode(row["embedding"]), "<f4"), fake.expected(SMALL, text)), text


def test_dimensions_and_user_are_taken(results: dict[str, Any], fake: FakeOpenAI) -> None:
    for text, row in zip(TEXTS, value(results, "dimensions")["data"], strict=True):
        assert exactly_float32(row["embedding"], fake.expected(SMALL, text, 256)), text


def test_token_ids_get_the_vectors_of_their_texts(results: dict[str, Any], fake: FakeOpenAI) -> None:
    rows = value(results, "ids")["data"]
    for ids, row in zip([[15339, 1917], [9906]], rows, strict=True):
        assert exactly_float32(row["embedding"], fake.expected(SMALL, tokens.decode(ids)))


def test_the_request_id_is_shown(results: dict[str, Any]) -> None:
    got = value(results, "raw")
    assert got["request_id"] == got["header"]
    assert got["header"].startswith("req_")


@pytest.mark.parametrize("name", ["base", "slash"])
def test_a_base_url_without_v1_or_with_a_trailing_slash_works(
    results: dict[str, Any], fake: FakeOpenAI, name: str
) -> None:
    (row,) = value(results, name)["data"]
    assert exactly_float32(row["embedding"], fake.expected(SMALL, "hi"))


def test_the_models_are_listed(results: dict[str, Any]) -> None:
    assert {model["id"] for model in value(results, "models")} == {*MODELS, *(f"up/{name}" for name in MODELS)}


def test_a_model_is_retrieved_by_a_name_with_slashes(results: dict[str, Any]) -> None:
    assert value(results, "retrieve")["id"] == SLASHED


@pytest.mark.parametrize(
    ("name", "kind", "status", "code", "words"),
    [
        ("wrong key", "AuthenticationError", 401, "invalid_api_key", "Incorrect API key provided"),
        ("unknown model", "NotFoundError", 404, "model_not_found", "The model 'text-embedding-9' does not exist"),
        ("retrieve unknown", "NotFoundError", 404, "model_not_found", "The model 'gpt/none' does not exist"),
        ("null model", "BadRequestError", 400, "invalid_value", "you must provide a model"),
        ("empty string", "BadRequestError", 400, "invalid_value", "must not be an empty string"),
        ("empty list", "BadRequestError", 400, "invalid_value", "must not be an empty list"),
        ("slow down", "RateLimitError", 429, "rate_limit_exceeded", "Rate limit reached"),
        ("quota", "RateLimitError", 429, "insufficient_quota", "exceeded your current quota"),
        ("wrong key, large body", "AuthenticationError", 401, "invalid_api_key", "Incorrect API key provided"),
    ],
)
def test_errors_are_of_the_right_class_and_readable(
    results: dict[str, Any], name: str, kind: str, status: int, code: str, words: str
) -> None:
    got = error(results, name, kind, status, code)
    assert got["message"].startswith(f"{status} ")
    assert words in got["message"]


def test_an_exhausted_quota_is_not_tried_again(results: dict[str, Any], fake: FakeOpenAI) -> None:
    assert "error" in results["quota"]
    assert len([call for call in fake.calls if call.texts == ["quota"]]) == 1


def test_the_lock_file_names_no_registry_and_pins_every_package() -> None:
    text = (FOLDER / "package-lock.json").read_text()
    assert not re.search(r"https?:|resolved", text)
    packages = json.loads(text)["packages"]
    wanted = json.loads((FOLDER / "package.json").read_text())["dependencies"]
    assert packages[""]["dependencies"] == wanted
    for name, package in packages.items():
        assert not name or package["integrity"].startswith("sha512-"), name
