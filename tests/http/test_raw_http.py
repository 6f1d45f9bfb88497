"""HTTP written by hand: smuggling, odd targets, methods, pipelining, and connections that outlive an error."""

from __future__ import annotations

import gzip
import re
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

import orjson
import pytest

from tests.api.support import MODEL, RawReply, config, error_of, head, post, raw, wire
from tests.clock import settle
from tests.fakes import FakeOpenAI
from tests.harness import Running, running

KEY = "canary-key-0123456789"
AUTH = f"Authorization: Bearer {KEY}"
GOOD = {"model": MODEL, "input": "good"}
SLASHED, COLONED, CHINESE = "BAAI/bge-m3", "nomic:v1.5", "文本向量"
HOSTILE = "x\r\nset-cookie: a=1"
MODELS = {MODEL: 1536, SLASHED: 8, COLONED: 8, CHINESE: 8, HOSTILE: 8}


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(models=MODELS) as fake:
        yield fake


@pytest.fixture(scope="module")
def gateway(upstream: FakeOpenAI) -> Iterator[Running]:
    with running(config(upstream, auth={"keys": {"team": {"key": KEY}}}, server={"max_body": "64KiB"})) as gateway:
        yield gateway


@pytest.fixture
def fake(upstream: FakeOpenAI) -> FakeOpenAI:
    upstream.reset()
    return upstream


def answers(url: str, data: bytes) -> list[RawReply]:
    """All responses to these bytes until the server closes the connection, which it must."""
    replies = []
    with wire(url) as connection:
        connection.send(data)
        while (reply := connection.reply()) is not None:
            replies.append(reply)
            if reply.headers.get("connection") == "close":
                connection.done()
    return replies


def must_raw(url: str, data: bytes) -> RawReply:
    reply = raw(url, data)
    assert reply is not None
    return reply


# --- where one request ends and the next begins --------------------------------------------------------------

SMUGGLED = post({"model": MODEL, "input": "smuggled"}, AUTH)
"""A valid request in place of a body: a server that loses count of the bytes answers it."""

TRANSFER_ENCODINGS = [
    "Transfer-Encoding: chunked",
    "Transfer-Encoding:\tchunked",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: identity",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "Transfer-Encoding : chunked",
    " Transfer-Encoding: chunked",
    "X: y\nTransfer-Encoding: chunked",
    "X: y\r\n Transfer-Encoding: chunked",
]


@pytest.mark.parametrize("encoding", TRANSFER_ENCODINGS)
@pytest.mark.parametrize("length_first", [True, False])
def test_a_request_with_two_lengths_smuggles_nothing(
    encoding: str, length_first: bool, fake: FakeOpenAI, gateway: Running
) -> None:
    body = b"0\r\n\r\n" + SMUGGLED
    lengths = [f"Content-Length: {len(body)}", encoding]
    last = "Connection: close"  # so that a server that takes it for one request closes as well
    said = answers(
        gateway.url, head("POST", "/v1/embeddings", AUTH, *(lengths if length_first else lengths[::-1]), last) + body
    )
    assert [reply.status_code for reply in said] == [400]
    assert said[0].headers["connection"] == "close"
    assert not fake.calls


@pytest.mark.parametrize(
    "length",
    [
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5, 5",
        "Content-Length: +5",
        "Content-Length: -1",
        "Content-Length: 0x5",
        "Content-Length: 5 5",
        "Content-Length:",
        "Content-Length: " + "9" * 5000,
        "Content-Length: 18446744073709551617",
    ],
)
def test_a_length_that_is_no_number_is_a_400_and_the_end(length: str, fake: FakeOpenAI, gateway: Running) -> None:
    said = answers(gateway.url, head("POST", "/v1/embeddings", AUTH, length) + b"{}   " + SMUGGLED)
    assert [reply.status_code for reply in said] == [400]
    assert said[0].headers["connection"] == "close"
    assert not fake.calls


BODY = orjson.dumps(GOOD)
SIZE = b"%x" % len(BODY)


@pytest.mark.parametrize(("size", "status"), [(len(BODY), 200), (0, 400), (2**16 + 1, 413)])
def test_zeros_before_a_length_do_not_alter_it(size: int, status: int, fake: FakeOpenAI, gateway: Running) -> None:
    """However many there are: Python's `int` refuses more than 4,300 digits."""
    length = f"Content-Length: {size:05000}"
    with wire(gateway.url) as connection:
        connection.send(head("POST", "/v1/embeddings", AUTH, length) + BODY[:size])
        assert connection.must_reply().status_code == status


