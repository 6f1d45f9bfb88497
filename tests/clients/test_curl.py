"""curl, on every route, with the habits of a shell user."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.support import BGE, KEY, SMALL, TEXTS, config, numbers_of, same
from tests.fakes import FakeOpenAI
from tests.harness import Running, running

CURL = shutil.which("curl") or ""
pytestmark = pytest.mark.skipif(not CURL, reason="curl is not installed")

BEARER = ("-H", f"Authorization: Bearer {KEY}")
JSON = ("-H", "Content-Type: application/json")


@dataclass
class Got:
    status: int
    version: str
    headers: dict[str, str]
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def curl(*arguments: str, stdin: str = "") -> Got:
    """Runs curl without a .curlrc; returns the head of the last response, and its decoded body."""
    shown = ("--include", "--silent", "--show-error", "--max-time", "20", "--noproxy", "*")
    ran = subprocess.run([CURL, "-q", *shown, *arguments], input=stdin.encode(), capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    head, _, body = ran.stdout.decode().partition("\r\n\r\n")
    while head.split()[1] == "100":
        head, _, body = body.partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    version, status = first.split()[:2]
    fields = (line.split(": ", 1) for line in lines)
    return Got(int(status), version, {name.lower(): value for name, value in fields}, body)


def body(model: str | None = SMALL, **more: Any) -> str:
    return json.dumps(({"model": model} if model else {}) | {"input": "hi"} | more, ensure_ascii=False)


def test_a_string_gets_numbers(gateway: Running, fake: FakeOpenAI) -> None:
    got = curl(f"{gateway.base_url}/embeddings", *BEARER, *JSON, "-d", body(input=TEXTS[0]))
    assert got.status == 200, got.body
    assert got.headers["content-type"] == "application/json"
    (numbers,) = numbers_of(got.json)
    assert same(numbers, fake.expected(SMALL, TEXTS[0]))


def test_a_list_gets_numbers_in_order(gateway: Running, fake: FakeOpenAI) -> None:
    texts = [text for text in TEXTS if "\0" not in text]
    got = curl(f"{gateway.base_url}/embeddings", *BEARER, *JSON, "-d", body(input=texts, encoding_format="float"))
    for text, numbers in zip(texts, numbers_of(got.json), strict=True):
        assert same(numbers, fake.expected(SMALL, text)), text


def test_base64_is_given_to_who_asks_for_it(gateway: Running, fake: FakeOpenAI) -> None:
    got = curl(f"{gateway.base_url}/embeddings", *BEARER, *JSON, "-d", body(encoding_format="base64"))
    wire = got.json["data"][0]["embedding"]
    assert same(np.frombuffer(base64.b64decode(wire), "<f4"), fake.expected(SMALL, "hi"))


def test_a_body_without_its_content_type_is_understood(gateway: Running, fake: FakeOpenAI) -> None:
    """`curl -d` declares its body to be a form."""
    got = curl(f"{gateway.base_url}/embeddings", *BEARER, "-d", body())
    assert got.status == 200, got.body
    assert same(numbers_of(got.json)[0], fake.expected(SMALL, "hi"))


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/embeddings", None),
        ("/embeddings", None),
        ("/openai/v1/embeddings", None),
        (f"/v1/engines/{SMALL}/embeddings", SMALL),
        (f"/v1/engines/{BGE}/embeddings", BGE),
        ("/v1/engines/up%2FBAAI%2Fbge-m3/embeddings", f"up/{BGE}"),
        (f"/openai/deployments/{SMALL}/embeddings", SMALL),
        (f"/openai/deployments/{BGE}/embeddings", BGE),
        ("/openai/deployments/BAAI%2Fbge-m3/embeddings", BGE),
    ],
)
def test_every_route_answers_itself_with_a_trailing_slash_and_a_query_too(
    gateway: Running, fake: FakeOpenAI, path: str, model: str | None, slash: str
) -> None:
    asked = body(None if model else SMALL)
    for query in ("", "?api-version=2024-10-21"):
        got = curl(f"{gateway.url}{path}{slash}{query}", *BEARER, *JSON, "-d", asked)
        assert got.status == 200, got.body
        assert got.json["model"] == (model or SMALL)
        name = (model or SMALL).removeprefix("up/")
        assert same(numbers_of(got.json)[0], fake.expected(name, "hi"))


@pytest.mark.parametrize("header", [f"api-key: {KEY}", f"x-api-key: {KEY}", f"authorization: bearer {KEY}"])
def test_the_key_is_taken_from_any_of_its_headers(gateway: Running, header: str) -> None:
    assert curl(f"{gateway.base_url}/embeddings", "-H", header, *JSON, "-d", body()).status == 200
    assert curl(f"{gateway.base_url}/models", "-H", header).status == 200


def test_without_a_key_it_is_told_how_to_send_one(gateway: Running, fake: FakeOpenAI) -> None:
    got = curl(f"{gateway.base_url}/embeddings", *JSON, "-d", body())
    assert got.status == 401
    assert got.json["error"]["code"] == "invalid_api_key"
    assert "Authorization: Bearer" in got.json["error"]["message"]
    assert fake.calls == []


def test_a_body_that_is_announced_first_is_asked_for(gateway: Running, fake: FakeOpenAI, tmp_path: Path) -> None:
    """curl waits for "100 Continue" before it sends a body over 1 MB, and whenever it is told to."""
    texts = [f"{i} " + "a long text " * 2000 for i in range(50)]
    large = tmp_path / "large.json"
    large.write_text(body(input=texts))
    assert large.stat().st_size > 1024 * 1024
    expect = ("-H", "Expect: 100-continue", "--expect100-timeout", "15")
    for data, text in ((body(), "hi"), (f"@{large}", texts[0])):
        got = curl(f"{gateway.base_url}/embeddings", *BEARER, *JSON, *expect, "-w", "\n%{time_total}", "-d", data)
        assert got.status == 200, got.body
        answered, _, seconds = got.body.rpartition("\n")
        assert float(seconds) < 10, "the server did not ask for the body; curl gave up waiting"
        assert same(numbers_of(json.loads(answered))[0], fake.expected(SMALL, text))


def test_a_wrong_key_is_told_before_a_large_body_is_sent(gateway: Running, tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    large.write_text(body(input=["large " * 5000] * 200))
    wrong = ("-H", "Authorization: Bearer wrong", "-H", "Expect: 100-continue")
    got = curl(f"{gateway.base_url}/embeddings", *wrong, *JSON, "-d", f"@{large}")
    assert got.status == 401
    assert got.json["error"]["code"] == "invalid_api_key"


def test_a_chunked_body_is_read_whole(gateway: Running, fake: FakeOpenAI) -> None:
    sent = body(input=TEXTS[:4])
    chunked = ("-H", "Transfer-Encoding: chunked", "--data-binary", "@-")
    got = curl(f"{gateway.base_url}/embeddings", *BEARER, *JSON, *chunked, stdin=sent)
    assert got.status == 200, got.body
    for text, numbers in zip(TEXTS[:4], numbers_of(got.json), strict=True):
        assert same(numbers, fake.expected(SMALL, text))


def test_who_accepts_compression_can_read_the_answer(gateway: Running, fake: FakeOpenAI) -> None:
    got = curl(f"{gateway.base_url}/embeddings", *BEARER, *JSON, "--compressed", "-d", body())
    assert got.status == 200
    assert same(numbers_of(got.json)[0], fake.expected(SMALL, "hi"))


def test_a_compressed_body_is_refused_in_words(gateway: Running) -> None:
    gzip = ("-H", "Content-Encoding: gzip")
    got = curl(f"{gateway.base_url}/embeddings", *BEARER, *JSON, *gzip, "-d", body())
    assert got.status == 415
    assert got.json["error"]["code"] == "unsupported_encoding"


@pytest.mark.parametrize("version", ["--http1.0", "--http1.1", "--http2"])
def test_older_and_newer_http_is_answered(gateway: Running, fake: FakeOpenAI, version: str) -> None:
    """With `--http2` curl offers an upgrade over plain HTTP, which the gateway ignores."""
    if version == "--http2" and b"HTTP2" not in subprocess.run([CURL, "-qV"], capture_output=True, check=True).stdout:
        pytest.skip("this curl was built without HTTP/2")
    got = curl(f"{gateway.base_url}/embeddings", *BEARER, *JSON, version, "-d", body(input=["hi", "there"]))
    assert got.status == 200
    assert "transfer-encoding" not in got.headers
    for text, numbers in zip(["hi", "there"], numbers_of(got.json), strict=True):
        assert same(numbers, fake.expected(SMALL, text))


def test_get_on_the_embeddings_route_is_told_to_post(gateway: Running) -> None:
    got = curl(f"{gateway.base_url}/embeddings", *BEARER)
    assert got.status == 405
    assert got.json["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("name", [SMALL, BGE, "BAAI%2Fbge-m3", f"up/{BGE}", "up%2FBAAI%2Fbge-m3"])
@pytest.mark.parametrize("base", ["/v1/models", "/models"])
def test_models_are_described_by_name(gateway: Running, name: str, base: str) -> None:
    for slash in ("", "/"):
        got = curl(f"{gateway.url}{base}/{name}{slash}", *BEARER)
        assert got.status == 200, got.body
        assert got.json["id"] == name.replace("%2F", "/")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/models", "/models/"])
def test_models_are_listed_with_a_trailing_slash_too(gateway: Running, path: str) -> None:
    got = curl(gateway.url + path, *BEARER)
    assert got.status == 200, got.body
    assert BGE in {model["id"] for model in got.json["data"]}


def test_no_key_is_asked_for_where_none_is_configured(fake: FakeOpenAI) -> None:
    with running(config(fake, keys=False)) as gateway:
        got = curl(f"{gateway.base_url}/embeddings", *JSON, "-d", body())
    assert got.status == 200
    assert same(numbers_of(got.json)[0], fake.expected(SMALL, "hi"))
