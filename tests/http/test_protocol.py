"""Below HTTP: upgrade offers, heads in pieces, and bodies that look like heads."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app import serve
from app.http import protocol
from tests.clock import HandClock, settle
from tests.fakes import FakeOpenAI
from tests.harness import Running, running
from tests.processes import Program, address, environment


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with running({"upstreams": {"lexical": {"type": "lexical"}}}) as gateway:
        yield gateway


@pytest.fixture
def slow() -> Iterator[tuple[FakeOpenAI, Running]]:
    """A gateway over an upstream whose calls the test can hold."""
    with FakeOpenAI(api_key=None, models={"m": 8}) as fake:
        upstream = {"type": "openai", "base_url": f"{fake.url}/v1", "api_key": "x"}
        with running({"upstreams": {"slow": upstream}}) as gateway:
            yield fake, gateway


LAST = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def talk(gateway: Running, *pieces: bytes, last: bytes = LAST) -> list[tuple[int, bytes]]:
    """Sends the pieces over one connection and returns the answers. One more request, which closes the
    connection, follows them; its answer is left out, so that a surplus answer shows."""
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):  # the gateway may have closed it by now
            for piece in (*pieces, last):
                connection.sendall(piece)
        raw = b"".join(iter(lambda: connection.recv(65536), b""))
    answers = []
    while raw:
        head, _, rest = raw.partition(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
        answers.append((int(head.split()[1]), rest[:length]))
        raw = rest[length:]
    return [answer for answer in answers if answer != (200, b'{"status":"ok"}')]


def embed(text: str, *headers: bytes, model: str = "lexical") -> bytes:
    asked = {"model": model, "input": text} | ({"dimensions": 64} if model == "lexical" else {})
    body = json.dumps(asked, ensure_ascii=False).encode()
    head = [b"POST /v1/embeddings HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*head, b"", body])


OFFER = (b"Connection: Upgrade, HTTP2-Settings", b"upGraDE: h2c", b"HTTP2-Settings: AAEAAEAAAAIAAAAA")


def test_an_offer_of_http_2_is_ignored_and_the_body_is_the_body(gateway: Running) -> None:
    (status, body), *more = talk(gateway, embed("hello", *OFFER))
    assert (status, more) == (200, [])
    assert json.loads(body)["data"] == json.loads(talk(gateway, embed("hello"))[0][1])["data"]


def test_an_offer_is_found_in_a_head_that_comes_byte_by_byte(gateway: Running) -> None:
    request = embed("hello", *OFFER)
    ((status, _),) = talk(gateway, *(request[i : i + 1] for i in range(len(request))))
    assert status == 200


def test_a_body_that_looks_like_a_request_is_never_one(gateway: Running) -> None:
    body = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    head = [b"POST /v1/embeddings HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body), *OFFER]
    answers = talk(gateway, b"\r\n".join([*head, b"", body]))
    assert [status for status, _ in answers] == [400]
    assert b"JSON" in answers[0][1]


def test_words_in_a_body_are_left_alone(gateway: Running) -> None:
    raw = embed("x").replace(b'"x"', b'"\\r\\nUpgrade: h2c"')
    changed = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(raw.partition(b"\r\n\r\n")[2]), raw)
    (status, body), *_ = talk(gateway, changed)
    assert status == 200
    spelled = talk(gateway, embed("\r\nUpgrade: h2c"))[0][1]
    assert json.loads(body)["data"] == json.loads(spelled)["data"]


def test_requests_one_after_the_other_each_get_their_answer(gateway: Running) -> None:
    answers = talk(gateway, embed("one") + embed("two") + embed("three"))
    assert [status for status, _ in answers] == [200, 200, 200]
    alone = [json.loads(talk(gateway, embed(text))[0][1])["data"] for text in ("one", "two", "three")]
    assert [json.loads(body)["data"] for _, body in answers] == alone


def test_and_so_do_more_than_are_parsed_at_once(gateway: Running) -> None:
    with connected(gateway) as connection:
        connection.sendall(LAST.replace(b"close", b"keep-alive") * 999 + LAST)
        assert b"".join(iter(lambda: connection.recv(65536), b"")).count(b"HTTP/1.1 200 ") == 1000


@pytest.mark.parametrize("texts", [["the same"] * 100, [f"text {i}" for i in range(100)]], ids=["hits", "misses"])
def test_requests_leave_no_cycles_behind_for_the_garbage_collector_to_find(gateway: Running, texts: list[str]) -> None:
    requests = b"".join(map(embed, texts))
    talk(gateway, embed("the same"))
    gc.collect()
    gc.disable()
    try:
        assert len(talk(gateway, requests)) == len(texts)
        assert gc.collect() < len(texts)  # a connection may leave some cycles
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "raw",
    [
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000,
    ],
    ids=["connect", "nonsense", "endless head"],
)
def test_what_is_no_request_is_refused_in_openais_shape_and_the_connection_closed(gateway: Running, raw: bytes) -> None:
    ((status, body),) = talk(gateway, raw, last=b"")
    assert status == 400
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "lines",
    [b"", b"Host: a\r\nHost: b\r\n", b"Host: a/b\r\n", b"Host: a b\r\n"],
    ids=["none", "two", "a path", "a space"],
)
def test_a_request_without_exactly_one_sane_host_is_refused(gateway: Running, lines: bytes) -> None:
    before = gateway.metric("rejected_requests_total", reason="invalid_http")
    bad = b"GET /v1/models HTTP/1.1\r\n" + lines + b"\r\n"
    ((status, _),) = talk(gateway, bad, last=b"")
    assert status == 400
    with connected(gateway) as connection:  # nor after a valid request on the connection
        assert answered(connection, embed("x"))
        connection.sendall(bad)
        assert connection.recv(12) == b"HTTP/1.1 400"
    assert gateway.metric("rejected_requests_total", reason="invalid_http") == before + 2


def test_http_1_0_needs_no_host(gateway: Running) -> None:
    old = b"GET /v1/models HTTP/1.0\r\n\r\n"
    assert [status for status, _ in talk(gateway, old, last=b"")] == [200]
    ((status, _),) = talk(gateway, b"GET /v1/models HTTP/1.0\r\nHost: a/b\r\n\r\n", last=b"")
    assert status == 200


def test_a_head_that_never_ends_is_refused_in_time(gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 0.05)
    ((status, body),) = talk(gateway, b"GET / HTTP/1.1\r\nHost: x\r\n", last=b"")
    assert status == 400
    assert b"in time" in body


def test_nor_does_one_that_began_behind_another_request(gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 0.05)
    answers = talk(gateway, embed("x") + b"GET / HTTP/1.1\r\nHost: x\r\n", last=b"")
    assert [status for status, _ in answers] == [200, 400]
    assert b"in time" in answers[1][1]


@pytest.mark.parametrize("before", [b"", LAST.replace(b"Connection: close\r\n", b"")], ids=["first", "behind another"])
def test_the_time_for_a_head_ends_with_it_and_begins_anew_with_the_next(
    gateway: Running, before: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(gateway.url.rpartition(":")[2])
    with connected(gateway) as connection:
        connection.sendall(before + b"GET /healthz HTTP/1.1\r\n")
        wait_for(lambda: [each._head_timer is not None for each in open_connections(port)] == [True])
        (served,) = open_connections(port)
        connection.sendall(b"Host: x\r\n\r\n")
        answers = b""
        while answers.count(b'{"status":"ok"}') < (2 if before else 1):
            answers += connection.recv(65536)
        assert served._head_timer is None, "or it would be refused while it is idle"
        monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 0.05)
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_who_hangs_up_in_a_head_is_not_refused_as_well(gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 0.2)
    before = gateway.metric("rejected_requests_total", reason="invalid_http")
    with connected(gateway) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
    talk(gateway, b"GET / HTTP/1.1\r\n", last=b"")  # its time ends after that one's
    assert gateway.metric("rejected_requests_total", reason="invalid_http") == before + 1


def test_the_time_for_a_head_does_not_run_while_the_request_before_it_is_answered(
    slow: tuple[FakeOpenAI, Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, gateway = slow
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 0.3)
    fake.hold()
    with connected(gateway) as connection:
        last = embed("three", b"Connection: close", model="m")
        connection.sendall(embed("one", model="m") + embed("two", model="m") + last[:40])
        fake.wait_for_calls(1)
        time.sleep(0.7)  # longer than a head may take
        connection.sendall(last[40:])
        fake.release()
        assert b"".join(iter(lambda: connection.recv(65536), b"")).count(b"HTTP/1.1 200 ") == 3


@pytest.mark.parametrize(("complete", "seconds"), [(True, 10), (False, 30)], ids=["answered", "being answered"])
def test_behind_an_answer_a_head_has_the_rest_of_its_time(
    monkeypatch: pytest.MonkeyPatch, complete: bool, seconds: float
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 30.0)
    timers: list[float] = []
    connection: Any = protocol.Protocol.__new__(protocol.Protocol)
    connection.loop = SimpleNamespace(time=lambda: 120.0, call_later=lambda delay, _: timers.append(delay))
    connection._timeout = lambda: 60.0
    connection._running = SimpleNamespace(response_complete=complete)
    connection._idle_since = 100.0
    connection._on_head_timeout()
    assert timers == [seconds]


def test_nor_while_it_has_come_and_waits_to_be_parsed(
    slow: tuple[FakeOpenAI, Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, gateway = slow
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 0.1)
    fake.delay = 0.05
    requests = [embed(f"text {i}", b"X: " + b"x" * 900, model="m") for i in range(60)]
    with connected(gateway) as connection:
        connection.sendall(b"".join(requests) + LAST)
        assert b"".join(iter(lambda: connection.recv(65536), b"")).count(b"HTTP/1.1 200 ") == 61


@pytest.mark.parametrize("line", [b"\r\n", b"\r\n\r\n", b"\n"])
def test_an_empty_line_behind_a_body_is_nothing(gateway: Running, line: bytes) -> None:
    with connected(gateway) as connection:
        assert answered(connection, embed("x"))
        connection.sendall(line)
        gateway.call(settle())  # so that it is read by itself
        assert answered(connection, embed("y"))
    assert [status for status, _ in talk(gateway, embed("x") + line + embed("y") + line)] == [200, 200]


def chunked(*trailers: bytes) -> bytes:
    body = json.dumps({"model": "lexical", "input": "x", "dimensions": 64}).encode()
    head = [b"POST /v1/embeddings HTTP/1.1", b"Host: x", b"Authorization: Bearer wrong", b"Transfer-Encoding: chunked"]
    return b"\r\n".join([*head, b"", b"%x" % len(body), body, b"0", *trailers, b"", b""])


def test_what_stands_behind_a_body_is_no_header() -> None:
    config = {"upstreams": {"lexical": {"type": "lexical"}}, "auth": {"keys": {"a": {"key": "right-key-012345"}}}}
    with running(config) as gateway:
        # The connection is closed: the key is checked before the body is read.
        ((status, _),) = talk(gateway, chunked(b"Authorization: Bearer right-key-012345"), last=b"")
    assert status == 401


def test_trailers_and_heads_behind_a_request_have_an_end(gateway: Running) -> None:
    for begin in (LAST.replace(b"close", b"keep-alive") + b"GET / HTTP/1.1\r\nx: ", chunked(b"x: ")[:-4]):
        before = gateway.metric("rejected_requests_total", reason="invalid_http")
        with connected(gateway) as connection:
            connection.sendall(begin)
            if begin.startswith(b"GET"):
                assert connection.recv(65536)  # if sent during the answer, it would just be cut off after it
            with contextlib.suppress(ConnectionError):  # it may be refused before or after all is sent
                for _ in range(64):
                    connection.sendall(b"a" * 2**18)
        assert gateway.metric("rejected_requests_total", reason="invalid_http") == before + 1


def test_a_head_that_is_too_long_is_refused_however_it_arrives(gateway: Running) -> None:
    for size in (60, 70, 100):
        head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (size * 1024) + b"\r\n\r\n"
        before = gateway.metric("rejected_requests_total", reason="invalid_http")
        with connected(gateway) as connection:
            assert answered(connection, head) == (size < 64)
        assert gateway.metric("rejected_requests_total", reason="invalid_http") == before + (size > 64)


MANY = b"x:y\r\n" * 10_000


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + MANY + b"\r\n",
        LAST.replace(b"close", b"keep-alive") + b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + MANY + b"\r\n",
        chunked(MANY[:-2]),
    ],
    ids=["headers", "headers of the next request", "trailers"],
)
def test_more_headers_than_any_client_sends_end_the_connection(gateway: Running, raw: bytes) -> None:
    most = b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"x:y\r\n" * 255 + b"\r\n"
    with connected(gateway) as connection:
        assert answered(connection, most)
        connection.sendall(raw)
        with contextlib.suppress(ConnectionError):  # if it is closed before all was read
            while connection.recv(65536):
                pass


NO_HOST = b"GET /healthz HTTP/1.1\r\n\r\n"


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "TLS, but this port speaks plain HTTP"),
        (b"PROXY TCP4 10.0.0.1 10.0.0.2 5 6\r\n" + LAST, "the PROXY protocol (v1), which is not supported"),
        (
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12) + LAST,
            "the PROXY protocol (v2), which is not supported",
        ),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2 without TLS, which is not supported"),
        (b"GET / HTTP/1.1\r\nAuthorization: sk-canary" + b"a" * 2**16, "The request's headers are too large."),
        (
            b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: sk-canary\r\n" * 256 + b"\r\n",
            "The request has more than 256 headers.",
        ),
        (b"GET /sk-canary HTTP/1.1\r\n\r\n", "Invalid HTTP request received."),
    ],
    ids=["TLS", "PROXY v1", "PROXY v2", "HTTP/2", "a long head", "many headers", "no host"],
)
def test_what_is_not_http_is_logged_once_a_minute_and_without_its_bytes(
    caplog: pytest.LogCaptureFixture, wrong: bytes, problem: str
) -> None:
    clock = HandClock()
    with running({"upstreams": {"lexical": {"type": "lexical"}}}, clock=clock) as gateway:

        def lines() -> list[str]:
            return [each.getMessage() for each in caplog.records if each.name == "app.http.invalid"]

        assert [status for status, _ in talk(gateway, wrong, last=b"")] == [400]
        first = f"invalid HTTP from 127.0.0.1: {problem} (1 since the last such line)"
        assert lines() == [first]
        for _ in range(3):
            talk(gateway, NO_HOST, last=b"")
        assert lines() == [first]
        clock.now += 60
        talk(gateway, wrong, last=b"")
        assert lines() == [first, first.replace("(1 since", "(4 since")], "of the last"
        assert gateway.metric("rejected_requests_total", reason="invalid_http") == 5
    assert "canary" not in caplog.text


def test_what_is_wrong_behind_a_request_is_not_taken_for_its_answer(gateway: Running) -> None:
    for wrong in (b"GET / HTTP/1.1\r\n\r\n", b"what?\r\n\r\n", embed("next", *OFFER) + b"CONNECT x:1 HTTP/1.1\r\n\r\n"):
        with connected(gateway) as connection:
            connection.sendall(embed("long " * 20_000) + wrong)
            answer = b"".join(iter(lambda c=connection: c.recv(65536), b""))  # type: ignore[misc]
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"400 Bad Request" not in answer
        assert b"connection: close" in answer


def test_a_body_in_many_chunks_is_no_head_without_end(gateway: Running) -> None:
    text = "x " * 50_000
    body = json.dumps({"model": "lexical", "input": text, "dimensions": 64}).encode()
    pieces = [b"%x\r\n%b\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7)]
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    ((status, _),) = talk(gateway, head + b"".join(pieces) + b"0\r\n\r\n")
    assert status == 200


@pytest.mark.parametrize("one", [LAST.replace(b"close", b"keep-alive"), embed("x")], ids=["GET", "POST"])
def test_requests_behind_one_another_do_not_pile_up(gateway: Running, one: bytes) -> None:
    queued = unparsed = sent = 0
    with connected(gateway) as connection:
        connection.setblocking(False)
        began = time.monotonic()
        while time.monotonic() - began < (1.5 if queued else 15):  # on a busy machine the first bytes take longer
            with contextlib.suppress(BlockingIOError):
                sent += connection.send((one * 2000)[sent % len(one) :])
            with contextlib.suppress(BlockingIOError):
                while connection.recv(2**20):
                    pass
            ours = [
                each
                for each in gc.get_objects()
                if isinstance(each, protocol.Protocol) and each.client == connection.getsockname()
            ]
            queued = max([queued, *(len(each.pipeline) for each in ours)])
            unparsed = max([unparsed, *(sum(map(len, tuple(each._unparsed))) for each in ours)])
    assert queued, "or nothing was seen"
    assert queued * len(one) <= 2 * 2**14, "a piece of what was read or two"
    assert unparsed <= 2**18, "what one read brings: while there is any, nothing more is read"


LARGE = {
    "bodies": embed("x" * 60_000, model="m"),
    "heads": embed("x", *(b"x%d: %b" % (i, b"y" * 240) for i in range(240)), model="m"),
}


@pytest.mark.parametrize("one", LARGE.values(), ids=LARGE)
def test_nor_do_large_ones_behind_one_that_is_answered(slow: tuple[FakeOpenAI, Running], one: bytes) -> None:
    fake, gateway = slow

    def size(cycle: Any) -> int:
        return len(cycle.body) + sum(len(name) + len(value) for name, value in cycle.scope["headers"])

    fake.hold()
    waiting: list[int] = []
    with connected(gateway) as connection:
        connection.sendall(one)
        fake.wait_for_calls(1)
        connection.setblocking(False)
        sent, until = 0, time.monotonic() + 1.5
        while time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                sent += connection.send((one * 2)[sent % len(one) :])
            ours = open_connections(connection.getpeername()[1])
            waiting += [sum(size(cycle) for cycle, _ in tuple(each.pipeline)) for each in ours]
        fake.release()
    assert 0 < max(waiting) <= 2**16 + 2**18, "what may wait, and what one read brings"


# --- keep-alive -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    """A gateway that closes connections after a second of idleness."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "KEEP_ALIVE", 1)
        with running({"upstreams": {"lexical": {"type": "lexical"}}}) as gateway:
            yield gateway