@pytest.mark.parametrize("space", [" ", "\t", " \t "])
def test_white_space_behind_a_header_is_no_part_of_it(space: str, fake: FakeOpenAI, gateway: Running) -> None:
    lines = ["Host: gateway", AUTH, "X-Request-ID: mine", f"Content-Length: {len(BODY)}"]
    written = "".join(f"{line}{space}\r\n" for line in lines)
    reply = must_raw(gateway.url, f"POST /v1/embeddings HTTP/1.1\r\n{written}\r\n".encode() + BODY)
    assert (reply.status_code, reply.headers.get("x-request-id")) == (200, "mine")
    too_large = f"Content-Length: {2**16 + 1}{space}"
    assert must_raw(gateway.url, head("POST", "/v1/embeddings", AUTH, too_large)).status_code == 413


@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"-1\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"0x" + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
        SIZE + b" \r\n" + BODY + b"\r\n0\r\n\r\n",
        SIZE + b"\r\n" + BODY + b"0\r\n\r\n",
        SIZE + b"\r\n" + BODY + b"XX0\r\n\r\n",
        SIZE + b"\n" + BODY + b"\n0\n\n",
        b"fffffffffffffffff\r\n" + BODY,
        b"1\r\n" + BODY + b"\r\n0\r\n\r\n",
    ],
)
def test_a_bad_chunk_is_a_400_and_the_end(chunks: bytes, fake: FakeOpenAI, gateway: Running) -> None:
    said = answers(gateway.url, head("POST", "/v1/embeddings", AUTH, "Transfer-Encoding: chunked") + chunks + SMUGGLED)
    assert [reply.status_code for reply in said] == [400]
    assert said[0].headers["connection"] == "close"
    assert not fake.calls


@pytest.mark.parametrize(
    "chunks",
    [
        SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"000" + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
        SIZE + b";name=value\r\n" + BODY + b"\r\n0\r\n\r\n",
        SIZE + b"\r\n" + BODY + b"\r\n0\r\nX-Trailer: 1\r\n\r\n",
        b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n",
    ],
)
def test_good_chunks_of_any_size_are_a_body(chunks: bytes, fake: FakeOpenAI, gateway: Running) -> None:
    reply = must_raw(gateway.url, head("POST", "/v1/embeddings", AUTH, "Transfer-Encoding: chunked") + chunks)
    assert reply.status_code == 200
    assert [call.texts for call in fake.calls] == [["good"]]


@pytest.mark.parametrize(
    "coding",
    [
        "gzip, chunked",
        "GZIP,chunked",
        "x, identity, chunked",
        "gzip;q=1, chunked",
        "gzip\r\nTransfer-Encoding: chunked",
    ],
)
def test_a_body_that_is_compressed_for_its_transfer_is_a_415(coding: str, fake: FakeOpenAI, gateway: Running) -> None:
    body = gzip.compress(BODY)
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    (reply,) = answers(gateway.url, head("POST", "/v1/embeddings", AUTH, f"Transfer-Encoding: {coding}") + chunks)
    assert reply.status_code == 415
    assert error_of(reply)["code"] == "unsupported_encoding"
    assert reply.headers["connection"] == "close"
    assert not fake.calls


@pytest.mark.parametrize("coding", ["gzip", "gzip\r\nContent-Encoding: identity", "identity\r\nContent-Encoding: gzip"])
def test_a_compressed_body_is_a_415_in_whichever_line_it_says_so(
    coding: str, fake: FakeOpenAI, gateway: Running
) -> None:
    (reply,) = answers(gateway.url, post(gzip.compress(BODY), AUTH, f"Content-Encoding: {coding}"))
    assert (reply.status_code, error_of(reply)["code"]) == (415, "unsupported_encoding")
    assert not fake.calls


