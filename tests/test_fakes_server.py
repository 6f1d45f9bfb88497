"""The fakes behave on the wire as documented: faults, gate, order, limits and signatures."""

import asyncio
import http.client
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests.fakes import (
    BadSignature,
    FakeBaidu,
    FakeDashScope,
    FakeGemini,
    FakeOllama,
    FakeOpenAI,
    FakeUpstream,
    baidu_tokens,
    cut,
    faults,
    unused_url,
    vector,
    verify,
)
from tests.fakes.bce_signature import canonical_request

MODEL = "text-embedding-3-small"
TEXTS = ["a", "b", "c"]


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as server:
        yield server


def post(
    server: FakeUpstream,
    texts: Any = None,
    *,
    path: str = "/v1/embeddings",
    key: str = "sk-fake",
    body: Any = None,
    connection: http.client.HTTPConnection | None = None,
) -> tuple[int, bytes, http.client.HTTPMessage]:
    """Send one call and read the whole answer; a connection passed in stays open."""
    used = connection or http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=5)
    content = json.dumps(body or {"model": MODEL, "input": texts or TEXTS, "dimensions": 8})
    try:
        used.request("POST", path, content, {"Authorization": f"Bearer {key}"})
        answer = used.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        if connection is None:
            used.close()


def rows(server: FakeUpstream, texts: Any = None) -> list[Any]:
    """Return the `data` of one successful call."""
    data: list[Any] = json.loads(post(server, texts)[1])["data"]
    return data