@contextlib.contextmanager
def connected(gateway: Running) -> Iterator[socket.socket]:
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        yield connection


def answered(connection: socket.socket, *pieces: bytes, pause: float = 0.0) -> bool:
    """Whether what is sent in these pieces is answered; on a closed connection it is not."""
    try:
        for i, piece in enumerate(pieces):
            time.sleep(pause if i else 0)  # longer than an idle connection is kept
            connection.sendall(piece)
        return connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    except ConnectionError:
        return False


def test_an_idle_connection_is_closed_in_the_end(impatient: Running) -> None:
    with connected(impatient) as connection:
        assert answered(connection, embed("x"))
        began = time.monotonic()
        assert connection.recv(1) == b""
        assert 0.9 < time.monotonic() - began < 10


def test_a_connection_in_use_stays(impatient: Running) -> None:
    with connected(impatient) as connection:
        for i in range(6):
            assert answered(connection, embed(f"x {i}")), i
            time.sleep(0.4)  # six times, longer than an idle connection is kept
        began = time.monotonic()
        assert connection.recv(1) == b""  # 0.4 s of its second have passed
        assert 0.4 < time.monotonic() - began < 10


@pytest.mark.parametrize("cut", [20, 110], ids=["head", "body"])
def test_a_request_that_comes_slowly_is_not_cut_off_as_idle(impatient: Running, cut: int) -> None:
    request = embed("x" * 100)
    assert request.index(b"\r\n\r\n") < 110 < len(request)
    with connected(impatient) as connection:
        assert answered(connection, embed("before"))
        assert answered(connection, request[:cut], request[cut:], pause=1.3)
        assert answered(connection, embed("behind"))
        assert connection.recv(1) == b"", "but once it is idle"