@pytest.mark.parametrize("coding", ["Chunked", "identity, chunked", ", chunked"])
def test_one_that_is_not_is_read(coding: str, fake: FakeOpenAI, gateway: Running) -> None:
    chunks = SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n"
    reply = must_raw(gateway.url, head("POST", "/v1/embeddings", AUTH, f"Transfer-Encoding: {coding}") + chunks)
    assert reply.status_code == 200
    assert len(fake.calls) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        post(GOOD, AUTH).replace(b"HTTP/1.1", b"HTTP/2.0"),
        post(GOOD, AUTH).replace(b"HTTP/1.1", b"HTTP/0.9"),
        b"nonsense\r\n\r\n",
        head("BREW", "/v1/embeddings"),
        post(GOOD, AUTH, target="/v1/embeddings\xff"),
        post(GOOD, AUTH, target="/v1/engines/" + "a" * 70_000 + "/embeddings"),
        post(GOOD, AUTH, "X: a\0b"),
        post(GOOD, AUTH, "X : y"),
    ],
    ids=["HTTP/2", "2.0", "0.9", "nonsense", "method", "byte in path", "long path", "null byte", "space before colon"],
)
def test_what_is_not_http_is_a_400_and_the_end(data: bytes, fake: FakeOpenAI, gateway: Running) -> None:
    said = answers(gateway.url, data)
    assert [reply.status_code for reply in said] == [400]
    assert error_of(said[0])["code"] == "invalid_http"
    assert not fake.calls


OWN = "X-Request-Id: my-own"
CHUNKED = "Transfer-Encoding: chunked"


@pytest.mark.parametrize(
    ("data", "own"),
    [
        (head("POST", "/v1/embeddings", AUTH, OWN, CHUNKED) + b"zz\r\n", True),
        (head("POST", "/v1/embeddings", AUTH, OWN, CHUNKED) + b"1\r\n{\r\nzz\r\n", True),
        (head("GET", "/v1/models", OWN, "Host: another"), True),
        (head("POST", "/v1/embeddings", AUTH, "X-Request-Id: my own", CHUNKED) + b"zz\r\n", False),
        (head("POST", "/v1/embeddings", AUTH, CHUNKED) + b"0\r\nX-Request-Id: my-own\r\nX y\r\n\r\n", False),
        (b"nonsense\r\nX-Request-Id: my-own\r\n\r\n", False),
        (b"\x16\x03\x01", False),
    ],
    ids=["chunk", "a later chunk", "two hosts", "an id that is none", "an id in trailers", "nonsense", "TLS"],
)
@pytest.mark.parametrize("before", [b"", head("GET", "/healthz", "X-Request-Id: of-another")], ids=["alone", "behind"])
def test_what_is_refused_as_no_http_has_its_request_id(before: bytes, data: bytes, own: bool, gateway: Running) -> None:
    with wire(gateway.url) as connection:
        if before:
            connection.send(before)
            assert connection.must_reply().headers["x-request-id"] == "of-another"
        connection.send(data)
        reply = connection.must_reply()
    assert error_of(reply)["code"] == "invalid_http"
    told = reply.headers["x-request-id"]
    assert told == "my-own" if own else re.fullmatch("req_[0-9a-f]{24}", told)


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET /healthz HTTP/1.1\nHost: x\n\n"],
    ids=["TLS", "bare LF"],
)
def test_what_can_never_become_a_head_is_refused_at_once(data: bytes, gateway: Running) -> None:
    with wire(gateway.url) as connection:
        connection.socket.settimeout(1)
        connection.send(data)
        assert connection.must_reply().status_code == 400


# --- authentication, whatever else the head contains -----------------------------------------------------------

OPEN_PATHS = ["/healthz", "/readyz", "/metrics", "/docs"]


