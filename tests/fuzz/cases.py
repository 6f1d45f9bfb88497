"""Hypothesis strategies for requests that no client would send: bodies, headers and framing."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hypothesis import strategies as st

KEY = "fuzz-key-0123456789"
MODEL = "lexical"
FIELDS = (
    "model", "input", "encoding_format", "dimensions", "user", "input_type", "text_type", "output_type", "instruct",
    "on_long_input",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The bytes of one request.

    `whole`: its framing is valid, so it must be answered and another may follow on the connection.
    """

    data: bytes
    whole: bool
    head_only: bool = False


# --- bodies -------------------------------------------------------------------------------------------------

_text = st.text(st.characters(exclude_categories=()), max_size=12)
_scalars = st.none() | st.booleans() | st.integers() | st.floats() | _text
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_text, inner, max_size=3), max_leaves=8
)
_words = st.text(min_size=1, max_size=12)
_ids = st.lists(st.integers(0, 100_255), min_size=1, max_size=6)
_inputs = _words | st.lists(_words, min_size=1, max_size=5) | _ids | st.lists(_ids, min_size=1, max_size=4)
_odd_ids = st.lists(st.integers(-1, 100_300), max_size=6)
_odd_inputs = _text | st.lists(_text, max_size=5) | _odd_ids | st.lists(_odd_ids | _values, max_size=4)
_optional: dict[str, st.SearchStrategy[object]] = {
    "encoding_format": st.sampled_from(["float", "base64", None]),
    "dimensions": st.sampled_from([64, 512, 1024, None]),
    "user": _words,
    "output_type": st.just("dense"),
    "on_long_input": st.sampled_from(["error", "truncate", "split"]),
}
_good_bodies = st.fixed_dictionaries({"model": st.just(MODEL), "input": _inputs}, optional=_optional)
_CHOICES = ("query", "document", "sparse", "dense&sparse", "truncate", "split", 1, 0, 65536, 10**30, "FLOAT", True)
_odd_bodies = st.builds(
    lambda good, odd: {**good, **odd},
    _good_bodies,
    st.dictionaries(st.sampled_from(FIELDS), _values | _odd_inputs | st.sampled_from(_CHOICES), min_size=1, max_size=3),
)


def _bytes_of(value: object, escaped: bool) -> bytes:
    return json.dumps(value, ensure_ascii=escaped).encode("utf-8", "surrogatepass")


_good_json = st.builds(_bytes_of, _good_bodies, st.booleans())
_json = st.builds(_bytes_of, _odd_bodies, st.booleans())
_any_json = st.builds(_bytes_of, _values, st.booleans())
_numbers = st.sampled_from([b"1e999", b"-0", b"9" * 400, b"1" * 5000, b"0x1", b"NaN", b"-Infinity", b"1e-999", b"01"])
_strange = st.one_of(
    st.builds(lambda number: b'{"model":"lexical","input":"a","dimensions":%b}' % number, _numbers),
    st.builds(lambda number: b'{"model":"lexical","input":[%b]}' % number, _numbers),
    st.builds(lambda depth, opening: opening * depth, st.integers(1, 3000), st.sampled_from([b"[", b'{"a":'])),
    st.sampled_from(['{"model":"lexical","input":"a"}'.encode(codec) for codec in ("utf-16", "utf-32", "utf-8-sig")]),
    st.builds(lambda size: b'{"model":"lexical","input":"' + b"a" * size + b'"}', st.integers(60_000, 70_000)),
    st.just(b""),
)  # fmt: skip


bodies = st.one_of(*[_good_json] * 6, _json, _json, _any_json, st.binary(max_size=100), _strange)

# --- headers ------------------------------------------------------------------------------------------------

