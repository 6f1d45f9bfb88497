"""Requests as other programs send them, header for header; most of these programs have no SDK of their own."""

from __future__ import annotations

import base64
import contextlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from tests.clients.support import BGE, KEY, SMALL, TEXTS, Answer, assert_error, config, fake_upstream, numbers_of, same
from tests.clients.support import send as post
from tests.clock import settle
from tests.fakes import FakeOpenAI
from tests.harness import Running, running

JSON = {"Content-Type": "application/json"}
BEARER = {**JSON, "Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def _open() -> Iterator[tuple[FakeOpenAI, Running]]:
    with fake_upstream() as fake, running(config(fake, keys=False, cache=True)) as gateway:
        yield fake, gateway


@pytest.fixture
def open_fake(_open: tuple[FakeOpenAI, Running]) -> FakeOpenAI:
    _open[0].reset()
    return _open[0]


@pytest.fixture
def open_gateway(_open: tuple[FakeOpenAI, Running], open_fake: FakeOpenAI) -> Running:
    """A gateway as most people first run it: no keys, the default cache. Each test must use its own texts."""
    return _open[1]


def assert_vectors(
    answer: Answer, fake: FakeOpenAI, model: str, texts: list[str], dimensions: int | None = None
) -> None:
    assert answer.status == 200, answer.json
    for text, numbers in zip(texts, numbers_of(answer.json), strict=True):
        assert isinstance(numbers, list), "asked for numbers"
        assert same(numbers, fake.expected(model, text, dimensions)), text


# --- Dify ----------------------------------------------------------------------------------------


def test_dify_checks_its_credentials_without_a_key(open_gateway: Running, open_fake: FakeOpenAI) -> None:
    """The check requires exactly 200 and a `model`; without a key, the header is sent empty."""
    headers = {**JSON, "Authorization": "", "User-Agent": "python-requests/2.32.3", "Accept": "*/*"}
    answer = post(open_gateway, {"input": "ping", "model": BGE}, headers)
    assert answer.status == 200
    assert answer.json["model"] == BGE
    assert_vectors(answer, open_fake, BGE, ["ping"])


@pytest.mark.parametrize("encoding_format", [None, "float"])
def test_dify_embeds_and_reads_the_usage(gateway: Running, fake: FakeOpenAI, encoding_format: str | None) -> None:
    body = {"input": TEXTS, "model": BGE, "encoding_format": encoding_format, "user": "3f2a-user"}
    answer = post(gateway, body, {**BEARER, "User-Agent": "python-requests/2.32.3"}, path="/v1/embeddings")
    assert_vectors(answer, fake, BGE, TEXTS)
    assert answer.json["usage"]["total_tokens"] == fake.billed_tokens


def test_an_empty_authorization_is_no_key_where_one_is_needed(gateway: Running, fake: FakeOpenAI) -> None:
    for value in ("", "Bearer ", "Bearer"):
        answer = post(gateway, {"input": "ping", "model": BGE}, {**JSON, "Authorization": value})
        message = assert_error(answer, 401, "invalid_api_key", None)
        assert "You didn't provide an API key" in message
    assert fake.calls == []


# --- Open WebUI ----------------------------------------------------------------------------------

OPEN_WEBUI = {
    **JSON,
    "Authorization": "Bearer ",
    "X-OpenWebUI-User-Name": "%E6%9D%9C%E7%94%AB",
    "X-OpenWebUI-User-Id": "8a7c",
    "X-OpenWebUI-User-Email": "dufu@example.org",
    "X-OpenWebUI-User-Role": "admin",
}


def test_open_webui_gets_numbers_though_it_names_no_format(open_gateway: Running, open_fake: FakeOpenAI) -> None:
    texts = [f"webui {text}" for text in TEXTS]
    answer = post(open_gateway, {"input": texts, "model": SMALL}, OPEN_WEBUI)
    assert_vectors(answer, open_fake, SMALL, texts)


def test_open_webui_sends_its_prefix_as_a_field_of_its_own(gateway: Running, fake: FakeOpenAI) -> None:
    body = {"input": ["风急"], "model": SMALL, "prefix": "query: "}
    assert_vectors(post(gateway, body, {**OPEN_WEBUI, **BEARER}, path="/embeddings"), fake, SMALL, ["风急"])


def test_open_webui_in_its_azure_mode(gateway: Running, fake: FakeOpenAI) -> None:
    path = f"/openai/deployments/{SMALL}/embeddings?api-version=2023-05-15"
    answer = post(gateway, {"input": TEXTS}, {**JSON, "api-key": KEY}, path=path)
    assert_vectors(answer, fake, SMALL, TEXTS)
    assert answer.json["model"] == SMALL


# --- RAGFlow, AnythingLLM, Vercel, LiteLLM, Spring, LangChain JS -----------------------------------


def test_ragflow_asks_for_float_and_to_drop_parameters(gateway: Running, fake: FakeOpenAI) -> None:
    body = {"input": TEXTS, "model": BGE, "encoding_format": "float", "drop_params": True}
    assert_vectors(post(gateway, body, {**BEARER, "User-Agent": "OpenAI/Python 1.99.9"}), fake, BGE, TEXTS)


@pytest.mark.parametrize("missing", [{"model": None}, {}, {"model": ""}])
def test_anythingllm_without_a_model_is_told_to_name_one(
    gateway: Running, fake: FakeOpenAI, missing: Mapping[str, Any]
) -> None:
    headers = {**BEARER, "User-Agent": "OpenAI/JS 4.95.1", "X-Stainless-Lang": "js", "X-Stainless-Retry-Count": "0"}
    answer = post(gateway, {**missing, "input": ["hi"], "encoding_format": "base64"}, headers)
    assert "model" in assert_error(answer, 400, "invalid_value", "model")
    assert "x-should-retry" not in answer.headers
    assert fake.calls == []


def test_anythingllm_gets_base64(gateway: Running, fake: FakeOpenAI) -> None:
    answer = post(gateway, {"model": BGE, "input": TEXTS, "encoding_format": "base64"}, BEARER)
    for text, wire in zip(TEXTS, numbers_of(answer.json), strict=True):
        assert same(np.frombuffer(base64.b64decode(str(wire), validate=True), "<f4"), fake.expected(BGE, text))


def test_vercels_ai_sdk_always_asks_for_float(gateway: Running, fake: FakeOpenAI) -> None:
    headers = {**BEARER, "User-Agent": "ai/6.0.140 ai-sdk/openai-compatible/2.0.87 runtime/node.js/20"}
    body = {"model": BGE, "input": TEXTS, "encoding_format": "float"}
    answer = post(gateway, body, headers)
    assert_vectors(answer, fake, BGE, TEXTS)
    assert all(type(number) is float for row in numbers_of(answer.json) for number in row)


def test_litellm_sends_null_for_what_it_does_not_mean(gateway: Running, fake: FakeOpenAI) -> None:
    body = {"input": TEXTS, "model": SMALL, "encoding_format": None, "dimensions": None, "user": None}
    assert_vectors(post(gateway, body, BEARER), fake, SMALL, TEXTS)


def test_every_optional_field_may_be_null(gateway: Running, fake: FakeOpenAI) -> None:
    nothing = dict.fromkeys(
        ("encoding_format", "dimensions", "user", "input_type", "text_type", "output_type", "instruct", "truncate")
    )
    assert_vectors(post(gateway, {"input": "hi", "model": SMALL, **nothing}, BEARER), fake, SMALL, ["hi"])


def test_spring_ai_names_the_whole_path_and_may_ask_for_dimensions(gateway: Running, fake: FakeOpenAI) -> None:
    headers = {**BEARER, "Content-Type": "application/json;charset=UTF-8", "User-Agent": "Java-http-client/21.0.2"}
    body = {"input": TEXTS, "model": SMALL, "dimensions": 512}
    assert_vectors(post(gateway, body, headers), fake, SMALL, TEXTS, 512)


def test_javas_http_client_which_offers_to_speak_http_2_is_answered(gateway: Running, fake: FakeOpenAI) -> None:
    """`java.net.http` with its defaults, and so Spring AI and LangChain4j, on plain HTTP."""
    offer = {
        "Connection": "Upgrade, HTTP2-Settings",
        "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
        "Upgrade": "h2c",
        "User-Agent": "Java-http-client/21.0.2",
    }
    answer = post(gateway, {"input": TEXTS, "model": SMALL}, {**BEARER, **offer})
    assert_vectors(answer, fake, SMALL, TEXTS)


def test_what_follows_such_an_offer_is_the_body_and_never_another_request(gateway: Running) -> None:
    """Otherwise the author of a body could send requests in the name of others who share the connection."""
    body = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    fields = [
        "POST /v1/embeddings HTTP/1.1", "Host: x", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c",
        f"Authorization: Bearer {KEY}", "Content-Type: application/json", f"Content-Length: {len(body)}",
    ]  # fmt: skip
    head = "\r\n".join([*fields, "", ""]).encode()
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    answered = b""
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head)
        gateway.call(settle())  # so that it is read by itself
        connection.sendall(body)
        connection.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while chunk := connection.recv(65536):
                answered += chunk
    assert answered.count(b"HTTP/1.1 ") == 1, answered
    assert b'"status":"ok"' not in answered