@pytest.mark.parametrize("host", [*(f"gateway{path}?" for path in OPEN_PATHS), "evil/healthz#", "", "a\\b@c", "[::1"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", "/v1/embeddings")])
def test_no_host_header_opens_a_route_that_needs_a_key(
    method: str, path: str, host: str, fake: FakeOpenAI, gateway: Running
) -> None:
    data = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY
    reply = must_raw(gateway.url, data)
    assert reply.status_code in (400, 401)
    assert "location" not in reply.headers
    assert not fake.calls


@pytest.mark.parametrize(
    "lines",
    [
        ["X-Original-URL: /healthz"],
        ["X-Rewrite-URL: /healthz"],
        ["X-Forwarded-Path: /healthz", "X-Forwarded-Prefix: /healthz", "X-Forwarded-For: 127.0.0.1"],
        ["X-HTTP-Method-Override: GET"],
    ],
)
def test_no_header_of_a_proxy_opens_a_route_that_needs_a_key(
    lines: list[str], fake: FakeOpenAI, gateway: Running
) -> None:
    assert must_raw(gateway.url, post(GOOD, *lines)).status_code == 401
    assert must_raw(gateway.url, head("GET", "/v1/models", *lines)).status_code == 401
    assert not fake.calls


@pytest.mark.parametrize(
    "target",
    [
        "http://evil/v1/embeddings",
        "http://evil/healthz/../v1/embeddings",
        "//evil/v1/embeddings",
        "/v1/embeddings?x=/healthz",
        "/v1/embeddings#/healthz",
        "/healthz/../v1/embeddings",
        "/healthz/%2e%2e/v1/embeddings",
        "/healthz%2f..%2fv1/embeddings",
        "/v1//embeddings",
        "//v1/embeddings",
        "/%76%31/embeddings",
        "/v1/embeddings;x",
        "/v1/embeddings%00",
        "/v1/embeddings%0a",
        "/v1/embeddings%3f",
        "/V1/EMBEDDINGS",
        "/v1/engines//embeddings",
        "/v1/engines/../embeddings",
        "/v1/engines/%0a/embeddings",
        "*",
    ],
)
def test_no_spelling_of_the_target_reaches_an_upstream_without_a_key(
    target: str, fake: FakeOpenAI, gateway: Running
) -> None:
    reply = must_raw(gateway.url, post(GOOD, target=target))
    assert reply.status_code in (401, 404)
    error_of(reply)
    assert not fake.calls


# --- methods and slashes ------------------------------------------------------------------------------------------

EMBEDDING_PATHS = [
    "/v1/embeddings", "/v1/embeddings/", "/embeddings", "/embeddings/", "/openai/v1/embeddings",
    f"/v1/engines/{MODEL}/embeddings", f"/v1/engines/{MODEL}/embeddings/", f"/openai/deployments/{MODEL}/embeddings",
]  # fmt: skip


@pytest.mark.parametrize("path", EMBEDDING_PATHS)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_on_the_embeddings_route_are_a_405_that_says_what_to_use(
    method: str, path: str, fake: FakeOpenAI, gateway: Running
) -> None:
    reply = must_raw(gateway.url, head(method, path, AUTH))
    assert reply.status_code == 405
    assert reply.headers["allow"] == "POST"
    error = error_of(reply)
    assert (error["code"], error["type"], error["param"]) == ("method_not_allowed", "invalid_request_error", None)
    assert method in error["message"]
    assert not fake.calls


@pytest.mark.parametrize("path", EMBEDDING_PATHS)
def test_head_on_the_embeddings_route_is_a_405_without_a_body(path: str, gateway: Running) -> None:
    with wire(gateway.url) as connection:
        connection.send(head("HEAD", path, AUTH) + head("GET", "/healthz"))
        first = connection.reply(head_only=True)
        assert first is not None
        assert first.status_code == 405
        assert first.headers["allow"] == "POST"
        assert connection.must_reply().content == b'{"status":"ok"}'


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models", f"/v1/models/{MODEL}", "/metrics", "/docs"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_on_other_routes_are_a_405_in_the_same_shape(method: str, path: str, gateway: Running) -> None:
    reply = must_raw(gateway.url, head(method, path, AUTH))
    assert reply.status_code == 405
    assert "GET" in reply.headers["allow"]
    assert error_of(reply)["code"] == "method_not_allowed"


ROUTES = [
    "/", "/v1", *EMBEDDING_PATHS, "/v1/models", "/models", "/openai/v1/models", f"/v1/models/{MODEL}", "/healthz",
    "/readyz", "/metrics", "/docs", "/openapi.json", "/static-offline-docs", "/docs/oauth2-redirect", "/no/such/route",
]  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_route_redirects_with_or_without_a_trailing_slash(method: str, route: str, gateway: Running) -> None:
    for path in (route, route.rstrip("/") + "/", route.rstrip("/") + "//"):
        reply = must_raw(gateway.url, post(GOOD, AUTH, target=path) if method == "POST" else head(method, path, AUTH))
        assert reply.status_code in (200, 404, 405), path
        assert "location" not in reply.headers
        if reply.status_code != 200:
            error_of(reply)


# --- names in paths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "model"),
    [
        ("BAAI%2Fbge-m3", SLASHED),
        ("BAAI%2fbge-m3", SLASHED),
        ("BAAI/bge-m3", SLASHED),
        ("up%2FBAAI%2Fbge-m3", SLASHED),
        ("up/BAAI/bge-m3", SLASHED),
        ("nomic%3Av1.5", COLONED),
        ("nomic:v1.5", COLONED),
        ("%E6%96%87%E6%9C%AC%E5%90%91%E9%87%8F", CHINESE),
        ("%74ext-embedding-3-small", MODEL),
    ],
)
def test_a_name_in_the_path_may_be_percent_encoded(
    written: str, model: str, fake: FakeOpenAI, gateway: Running
) -> None:
    for path in (
        f"/v1/engines/{written}/embeddings",
        f"/openai/deployments/{written}/embeddings?api-version=2024-02-01",
    ):
        reply = must_raw(gateway.url, post({"input": "hi"}, AUTH, target=path))
        assert reply.status_code == 200, reply.content
        assert fake.calls[-1].json["model"] == model
    reply = must_raw(gateway.url, head("GET", f"/v1/models/{written}", AUTH))
    assert reply.status_code == 200
    assert orjson.loads(reply.content)["upstreams"] == [f"up/{model}"]


@pytest.mark.parametrize(
    "written",
    ["%ff", "%00", "%zz", "%", "..", "../..", "%2e%2e", "a%0d%0aset-cookie:%20a=1", "%F0%9F%99%82", "a" * 9000],
)
def test_a_name_in_the_path_that_no_model_has_is_a_404(written: str, fake: FakeOpenAI, gateway: Running) -> None:
    for data in (
        post({"input": "hi"}, AUTH, target=f"/v1/engines/{written}/embeddings"),
        post({"input": "hi"}, AUTH, target=f"/openai/deployments/{written}/embeddings"),
        head("GET", f"/v1/models/{written}", AUTH),
    ):
        reply = must_raw(gateway.url, data)
        assert reply.status_code == 404
        assert len(error_of(reply)["message"]) < 1000
        assert "set-cookie" not in reply.headers
    assert not fake.calls


def test_a_name_that_an_upstream_made_up_cannot_write_headers(fake: FakeOpenAI, gateway: Running) -> None:
    reply = must_raw(gateway.url, post({"model": HOSTILE, "input": "hi"}, AUTH))
    assert reply.status_code == 200
    assert "set-cookie" not in reply.headers
    assert reply.headers["x-embedding-upstream"] == "up/x%0D%0Aset-cookie: a%3D1"
    assert orjson.loads(reply.content)["model"] == HOSTILE
    assert len(fake.calls) == 1


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/static-offline-docs/../../../../etc/passwd",
        "/static-offline-docs/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/static-offline-docs/%2e%2e/%2e%2e/etc/passwd",
        "/static-offline-docs//etc/passwd",
        "/static-offline-docs/%00",
        "/static-offline-docs/..%5c..%5cetc",
        "/static-offline-docs/" + "a" * 5000,
        "/static-offline-docs/.",
        "/docs/../../etc/passwd",
    ],
)
def test_no_path_leads_out_of_the_assets(path: str, gateway: Running) -> None:
    reply = must_raw(gateway.url, head("GET", path))
    assert reply.status_code == 404
    assert b"root:" not in reply.content
    assert error_of(reply)["code"] == "not_found"