def raw(server: FakeUpstream) -> socket.socket:
    """Send one call on a bare socket, to see exactly what comes back."""
    body = json.dumps({"model": MODEL, "input": TEXTS}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    host, port = urlsplit(server.url).netloc.split(":")
    sock = socket.create_connection((host, int(port)), timeout=5)
    sock.sendall(f"{head}Authorization: Bearer sk-fake\r\n\r\n".encode() + body)
    return sock


def read_all(sock: socket.socket) -> tuple[bytes, bool]:
    """Return what is received until the end, and whether the end was a reset."""
    seen = b""
    with sock:
        while True:
            try:
                more = sock.recv(65536)
            except ConnectionResetError:
                return seen, True
            if not more:
                return seen, False
            seen += more


# --- vectors and order ---------------------------------------------------------------------


def test_vectors_have_unit_length_and_depend_on_everything() -> None:
    plain = vector("m", "t", 16)
    assert plain.dtype == np.float32
    assert float(np.linalg.norm(plain)) == pytest.approx(1.0)
    assert (plain == vector("m", "t", 16, role=None)).all()
    others = [vector("n", "t", 16), vector("m", "u", 16), vector("m", "t", 16, role="query")]
    assert not any((plain == other).any() for other in others)
    assert not (plain[:8] == vector("m", "t", 8)).any()
    assert float(np.linalg.norm(cut(plain, 4))) == pytest.approx(1.0)


def test_rows_come_out_of_order_with_their_right_index(fake: FakeOpenAI) -> None:
    for count in (2, 3, 10):
        texts = [f"text {number}" for number in range(count)]
        data = rows(fake, texts)
        assert [row["index"] for row in data] != list(range(count))
        for row in data:
            wanted = fake.expected(MODEL, texts[row["index"]], 8)
            assert (np.asarray(row["embedding"], dtype=np.float32) == wanted).all()


def test_calls_are_recorded_with_what_they_cost(fake: FakeOpenAI) -> None:
    post(fake, ["abcd", "abcde"])
    post(fake, ["x"], key="sk-wrong")
    good, bad = fake.calls
    assert (good.method, good.path, good.status, good.rows) == ("POST", "/v1/embeddings", 200, 2)
    assert good.texts == ["abcd", "abcde"]
    assert good.json["model"] == MODEL
    assert (good.billed, bad.billed, bad.status) == (3, 0, 401)
    assert (fake.billed_tokens, fake.rows) == (3, 2)
    fake.reset()
    assert (fake.calls, fake.billed_tokens) == ([], 0)


def test_baidu_counts_han_characters_and_words() -> None:
    assert baidu_tokens("推荐一些美食") + baidu_tokens("给我讲个故事") == 12
    assert baidu_tokens("three little words") == 4
    assert baidu_tokens("你好 world") == 3


# --- the gate ------------------------------------------------------------------------------


def test_held_calls_pass_only_when_released(fake: FakeOpenAI) -> None:
    with ThreadPoolExecutor(4) as pool:
        fake.hold()
        waiting = [pool.submit(post, fake) for _ in range(4)]
        fake.wait_for_calls(4)
        assert fake.in_flight == 4
        fake.release(2)
        fake.wait_until(lambda: fake.in_flight == 2)
        assert not all(call.done() for call in waiting)
        fake.release()
        assert [call.result()[0] for call in waiting] == [200] * 4
    assert fake.max_in_flight == 4


def test_waiting_for_calls_that_do_not_come_is_an_error(fake: FakeOpenAI) -> None:
    with pytest.raises(TimeoutError, match="0 calls"):
        fake.wait_for_calls(1, timeout=0.01)


async def _waits_in_a_loop(fake: FakeOpenAI) -> None:
    fake.hold()
    call = asyncio.create_task(asyncio.to_thread(post, fake))
    await fake.calls_arrived(1)
    fake.release()
    assert (await call)[0] == 200
    await fake.idle()


def test_the_gate_works_from_an_event_loop(fake: FakeOpenAI) -> None:
    asyncio.run(_waits_in_a_loop(fake))


def test_a_call_whose_peer_leaves_is_abandoned_and_not_billed(fake: FakeOpenAI) -> None:
    fake.hold()
    with raw(fake):
        fake.wait_for_calls(1)
    fake.wait_until_idle()
    assert fake.calls[0].abandoned
    assert fake.calls[0].status is None
    assert fake.billed_tokens == 0


def test_calls_beyond_the_concurrency_limit_are_refused() -> None:
    with FakeOpenAI(concurrency_limit=2) as fake, ThreadPoolExecutor(3) as pool:
        fake.hold()
        together = [pool.submit(post, fake) for _ in range(3)]
        fake.wait_for_calls(3)
        fake.release()
        assert sorted(call.result()[0] for call in together) == [200, 200, 429]
        assert post(fake)[0] == 200


# --- faults on the wire --------------------------------------------------------------------


def test_a_reset_before_the_answer_sends_no_byte(fake: FakeOpenAI) -> None:
    fake.fail(faults.reset_before_answer)
    assert read_all(raw(fake)) == (b"", True)
    assert fake.calls[0].fault == "reset_before_answer"
    assert fake.billed_tokens == 0


def test_a_reset_in_the_middle_follows_a_part_of_the_body(fake: FakeOpenAI) -> None:
    fake.fail(faults.reset_mid_body)
    seen, was_reset = read_all(raw(fake))
    assert was_reset
    assert seen.startswith(b"HTTP/1.1 200 OK\r\n")
    assert fake.billed_tokens == 3


def test_a_truncated_body_is_shorter_than_announced(fake: FakeOpenAI) -> None:
    fake.fail(faults.truncated_body)
    with pytest.raises(http.client.IncompleteRead) as caught:
        post(fake)
    assert caught.value.partial
    assert caught.value.expected
    fake.fail(faults.truncated_chunks)
    with pytest.raises(http.client.IncompleteRead):
        post(fake)


def test_a_dribble_comes_a_byte_at_a_time(fake: FakeOpenAI) -> None:
    fake.fail(faults.dribble(0.0005))
    with raw(fake) as sock:
        seen = b""
        while b"\r\n\r\n" not in seen:
            seen += sock.recv(65536)
        length = int(seen.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        pieces = [sock.recv(65536) for _ in range(20)]
        assert sum(map(len, pieces)) < length


def test_a_hanging_call_ends_when_the_peer_leaves(fake: FakeOpenAI) -> None:
    fake.fail(faults.hang)
    with raw(fake) as sock:
        fake.wait_for_calls(1)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
    fake.wait_until_idle()
    assert fake.calls[0].abandoned


def test_an_endless_body_has_no_end(fake: FakeOpenAI) -> None:
    fake.fail(faults.endless_body)
    with raw(fake) as sock:
        taken = 0
        while taken < 20_000_000:
            taken += len(sock.recv(1 << 20))
    fake.wait_until_idle()


def test_a_connection_is_kept_until_a_fault_closes_it(fake: FakeOpenAI) -> None:
    connection = http.client.HTTPConnection(urlsplit(fake.url).netloc, timeout=5)
    for _ in range(3):
        assert post(fake, connection=connection)[0] == 200
    assert fake.connections == 1
    fake.fail(faults.close_after_answer)
    assert post(fake, connection=connection)[0] == 200
    assert connection.sock.recv(1) == b""
    connection.close()


def test_a_stale_connection_is_reset_by_the_next_request(fake: FakeOpenAI) -> None:
    fake.fail(faults.stale_keep_alive)
    connection = http.client.HTTPConnection(urlsplit(fake.url).netloc, timeout=5)
    assert post(fake, connection=connection)[0] == 200
    fake.wait_until_idle()
    with pytest.raises(ConnectionError):
        post(fake, connection=connection)
    connection.close()
    assert len(fake.calls) == 1


def test_a_stopped_server_refuses_and_comes_back_on_its_port(fake: FakeOpenAI) -> None:
    fake.stop()
    with pytest.raises(ConnectionRefusedError):
        post(fake)
    fake.start()
    assert post(fake)[0] == 200
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(urlsplit(unused_url()).netloc).connect()


def test_replies_are_sent_verbatim(fake: FakeOpenAI) -> None:
    fake.fail(faults.http_error(429, {"why": "busy"}, {"Retry-After": "7"}))
    status, body, headers = post(fake)
    assert (status, json.loads(body), headers["retry-after"]) == (429, {"why": "busy"}, "7")
    fake.fail(faults.html_page(200))
    status, body, headers = post(fake)
    assert (status, headers["content-type"], body[:6]) == (200, "text/html", b"<html>")
    fake.fail(faults.redirect("http://127.0.0.1:9/", 307))
    status, _, headers = post(fake)
    assert (status, headers["location"]) == (307, "http://127.0.0.1:9/")
    fake.fail(faults.wrong_content_type)
    status, body, headers = post(fake)
    assert (headers["content-type"], len(json.loads(body)["data"])) == ("text/plain", 3)


def test_a_fault_hits_only_the_calls_it_is_meant_for(fake: FakeOpenAI) -> None:
    fake.fail(faults.http_error(500), times=None, when=lambda texts: "bad" in texts)
    fake.fail(faults.http_error(503), times=2)
    assert [post(fake, ["bad"])[0], post(fake, ["good"])[0]] == [500, 503]
    assert [post(fake, ["good"])[0], post(fake, ["good"])[0]] == [503, 200]
    assert post(fake, ["good", "bad"])[0] == 500
    fake.heal()
    assert post(fake, ["bad"])[0] == 200


def test_a_fault_can_hit_a_route_that_is_no_embedding_call() -> None:
    with FakeBaidu() as fake:
        fake.fail(faults.http_error(500), path="/oauth/")
        assert post(fake, path="/oauth/2.0/token")[0] == 500
        assert fake.token_requests == 1
        assert fake.calls == []


# --- faults in the vectors -----------------------------------------------------------------


def lengths(data: list[Any]) -> list[int]:
    return [len(row["embedding"]) for row in sorted(data, key=lambda row: int(row["index"]))]


def test_counts_and_indices_can_be_wrong(fake: FakeOpenAI) -> None:
    fake.fail(faults.one_vector_fewer)
    assert sorted(row["index"] for row in rows(fake)) == [0, 1]
    fake.fail(faults.one_vector_more)
    assert sorted(row["index"] for row in rows(fake)) == [0, 1, 2, 3]
    fake.fail(faults.duplicate_index)
    assert sorted(row["index"] for row in rows(fake)) == [0, 0, 1]
    fake.fail(faults.index_out_of_range)
    assert sorted(row["index"] for row in rows(fake)) == [0, 1, 3]
    fake.fail(faults.negative_index)
    assert sorted(row["index"] for row in rows(fake)) == [-1, 1, 2]


def test_lengths_can_be_wrong(fake: FakeOpenAI) -> None:
    fake.fail(faults.wrong_dimension)
    assert lengths(rows(fake)) == [7, 7, 7]
    fake.fail(faults.mixed_dimensions)
    assert lengths(rows(fake)) == [7, 8, 8]
    fake.fail(faults.empty_vector.on("b"))
    assert lengths(rows(fake)) == [8, 0, 8]


@pytest.mark.parametrize(
    ("fault", "printed"),
    [
        (faults.null_vector, b'"embedding":null'),
        (faults.nan_literal, b",NaN,"),
        (faults.nan_as_null, b",null,"),
        (faults.infinity_literal, b",Infinity,"),
        (faults.overflows_float32, b",1e+39,"),
        (faults.zero_vector, b"[0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0]"),
        (faults.vector_of_strings, b'["'),
    ],
    ids=lambda value: value.name if isinstance(value, faults.Payload) else "",
)
def test_numbers_can_be_wrong(fake: FakeOpenAI, fault: faults.Payload, printed: bytes) -> None:
    fake.fail(fault)
    assert post(fake)[1].count(printed) == 1
    assert printed not in post(fake)[1]


def test_numbers_can_be_wrong_in_base64(fake: FakeOpenAI) -> None:
    import base64

    body = {"model": MODEL, "input": ["a"], "encoding_format": "base64"}
    fake.fail(faults.overflows_float32)
    text = json.loads(post(fake, body=body)[1])["data"][0]["embedding"]
    assert np.isinf(np.frombuffer(base64.b64decode(text), dtype="<f4")).sum() == 1


@pytest.mark.parametrize("fault", faults.PAYLOAD_FAULTS, ids=lambda fault: fault.name)
def test_every_vendor_can_lie_about_its_vectors(fault: faults.Payload) -> None:
    with FakeOllama() as fake:
        good = post(fake, path="/api/embed", body={"model": "bge-m3", "input": TEXTS})[1]
        fake.fail(fault)
        bad = post(fake, path="/api/embed", body={"model": "bge-m3", "input": TEXTS})[1]
    # Ollama has no index to lie about.
    assert (good == bad) == ("index" in fault.name)


# --- errors of the vendors -----------------------------------------------------------------


def test_errors_have_the_vendors_shape() -> None:
    native = "/api/v1/services/embeddings/text-embedding/text-embedding"
    with FakeDashScope() as fake:
        fake.fail(faults.vendor_error("Throttling.RateQuota"), times=2)
        status, body, _ = post(fake, path=native)
        assert (status, json.loads(body)["code"]) == (429, "Throttling.RateQuota")
        status, body, _ = post(fake, path="/compatible-mode/v1/embeddings")
        assert (status, json.loads(body)["error"]["code"]) == (429, "limit_requests")
        fake.fail(faults.vendor_error("internal", status=200))
        status, body, _ = post(fake, path=native)
        assert (status, json.loads(body)["code"]) == (200, "InternalError")
    with FakeBaidu() as fake:
        fake.fail(faults.vendor_error(18))
        path = "/rpc/2.0/ai_custom/v1/wenxinworkshop/embeddings/bge_large_zh"
        status, body, _ = post(fake, path=path)
        words = "Open api qps request limit reached"
        assert (status, json.loads(body)) == (200, {"error_code": 18, "error_msg": words})
        fake.fail(faults.vendor_error("rate_limit"))
        status, body, _ = post(fake, path="/v2/embeddings")
        assert (status, json.loads(body)["error"]["type"]) == (429, "rate_limit_exceeded")


@pytest.mark.parametrize("kind", [FakeBaidu, FakeDashScope, FakeGemini, FakeOllama, FakeOpenAI])
@pytest.mark.parametrize("name", ["rate_limit", "quota", "auth", "unavailable", "internal", "bad_input"])
def test_every_vendor_knows_the_common_errors(kind: type[FakeUpstream], name: str) -> None:
    paths = {
        FakeBaidu: "/rpc/2.0/ai_custom/v1/wenxinworkshop/embeddings/embedding-v1",
        FakeDashScope: "/compatible-mode/v1/embeddings",
        FakeGemini: "/v1beta/models/gemini-embedding-001:batchEmbedContents",
        FakeOllama: "/api/embed",
    }
    with kind() as fake:
        fake.fail(faults.vendor_error(name))
        status, body, _ = post(fake, path=paths.get(kind, "/v1/embeddings"))
        assert {"error", "error_code"} & set(json.loads(body))
        assert (status == 200) == (kind is FakeBaidu)


@pytest.mark.parametrize(("flavour", "nested"), [("vllm", True), ("vllm_old", False)])
def test_vllm_refuses_dimensions_in_both_shapes_of_error(flavour: Any, nested: bool) -> None:
    with FakeOpenAI(None, {"m": 4}, flavour=flavour) as fake:
        answer = json.loads(post(fake, body={"model": "m", "input": "a", "dimensions": 4})[1])
    error = answer["error"] if nested else answer
    assert error["code"] == 400
    assert "does not support matryoshka representation" in error["message"]


@pytest.mark.parametrize("old", [False, True])
def test_an_old_ollama_tells_capabilities_only_when_shown(old: bool) -> None:
    with FakeOllama(old=old) as fake:
        connection = http.client.HTTPConnection(urlsplit(fake.url).netloc, timeout=5)
        connection.request("GET", "/api/tags")
        tag = json.loads(connection.getresponse().read())["models"][0]
        connection.close()
        shown = json.loads(post(fake, path="/api/show", body={"model": "bge-m3"})[1])
    assert ("capabilities" in tag) == (not old)
    assert ("embedding_length" in tag["details"]) == (not old)
    assert shown["capabilities"] == ["embedding"]


def test_an_access_token_of_baidu_ends_by_the_clock() -> None:
    now = [0.0]
    with FakeBaidu(expires_in=60, clock=lambda: now[0]) as fake:
        query = f"grant_type=client_credentials&client_id={fake.api_key}"
        path = f"/oauth/2.0/token?{query}&client_secret={fake.secret_key}"
        token = json.loads(post(fake, path=path)[1])
        assert token["expires_in"] == 60
        path = "/rpc/2.0/ai_custom/v1/wenxinworkshop/embeddings/embedding-v1?access_token="
        body = {"input": ["a"]}

        def code(access_token: str) -> Any:
            answer = json.loads(post(fake, path=path + access_token, body=body)[1])
            return answer.get("error_code")

        assert [code(token["access_token"]), code("unknown")] == [None, 110]
        now[0] = 60.0
        assert code(token["access_token"]) == 111
        assert json.loads(post(fake, path=path.split("?")[0], body=body)[1])["error_code"] == 100


# --- signatures: the published example, and three made with the vendor's own package ---------

DATE = datetime(2024, 11, 15, 8, tzinfo=UTC)
AK, SK = "ALTAKexampleak0000000001", "exampleSecretKey00000000000000001"
V1 = "/rpc/2.0/ai_custom/v1/wenxinworkshop/embeddings/embedding-v1"
STAMP = "2024-11-15T08:00:00Z"
SIGNED = {
    "host": "aip.baidubce.com",
    "x-bce-date": STAMP,
    "authorization": f"bce-auth-v1/{AK}/{STAMP}/1800/host;x-bce-date/"
    "a333f51c0d7516f906ee6aea46f69e7d9d6a77fb8c39f8ac3e439414fd2d2e89",
}


def test_the_canonical_request_keeps_a_line_for_an_empty_query() -> None:
    lines = canonical_request("post", V1, {}, SIGNED, ["x-bce-date", "host"]).split("\n")
    date = "x-bce-date:2024-11-15T08%3A00%3A00Z"
    assert lines == ["POST", V1, "", "host:aip.baidubce.com", date]


def test_the_published_example_of_a_signature_is_accepted() -> None:
    date = "2015-04-27T08:23:49Z"
    headers = {
        "host": "bj.bcebos.com",
        "content-type": "text/plain",
        "content-length": "8",
        "content-md5": "NFzcPqhviddjRNnSOGo4rw==",
        "x-bce-date": date,
        "authorization": f"bce-auth-v1/{'a' * 32}/{date}/1800//"
        "d74a04362e6a848f5b39b15421cb449427f419c95a480fd6b8cf9fc783e2999e",
    }
    query = {"partNumber": "9", "uploadId": "a44cc9bab11cbd156984767aad637851"}
    now = datetime(2015, 4, 27, 8, 30, tzinfo=UTC)
    path = "/v1/test/myfolder/readme.txt"
    assert verify("PUT", path, query, headers, {"a" * 32: "b" * 32}, now) == "a" * 32


def test_signatures_of_the_vendors_package_are_accepted() -> None:
    assert verify("POST", V1, {}, SIGNED, {AK: SK}, DATE) == AK
    prefix = f"bce-auth-v1/{AK}/{STAMP}/300"
    names = "x-bce-date;request_id;host;content-type"  # unsorted
    more = {
        **SIGNED,
        "content-type": "application/json",
        "request_id": "sdk-py-0.4.12.3-abc",
        "authorization": f"{prefix}/{names}/0d5cbd51c605325563bda2ccfa72753fabd61c75b337b3623c3f5a5352b21648",
    }
    assert verify("POST", V1, {}, more, {AK: SK}, DATE) == AK
    bearer = {
        **SIGNED,
        "host": "iam.bj.baidubce.com",
        "authorization": f"{prefix}/host;x-bce-date/595c6d4f57fe8afe851f3febffbe11559e7d874d3ac5aeb3bf059f53715cfa63",
    }
    query = {"expireInSeconds": "43200"}
    assert verify("GET", "/v1/BCE-BEARER/token", query, bearer, {AK: SK}, DATE) == AK


@pytest.mark.parametrize(
    ("change", "secrets", "now"),
    [
        ({"host": "evil.example"}, {AK: SK}, DATE),
        ({"authorization": "Bearer x"}, {AK: SK}, DATE),
        ({}, {AK: "other"}, DATE),
        ({}, {}, DATE),
        ({}, {AK: SK}, DATE.replace(hour=9)),
        ({}, {AK: SK}, DATE.replace(hour=7)),
        ({"authorization": SIGNED["authorization"].replace("host;", "")}, {AK: SK}, DATE),
    ],
    ids=["host", "scheme", "secret", "unknown key", "too late", "too early", "host not signed"],
)
def test_a_signature_that_does_not_fit_is_refused(
    change: dict[str, str], secrets: dict[str, str], now: datetime
) -> None:
    with pytest.raises(BadSignature):
        verify("POST", V1, {}, {**SIGNED, **change}, secrets, now)