def test_langchain_js_sends_text_and_no_format(gateway: Running, fake: FakeOpenAI) -> None:
    headers = {**BEARER, "User-Agent": "langchainjs-openai/1.0.0 (node/20)", "X-Stainless-Lang": "js"}
    assert_vectors(post(gateway, {"model": SMALL, "input": TEXTS}, headers), fake, SMALL, TEXTS)


def test_a_body_with_everything_escaped_is_the_same_text(gateway: Running, fake: FakeOpenAI) -> None:
    escaped = b'{"model": "%s", "input": "\\u98ce\\u6025 \\ud83e\\udd9c"}' % SMALL.encode()
    assert_vectors(post(gateway, escaped, BEARER), fake, SMALL, ["风急 🦜"])


# --- fields and headers that have no meaning here ----------------------------------------------------


def test_unknown_fields_are_ignored_whatever_they_hold(gateway: Running, fake: FakeOpenAI) -> None:
    unknown = {"normalize": True, "truncate": "END", "messages": [{"role": "user"}], "extra": {"a": [1, None]}, "": 0}
    assert_vectors(post(gateway, {"input": "hi", "model": SMALL, **unknown}, BEARER), fake, SMALL, ["hi"])


def test_unknown_headers_are_ignored(gateway: Running, fake: FakeOpenAI) -> None:
    others = {
        "OpenAI-Organization": "org-1",
        "OpenAI-Project": "proj_1",
        "OpenAI-Beta": "x",
        "HTTP-Referer": "https://example.org/",
        "X-Title": "é",
        "Cookie": "a=b",
        "Origin": "http://localhost:3000",
        "Accept": "text/event-stream",
        "Accept-Encoding": "gzip, deflate, br, zstd",
        "X-Stainless-Read-Timeout": "600",
    }
    assert_vectors(post(gateway, {"input": "hi", "model": SMALL}, {**BEARER, **others}), fake, SMALL, ["hi"])