# --- one connection, several requests ---------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_their_order(fake: FakeOpenAI, gateway: Running) -> None:
    texts = [f"pipelined {i}" for i in range(5)]
    requests = [post({"model": MODEL, "input": text, "dimensions": 8}, AUTH) for text in texts]
    bad = post({"model": MODEL, "input": ""}, AUTH)
    with wire(gateway.url) as connection:
        connection.send(b"".join([*requests[:3], bad, head("GET", "/healthz"), *requests[3:]]))
        replies = [connection.must_reply() for _ in range(7)]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 400, 200, 200, 200]
    answered = [orjson.loads(reply.content) for i, reply in enumerate(replies) if i not in (3, 4)]
    for text, answer in zip(texts, answered, strict=True):
        assert answer["data"][0]["embedding"] == pytest.approx(fake.expected(MODEL, text, 8).tolist())


def test_nothing_begins_behind_an_answer_that_is_the_last_on_its_connection(fake: FakeOpenAI, gateway: Running) -> None:
    last = post({"model": MODEL, "input": "the last", "dimensions": 8}, AUTH, "Connection: close")
    behind = post({"model": MODEL, "input": "behind it", "dimensions": 8}, AUTH)
    with wire(gateway.url) as connection:
        connection.send(last + behind)
        assert connection.must_reply().status_code == 200
        assert connection.reply() is None
    assert [text for call in fake.calls for text in call.texts if text == "behind it"] == []


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (post(b"{", AUTH), 400),
        (post(b"", AUTH), 400),
        (post(b"\xff" * 60_000, AUTH), 400),
        (post({"model": MODEL, "input": ""}, AUTH), 400),
        (post({"model": "unknown", "input": "a"}, AUTH), 404),
        (post(GOOD, AUTH, target="/no/such/route"), 404),
        (post(b"x" * 200_000, AUTH, target="/no/such/route"), 404),
        (head("GET", "/v1/embeddings"), 405),
        (head("PUT", "/v1/embeddings", "Content-Length: 3") + b"abc", 405),
        (head("PUT", "/v1/embeddings", "Content-Length: 200000") + b"x" * 200_000, 405),
        (head("GET", "/v1/models"), 401),
        (head("GET", f"/v1/models/{MODEL}x", AUTH), 404),
    ],
)
def test_a_connection_lives_on_after_an_error_whose_request_was_read(
    bad: bytes, status: int, fake: FakeOpenAI, gateway: Running
) -> None:
    with wire(gateway.url) as connection:
        for _ in range(3):
            connection.send(bad)
            reply = connection.must_reply()
            assert reply.status_code == status
            assert "connection" not in reply.headers
            assert ("allow" in reply.headers) == (status == 405)
            error_of(reply)
        connection.send(post(GOOD, AUTH))
        assert connection.must_reply().status_code == 200
    assert len(fake.calls) == 1


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (post(GOOD), 401),
        (post(GOOD, "Authorization: Bearer wrong"), 401),
        (post(b"x" * 70_000, AUTH), 413),
        (post(GOOD, AUTH, "Content-Encoding: gzip"), 415),
    ],
)
def test_a_connection_is_closed_after_an_error_whose_body_was_not_read(
    bad: bytes, status: int, fake: FakeOpenAI, gateway: Running
) -> None:
    said = answers(gateway.url, bad + SMUGGLED)
    assert [reply.status_code for reply in said] == [status]
    assert said[0].headers["connection"] == "close"
    assert "allow" not in said[0].headers
    error_of(said[0])
    assert not fake.calls