_TOKEN = "abcdefghijklmnopqrstuvwxyzABCXYZ0123456789!#$%&'*+-.^_`|~"
_names = st.text(_TOKEN, min_size=1, max_size=10).map(str.encode).filter(
    lambda name: name.lower() not in (b"host", b"content-length", b"transfer-encoding", b"connection", b"expect")
)  # fmt: skip
_line = st.binary(max_size=24).map(lambda value: bytes(byte for byte in value if byte not in b"\r\n"))
_KNOWN = (
    b"Content-Type: text/plain", b"Content-Type: application/json; charset=utf-16", b"Content-Type:",
    b"Content-Encoding: gzip", b"Content-Encoding: identity", b"Accept: text/html", b"Accept-Encoding: br;q=2",
    b"Cache-Control: no-cache", b"Cache-Control: no-store, no-cache", b"Cache-Control: ,,=", b"X-Request-Id: mine",
    b"X-Request-Id: " + b"x" * 200, b"X-Request-Id: \xff\x00", b"Cookie: a=b; c", b"Range: bytes=0-1", b"Te: trailers",
    b"Upgrade: h2c", b"Upgrade: websocket", b"Origin: null", b"Forwarded: for=x", b"X-Forwarded-For: 1.2.3.4",
    b"Authorization: Bearer", b"Authorization: Basic YTpi", b"Authorization: \xe9", b"api-key: other", b"Trailer: x",
    b"Connection: keep-alive", b"Connection: close", b"Connection: upgrade", b"Expect: 100-continue", b"Expect: x",
    b"If-None-Match: *", b"Access-Control-Request-Method: POST", b"X: " + b"y" * 9000, b"traceparent: 00-0-0-0",
)  # fmt: skip
_odd_headers = st.lists(
    st.sampled_from(_KNOWN) | st.builds(lambda name, value: name + b": " + value, _names, _line), max_size=4
)
_AUTHORIZATIONS = (*[f"Authorization: Bearer {KEY}".encode()] * 12, f"api-key: {KEY}".encode(), b"A: b")
_authorization = st.sampled_from(_AUTHORIZATIONS)

_PATHS = (
    b"/v1/embeddings",
    b"/embeddings",
    b"/v1/embeddings/",
    b"/openai/v1/embeddings",
    b"/v1/engines/lexical/embeddings",
)
_OTHER_PATHS = (
    b"/v1/embeddings?api-version=1&a=%00", b"//v1/embeddings", b"/v1/models", b"/v1/models/lexical", b"/readyz",
    b"/healthz", b"/v1/models/%ff", b"/v1/models/..%2f", b"/openai/deployments/lexical/embeddings?x",
    b"/v1/completions", b"/", b"*", b"http://gateway/v1/embeddings", b"/%", b"/v1/engines/%0d%0aa/embeddings",
)  # fmt: skip
_safe = st.binary(max_size=12).map(lambda value: bytes(byte for byte in value if 0x21 <= byte <= 0x7E))
_targets = st.one_of(
    *[st.sampled_from(_PATHS)] * 8, st.sampled_from(_OTHER_PATHS),
    _safe.map(lambda rest: b"/" + rest), _safe.map(lambda rest: b"/v1/engines/" + rest + b"/embeddings"),
)  # fmt: skip
_METHODS = (*[b"POST"] * 20, b"GET", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"HEAD", b"PROPFIND")
_methods = st.sampled_from(_METHODS)

# --- framing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """A request before it is framed; `lines` are its headers except Host and those of the body's length."""

    method: bytes
    target: bytes
    lines: tuple[bytes, ...]
    body: bytes


parts = st.builds(
    lambda method, target, authorization, lines, body: Parts(method, target, (authorization, *lines), body),
    _methods, _targets, _authorization, _odd_headers, bodies,
)  # fmt: skip


def variants(request: Parts, seed: int, count: int) -> Iterator[Case]:
    """Yields `count` similar cases: the request as it is, then with its body, its head or its framing altered.

    Hypothesis makes the first; plain random numbers make the rest, because they are a hundred times as fast.
    """
    rng = random.Random(seed)
    yield _whole(request, rng)
    for _ in range(count - 1):
        kind = rng.randrange(8)
        if kind < 5:
            yield _whole(replace(request, body=_mutated(request.body, rng)), rng)
        elif kind < 7:
            yield _whole(_altered_head(request, rng), rng)
        else:
            yield Case(_broken(_whole(request, rng).data, rng), whole=False)