@pytest.mark.parametrize(
    "header", [{"api-key": KEY}, {"x-api-key": KEY}, {"X-API-Key": KEY, "Authorization": "Bearer "}]
)
def test_the_key_is_found_in_its_other_headers(gateway: Running, fake: FakeOpenAI, header: Mapping[str, str]) -> None:
    assert_vectors(post(gateway, {"input": "hi", "model": SMALL}, {**JSON, **header}), fake, SMALL, ["hi"])


# --- the cache -----------------------------------------------------------------------------------


def ask(gateway: Running, text: str, control: str | None = None) -> str:
    """Embeds one text; returns the answer's cache header."""
    headers = JSON if control is None else {**JSON, "Cache-Control": control}
    answer = post(gateway, {"input": text, "model": BGE}, headers)
    assert answer.status == 200
    return answer.headers["x-embedding-cache"]


def test_no_cache_asks_the_upstream_again_and_keeps_the_answer(open_gateway: Running, open_fake: FakeOpenAI) -> None:
    assert [ask(open_gateway, "kept") for _ in range(2)] == ["miss", "hit"]
    assert ask(open_gateway, "kept", "no-cache") == "miss"
    assert ask(open_gateway, "never seen", "no-cache") == "miss"
    assert ask(open_gateway, "never seen") == "hit"
    assert len(open_fake.calls) == 3


def test_no_store_keeps_nothing_but_may_be_answered_from_the_cache(
    open_gateway: Running, open_fake: FakeOpenAI
) -> None:
    assert [ask(open_gateway, "secret", "no-store") for _ in range(2)] == ["miss", "miss"]
    assert [ask(open_gateway, "secret") for _ in range(2)] == ["miss", "hit"]
    assert ask(open_gateway, "secret", "no-store") == "hit"
    assert len(open_fake.calls) == 3


@pytest.mark.parametrize("control", ["no-cache, no-store", "No-Store,No-Cache", "max-age=0 , no-cache,no-store"])
def test_both_together_neither_read_nor_write(open_gateway: Running, open_fake: FakeOpenAI, control: str) -> None:
    text = f"both {control}"
    assert [ask(open_gateway, text, control) for _ in range(2)] == ["miss", "miss"]
    assert ask(open_gateway, text) == "miss"


def test_directives_in_two_header_lines_count_as_in_one(open_gateway: Running, open_fake: FakeOpenAI) -> None:
    """RFC 9110 5.3 makes them equal, and proxies add lines of their own."""
    headers = [*JSON.items(), ("Cache-Control", "no-cache"), ("Cache-Control", "no-store")]
    for _ in range(2):
        answer = post(open_gateway, {"input": "two lines", "model": BGE}, headers)
        assert answer.headers["x-embedding-cache"] == "miss"
    assert ask(open_gateway, "two lines") == "miss"


def test_a_cached_vector_is_the_same_in_every_form(open_gateway: Running, open_fake: FakeOpenAI) -> None:
    wanted = open_fake.expected(SMALL, "every form")
    for encoding in ("base64", "float", None, "base64"):
        body = {"input": "every form", "model": SMALL, "encoding_format": encoding}
        (got,) = numbers_of(post(open_gateway, body, JSON).json)
        numbers = np.frombuffer(base64.b64decode(str(got)), "<f4") if encoding == "base64" else got
        assert same(numbers, wanted)
    assert len(open_fake.calls) == 1