def test_http_1_0_is_answered_and_closed(fake: FakeOpenAI, gateway: Running) -> None:
    data = post(GOOD, AUTH).replace(b"HTTP/1.1", b"HTTP/1.0")
    assert [reply.status_code for reply in answers(gateway.url, data)] == [200]
    assert len(fake.calls) == 1


# --- 100-continue -------------------------------------------------------------------------------------------------


def test_a_caller_that_asks_first_is_told_to_go_on(fake: FakeOpenAI, gateway: Running) -> None:
    with wire(gateway.url) as connection:
        length = f"Content-Length: {len(BODY)}"
        connection.send(head("POST", "/v1/embeddings", AUTH, "Expect: 100-continue", length))
        assert connection.must_reply().status_code == 100
        connection.send(BODY)
        assert connection.must_reply().status_code == 200
    assert len(fake.calls) == 1


def test_with_http_1_0_nobody_asks(fake: FakeOpenAI, gateway: Running) -> None:
    asks = post(GOOD, AUTH, "Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0")
    with wire(gateway.url) as connection:
        connection.send(asks[: -len(BODY)])
        gateway.call(settle())  # so that the head is read separately
        connection.send(BODY)
        assert connection.must_reply().status_code == 200
    assert len(fake.calls) == 1


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([AUTH, "Content-Length: 10000000"], 413),
        ([AUTH, "Content-Length: 100", "Content-Encoding: gzip"], 415),
        (["Content-Length: 100"], 401),
    ],
)
def test_a_caller_that_asks_first_is_refused_before_it_has_sent_the_body(
    lines: list[str], status: int, fake: FakeOpenAI, gateway: Running
) -> None:
    said = answers(gateway.url, head("POST", "/v1/embeddings", "Expect: 100-continue", *lines))
    assert [reply.status_code for reply in said] == [status]
    assert said[0].headers["connection"] == "close"
    assert not fake.calls


def test_an_offer_to_upgrade_to_http_2_is_ignored(fake: FakeOpenAI, gateway: Running) -> None:
    upgrade = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"]
    assert must_raw(gateway.url, post(GOOD, AUTH, *upgrade)).status_code == 200
    assert len(fake.calls) == 1


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (post(GOOD, AUTH), 200),
        (post(GOOD), 401),
        (post({"model": MODEL}, AUTH), 400),
        (head("GET", "/v1/models", AUTH), 200),
        (head("GET", "/nowhere"), 404),
        (b"no HTTP\r\n\r\n", 400),
    ],
)
def test_every_response_has_its_date(asked: bytes, status: int, gateway: Running) -> None:
    """RFC 9110 6.6.1: a server with a clock MUST send it."""
    reply = must_raw(gateway.url, asked)
    assert reply.status_code == status
    assert abs(parsedate_to_datetime(reply.headers["date"]).timestamp() - time.time()) < 5
