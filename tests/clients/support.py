"""Shared by the tests of real clients: names, keys, texts, and the bit-for-bit comparison."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from tests.fakes import FakeOpenAI, Vector
from tests.harness import Running

KEY = "sk-canary-team"
NARROW_KEY = "sk-canary-narrow"
"""Allows `BGE` only."""
UPSTREAM_KEY = "sk-canary-upstream"

SMALL = "text-embedding-3-small"
BGE = "BAAI/bge-m3"
"""A name with a slash, as on Hugging Face."""
MODELS: Mapping[str, int] = {SMALL: 1536, "text-embedding-3-large": 3072, "text-embedding-ada-002": 1536, BGE: 1024}

TEXTS = [
    "风急天高猿啸哀，渚清沙白鸟飞回。",
    "The quick brown fox jumps over the lazy dog.",
    "naïve café — “quoted”",
    "🦜 👩‍👩‍👧‍👦 🙂",
    "two\nlines\tand a tab",
    " leading and trailing ",
    "<|endoftext|> is plain text here",
    "nul \0 inside",
    "重复" * 500,
]


def fake_upstream() -> FakeOpenAI:
    return FakeOpenAI(api_key=UPSTREAM_KEY, models=MODELS)


def config(fake: FakeOpenAI, *, keys: bool = True, cache: bool = False) -> dict[str, Any]:
    """A gateway in front of `fake`, which is the upstream named `up`."""
    document: dict[str, Any] = {
        "upstreams": {"up": {"type": "openai", "api_key": UPSTREAM_KEY, "base_url": f"{fake.url}/v1"}}
    }
    if keys:
        document["auth"] = {"keys": {"team": {"key": KEY}, "narrow": {"key": NARROW_KEY, "models": [BGE]}}}
    if not cache:
        document["cache"] = {"memory": None}
    return document


def same(got: Sequence[float] | NDArray[Any], wanted: Vector) -> bool:
    """Compare bit for bit, as float32."""
    return np.asarray(got, dtype=np.float32).tobytes() == wanted.tobytes()


def exactly_float32(got: Sequence[float], wanted: Vector) -> bool:
    """Compare as float64: numbers decoded from base64 are exact float32 values."""
    return bool(np.asarray(got, dtype=np.float64).tolist() == wanted.astype(np.float64).tolist())


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    json: Any


Headers = Mapping[str, str] | Sequence[tuple[str, str]]
"""Pairs to send a field twice."""


def send(gateway: Running, body: Any, headers: Headers, *, path: str = "/v1/embeddings") -> Answer:
    """Sends a POST with exactly these headers, plus Host and Content-Length: nothing else added or normalized."""
    raw = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    connection = http.client.HTTPConnection(urlsplit(gateway.url).netloc, timeout=20)
    try:
        connection.putrequest("POST", path, skip_accept_encoding=True)
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        for name, value in (*pairs, ("Content-Length", str(len(raw)))):
            connection.putheader(name, value)
        connection.endheaders(raw)
        response = connection.getresponse()
        content = response.read()
        received = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, received, json.loads(content))
    finally:
        connection.close()


def numbers_of(answer: Any) -> list[list[float]]:
    """The vectors of an OpenAI-shaped answer, whose other fields are checked."""
    assert answer["object"] == "list"
    assert [row["object"] for row in answer["data"]] == ["embedding"] * len(answer["data"])
    assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
    usage = answer["usage"]
    assert type(usage["prompt_tokens"]) is int
    assert usage["prompt_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"]
    return [row["embedding"] for row in answer["data"]]


def assert_error(answer: Answer, status: int, code: str, param: str | None) -> str:
    """Checks an error in OpenAI's shape, and returns its message."""
    assert answer.status == status, answer
    assert list(answer.json) == ["error"]
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert answer.headers["x-request-id"]
    return str(error["message"])