_PIECES = (
    b'"', b"\\u", b"{", b"}", b"[", b"]", b",", b":", b"\\ud800", b"\0", b"null", b"true", b"NaN", b"1e400", b"-1",
    b"0.5", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"9" * 30, b'""', b"[]", b"{}", b'"model"', b'"input":', b"[[[[",
    b" " * 9,
)  # fmt: skip
_TOKEN_OF_JSON = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9.eE+]+|true|false|null|[\[\]{}]')


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes as a bad network or a bad program may alter them."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(data))
        size = rng.randint(0, 8)
        match rng.randrange(5):
            case 0:
                data = data[:at] + rng.choice(_PIECES) + data[at + size :]
            case 1:
                data = data[:at] + rng.randbytes(rng.randint(0, 4)) + data[at + size :]
            case 2:
                data = data[:at] + data[at : at + size] * rng.randint(0, 3) + data[at + size :]
            case 3 if found := list(_TOKEN_OF_JSON.finditer(data[:4000])):
                token, other = rng.choice(found), rng.choice(found)
                data = data[: token.start()] + rng.choice((other[0], rng.choice(_PIECES))) + data[token.end() :]
            case _:
                data = data[:at] if rng.random() < 0.2 else data[:at] + data[at + 1 :]
    return data


def _altered_head(request: Parts, rng: random.Random) -> Parts:
    lines = list(request.lines)
    match rng.randrange(4):
        case 0:
            lines.append(rng.choice(_KNOWN))
        case 1:
            value = bytes(byte for byte in rng.randbytes(rng.randint(0, 40)) if byte not in b"\r\n")
            lines.append(b"X-" + bytes(rng.choices(_TOKEN.encode(), k=rng.randint(1, 8))) + b": " + value)
        case 2:
            lines[0] = rng.choice(_AUTHORIZATIONS)
        case _:
            target = request.target.replace(
                b"embeddings", rng.choice((b"embedding%73", b"embeddings/", b"EMBEDDINGS", b"x"))
            )
            return replace(request, target=target, method=rng.choice(_METHODS))
    return replace(request, lines=tuple(lines))


def _whole(request: Parts, rng: random.Random) -> Case:
    """Frames it by its length or in chunks, so that it must be answered."""
    body, lines = request.body, list(request.lines)
    if rng.randrange(4):
        lines.append(b"Content-Length: %d" % len(body))
    else:
        lines.append(b"Transfer-Encoding: chunked")
        body = _chunked(body, rng)
    head = b"\r\n".join([request.method + b" " + request.target + b" HTTP/1.1", b"Host: gateway", *lines])
    return Case(head + b"\r\n\r\n" + body, whole=True, head_only=request.method == b"HEAD")


def _chunked(body: bytes, rng: random.Random) -> bytes:
    chunks = b""
    while body:
        size = min(len(body), rng.choice((1, 7, 100, 10**6)))
        chunks += b"%x" % size + rng.choice((b"", b"", b";a=b", b';a="b"')) + b"\r\n" + body[:size] + b"\r\n"
        body = body[size:] if len(chunks) < 2000 else b""
    return chunks + b"0\r\n" + rng.choice((b"", b"", b"X-Trailer: y\r\n")) + b"\r\n"


def _broken(data: bytes, rng: random.Random) -> bytes:
    """Damages the framing: the bytes may be one request, part of one, or several."""
    data = _torn(data, rng) if rng.randrange(2) else _misframed(data, rng)
    for _ in range(rng.randint(0, 2)):
        at = rng.randint(0, len(data))
        data = data[:at] + rng.randbytes(rng.randint(0, 3)) + data[at + rng.randint(0, 3) :]
    return data


def _torn(data: bytes, rng: random.Random) -> bytes:
    match rng.randrange(5):
        case 0:
            return data[: rng.randint(0, len(data))]
        case 1:
            return data + data
        case 2:
            return data.replace(b"\r\n", b"\n", rng.randint(1, 4))
        case 3:
            return rng.randbytes(rng.randint(0, 64)) + data
        case _:
            return rng.randbytes(rng.randint(0, 200))


def _misframed(data: bytes, rng: random.Random) -> bytes:
    match rng.randrange(5):
        case 0:
            number = rng.choice((b"-", b"+", b"0x", b"9"))
            return data.replace(b"Content-Length: ", b"Content-Length: " + number)
        case 1:
            return data.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n", 1)
        case 2:
            return data.replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n", 1)
        case 3:
            return data.replace(b"HTTP/1.1", rng.choice((b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"", b"http/1.1")))
        case _:
            host = rng.choice((b"Host: a\r\nHost: b", b"X: y", b"Host: a b", b"Host"))
            return data.replace(b"Host: gateway", host)