def test_a_connection_over_which_nothing_ever_comes_is_closed(impatient: Running) -> None:
    with connected(impatient) as connection:
        began = time.monotonic()
        assert connection.recv(1) == b""
        assert 0.9 < time.monotonic() - began < 10


def test_a_request_that_came_while_the_process_was_paused_is_answered_before_its_connection_counts_as_idle(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.yaml").write_text("upstreams: {lexical: {type: lexical}}")
    code = "from app import cli, serve; serve.KEEP_ALIVE = 1; cli.main(['serve', '--port', '0'])"
    with (tmp_path / "log").open("w") as log:
        process = Program([sys.executable, "-c", code], env=environment(), cwd=tmp_path, stderr=log, text=True)
    with process:
        host, port = address(tmp_path / "log", process).removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            assert answered(connection, embed("before"))
            time.sleep(0.3)  # until it waits for its sockets
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)  # until it has stopped
            connection.sendall(embed("meanwhile"))
            time.sleep(1.2)  # longer than an idle connection is kept
            process.send_signal(signal.SIGCONT)
            assert answered(connection)
            assert connection.recv(1) == b"", "but once it is idle"


@pytest.mark.parametrize("behind", [b"", LAST.replace(b"close", b"keep-alive")], ids=["alone", "with one behind it"])
@pytest.mark.parametrize("last", [b"Connection: keep-alive", b"Connection: close"])
def test_an_answer_nobody_takes_is_dropped_in_the_end(impatient: Running, behind: bytes, last: bytes) -> None:
    """Part of it is in the system's buffers; the reset of the connection shows that the rest never comes."""
    body = json.dumps({"model": "lexical", "input": ["x"] * 2000, "dimensions": 1024}).encode()
    head = [b"POST /v1/embeddings HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body), last]
    host, port = impatient.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect((host, int(port)))
        connection.sendall(b"\r\n".join([*head, b"", body]) + behind)
        wait_for(lambda: any(each.transport.get_write_buffer_size() for each in open_connections(int(port))))
        wait_for(lambda: not open_connections(int(port)))


def test_one_that_is_taken_slowly_is_not(impatient: Running) -> None:
    """The connection's own buffer seems stuck: it drains only once much of the system's is free."""
    body = json.dumps({"model": "lexical", "input": ["x"] * 2000, "dimensions": 1024}).encode()
    host, port = impatient.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect((host, int(port)))
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        for _ in range(50):
            assert connection.recv(4096)
            time.sleep(0.1)  # slowness is the subject
        assert open_connections(int(port))


def open_connections(port: int) -> list[protocol.Protocol]:
    found = [each for each in gc.get_objects() if isinstance(each, protocol.Protocol) and each.parser is not None]
    return [each for each in found if each.server and each.server[1] == port]


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 15
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)  # the connections live in another thread, and no event tells of them
