"""Signals, worker processes and the metrics port, on the program as users start it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app.cli import _locked
from app.config.load import as_text
from app.metrics import multiprocess
from app.upstreams import UPSTREAMS
from app.workers import ParentChannel, Workers
from tests.fakes import FakeOpenAI
from tests.harness import settings_of
from tests.processes import address, answers, free_port, limited, metric, serving, start, until

TWO = ("--workers", "2")


def workers(process_id: int) -> list[int]:
    """The child processes of a process."""
    return [int(each) for each in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


def embed(url: str, text: str, model: str = "lexical") -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", json={"model": model, "input": text}, timeout=30)


def connect(url: str) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0))
    raw.settimeout(30)
    return raw


def ask_in_flight(raw: socket.socket, fake: FakeOpenAI) -> None:
    """Sends a request, and waits until it has reached the upstream, which holds it."""
    body = json.dumps({"model": "text-embedding-3-small", "input": "in flight"}).encode()
    raw.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    fake.wait_for_calls(1)


@pytest.mark.parametrize("arguments", [(), TWO], ids=["one", "two workers"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_whoever_asks_again_does_not_wait_for_the_drain(
    tmp_path: Path, arguments: tuple[str, ...], number: signal.Signals
) -> None:
    with start(tmp_path, "--port", "0", *arguments, EMBEDDING_GATEWAY__SERVER__DRAIN="10m") as process:
        url = address(tmp_path / "log", process)
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/readyz").status_code == 503, (tmp_path / "log").read_text)
        answer = embed(url, "still served")
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"
        process.send_signal(number)
        assert process.wait(30) == (0 if number == signal.SIGTERM else 130)
        assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("arguments", [(), TWO], ids=["one", "two workers"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["the second SIGTERM", "Ctrl-C"])
def test_what_does_not_wait_for_the_drain_lets_requests_finish(
    tmp_path: Path, arguments: tuple[str, ...], number: signal.Signals
) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        env = {"OPENAI_API_KEY": "sk-fake", "OPENAI_BASE_URL": fake.url + "/v1"}
        with start(tmp_path, "--port", "0", *arguments, EMBEDDING_GATEWAY__SERVER__DRAIN="10m", **env) as process:
            url = address(tmp_path / "log", process)
            fake.hold()
            with connect(url) as raw:
                ask_in_flight(raw, fake)
                if number == signal.SIGTERM:
                    process.send_signal(number)
                    until(lambda: httpx.get(f"{url}/readyz").status_code == 503, (tmp_path / "log").read_text)
                process.send_signal(number)
                until(lambda: not answers(url), (tmp_path / "log").read_text)
                fake.release()
                assert raw.recv(65536).startswith(b"HTTP/1.1 200")
            assert process.wait(30) == (0 if number == signal.SIGTERM else 130)
            assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("arguments", [(), TWO], ids=["one", "two workers"])
def test_ctrl_c_again_ends_requests_with_an_answer_and_a_line_in_the_log(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        env = {"OPENAI_API_KEY": "sk-fake", "OPENAI_BASE_URL": fake.url + "/v1"}
        with start(tmp_path, "--port", "0", *arguments, **env) as process:
            url = address(tmp_path / "log", process)
            fake.hold()
            with connect(url) as raw, connect(url) as slow:
                body = json.dumps({"model": "text-embedding-3-small", "input": "in flight"}).encode()
                head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
                slow.sendall(head + body[:-1])
                raw.sendall(head + body)
                fake.wait_for_calls(1)
                process.send_signal(signal.SIGINT)
                until(lambda: not answers(url), (tmp_path / "log").read_text)
                process.send_signal(signal.SIGINT)
                for each in (raw, slow):
                    answer = b"".join(iter(partial(each.recv, 65536), b""))
                    assert answer.startswith(b"HTTP/1.1 503")
                    assert b"the gateway is stopping" in answer
            assert process.wait(30) == 130
        log = (tmp_path / "log").read_text()
        assert log.count("event=request ") == log.count("status=503") == 2
        assert "Traceback" not in log


def test_one_ctrl_c_counts_as_one_in_workers_that_are_slow_to_notice(tmp_path: Path) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        env = {"OPENAI_API_KEY": "sk-fake", "OPENAI_BASE_URL": fake.url + "/v1"}
        with start(tmp_path, "--port", "0", *TWO, **env) as process:
            url = address(tmp_path / "log", process)
            both = workers(process.pid)
            fake.hold()
            with connect(url) as raw:
                ask_in_flight(raw, fake)
                for each in both:
                    os.kill(each, signal.SIGSTOP)
                try:
                    # One that has not stopped yet would notice the second signal first.
                    until(lambda: all(is_stopped(each) for each in both), lambda: "not stopped")
                    process.send_signal(signal.SIGINT)
                    until(lambda: any(has_pending(each, signal.SIGINT) for each in both), lambda: "no signal")
                finally:
                    for each in both:
                        os.kill(each, signal.SIGCONT)
                until(lambda: not answers(url), (tmp_path / "log").read_text)
                fake.release()
                assert raw.recv(65536).startswith(b"HTTP/1.1 200")
            assert process.wait(30) == 130


def is_stopped(process_id: int) -> bool:
    return "State:\tT" in Path(f"/proc/{process_id}/status").read_text()


def has_pending(process_id: int, number: signal.Signals) -> bool:
    """Whether the process has a signal that it has not noticed yet."""
    pending = re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{process_id}/status").read_text())
    return pending is not None and bool(int(pending[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("arguments", [(), TWO], ids=["one", "two workers"])
def test_ctrl_c_again_drops_an_answer_that_is_not_taken_without_ado(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with start(tmp_path, "--port", "0", *arguments) as process:
        url = address(tmp_path / "log", process)
        with connect(url) as raw:
            body = json.dumps({"model": "lexical", "input": ["x"] * 2000, "dimensions": 1024}).encode()
            raw.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            until(lambda: "event=request " in (tmp_path / "log").read_text(), lambda: "no answer")
            process.send_signal(signal.SIGINT)
            until(lambda: not answers(url), (tmp_path / "log").read_text)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_port_for_metrics_tells_of_all_workers(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, *TWO, EMBEDDING_GATEWAY__SERVER__METRICS_PORT=str(port)) as (url, _):
        for i in range(20):  # a new connection each, so that both workers get some requests
            assert embed(url, f"{i}").status_code == 200
        admin = f"http://127.0.0.1:{port}"
        assert metric(httpx.get(f"{admin}/metrics").text, "requests_total") == 20
        assert httpx.get(f"{admin}/docs").status_code == 200
        assert "/v1/embeddings" in httpx.get(f"{admin}/openapi.json").json()["paths"]
        assert httpx.get(f"{url}/metrics").status_code == 404


@pytest.mark.parametrize("arguments", [(), TWO], ids=["one", "two workers"])
def test_the_port_for_metrics_speaks_http_as_the_main_one_does(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    port = free_port()
    with serving(tmp_path, *arguments, EMBEDDING_GATEWAY__SERVER__METRICS_PORT=str(port)):
        for protocol in (b"h2c", b"websocket"):
            with socket.create_connection(("127.0.0.1", port)) as raw:
                raw.settimeout(30)
                raw.sendall(
                    b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: %b\r\n"
                    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n" % protocol
                )
                assert raw.recv(65536).startswith(b"HTTP/1.1 200")
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.settimeout(30)
            raw.sendall(b"rubbish\r\n\r\n")
            assert b'"code":"invalid_http"' in raw.recv(65536)
        log = (tmp_path / "log").read_text()
        assert f"docs at http://127.0.0.1:{port}/docs" in log
        assert "WebSocket" not in log


def test_a_port_for_metrics_that_is_taken_is_one_readable_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with start(tmp_path, "--port", "0", EMBEDDING_GATEWAY__SERVER__METRICS_PORT=str(port)) as process:
            assert process.wait(30) == 2
    assert (tmp_path / "log").read_text() == f"cannot listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize("arguments", [(), TWO], ids=["one", "two workers"])
def test_a_port_that_is_lost_while_starting_is_one_readable_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """A port bound with SO_REUSEADDR is taken only once its owner listens."""
    with socket.socket() as rival, socket.create_server(("127.0.0.1", 0)) as upstream:
        rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rival.bind(("127.0.0.1", 0))
        port = rival.getsockname()[1]
        env = {"OLLAMA_HOST": f"127.0.0.1:{upstream.getsockname()[1]}"}
        with start(tmp_path, "--port", str(port), *arguments, **env) as process:
            # A starting gateway asks the upstream for its models and waits for the answer.
            asked = [upstream.accept()[0] for _ in range(2 if arguments else 1)]
            rival.listen()
            upstream.close()
            for each in asked:
                each.close()
            assert process.wait(30) == 2
    said = (tmp_path / "log").read_text()
    assert f"\ncannot listen on 127.0.0.1:{port}: Address already in use\n" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("arguments", [(), TWO], ids=["one", "two workers"])
def test_as_many_connections_may_be_open_as_the_system_allows(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with limited(resource.RLIMIT_NOFILE, min(soft, hard - 1)), serving(tmp_path, *arguments) as (_, process):
        for each in (process.pid, *workers(process.pid)):
            assert resource.prlimit(each, resource.RLIMIT_NOFILE) == (hard, hard)


def test_a_worker_that_dies_is_replaced_said_and_counted_no_more(tmp_path: Path) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        port = free_port()
        env = {"OPENAI_API_KEY": "sk-fake", "OPENAI_BASE_URL": fake.url + "/v1"}
        env["EMBEDDING_GATEWAY__SERVER__METRICS_PORT"] = str(port)
        with serving(tmp_path, *TWO, **env) as (url, process):

            def inside() -> float | None:
                return metric(httpx.get(f"http://127.0.0.1:{port}/metrics").text, "inflight_requests")

            assert embed(url, "counted for good", "text-embedding-3-small").status_code == 200
            until(lambda: inside() == 0, (tmp_path / "log").read_text)
            fake.hold()
            with connect(url) as raw:
                body = json.dumps({"model": "text-embedding-3-small", "input": "in flight"}).encode()
                raw.sendall(
                    b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
                )
                fake.wait_for_calls(2)
                until(lambda: inside() == 1, (tmp_path / "log").read_text)
                before = workers(process.pid)
                assert len(before) == 2
                for each in before:
                    os.kill(each, signal.SIGKILL)
            until(lambda: len(set(workers(process.pid)) - set(before)) == 2, (tmp_path / "log").read_text)
            fake.release()
            assert until(lambda: answers(url), (tmp_path / "log").read_text)
            assert inside() == 0
            text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
            assert metric(text, "requests_total") == 1
            said = re.findall(r"worker (\d+) was ended by SIGKILL; starting another", (tmp_path / "log").read_text())
            assert set(map(int, said)) == set(before)


def test_workers_that_are_replaced_go_on_counting_where_the_last_ones_ended(tmp_path: Path) -> None:
    """Files of dead workers would fill /tmp in time, and every scrape reads all of them."""
    port, temporary, log = free_port(), tmp_path / "tmp", (tmp_path / "log").read_text
    temporary.mkdir()
    env = {"EMBEDDING_GATEWAY__SERVER__METRICS_PORT": str(port), "TMPDIR": str(temporary)}
    with serving(tmp_path, *TWO, **env) as (url, process):
        for round_ in range(1, 4):
            for i in range(10):  # a new connection each, so that both workers get some requests
                assert embed(url, f"{i}").status_code == 200
            assert metric(httpx.get(f"http://127.0.0.1:{port}/metrics").text, "requests_total") == 10 * round_
            _replace(process.pid, url, log)
        assert len(list(temporary.rglob("counter_*.db"))) <= 3, "the parent's and one for each worker"


def _replace(process_id: int, url: str, log: Callable[[], str]) -> None:
    """Kills both workers, and waits for their successors."""
    before = set(workers(process_id))
    for each in before:
        os.kill(each, signal.SIGKILL)
    until(lambda: len(set(workers(process_id)) - before) == 2 and answers(url), log)


def test_whatever_the_file_holds_by_then_a_worker_that_dies_is_replaced_by_one_like_its_siblings(
    tmp_path: Path,
) -> None:
    port, file, log = free_port(), tmp_path / "config.yaml", (tmp_path / "log").read_text
    upstreams = {"built-in": {"type": "lexical"}}
    file.write_text(yaml.safe_dump({"upstreams": upstreams, "server": {"metrics_port": port}}))
    # A new connection for each request, so that both workers get some requests.
    with serving(tmp_path, *TWO) as (url, process), httpx.Client(headers={"connection": "close"}) as client:

        def valid() -> float | None:
            return metric(client.get(f"http://127.0.0.1:{port}/metrics").text, "config_valid")

        def seen(path: str) -> list[httpx.Response]:
            return [client.get(url + path) for _ in range(20)]

        models = {"more": {"deployments": [{"upstream": "built-in", "model": "lexical"}]}}
        file.write_text(yaml.safe_dump({"upstreams": upstreams, "models": models, "cache": {"memory": None}}))
        process.send_signal(signal.SIGHUP)
        until(lambda: all(each.status_code == 200 for each in seen("/v1/models/more")), log)
        assert valid() == 1
        file.write_text("nonsense: 1\n")
        process.send_signal(signal.SIGHUP)
        until(lambda: valid() == 0, log)
        before = workers(process.pid)
        for each in before:
            os.kill(each, signal.SIGKILL)
        assert valid() == 0, "and there may be no worker at all"
        until(lambda: len(set(workers(process.pid)) - set(before)) == 2 and answers(url), log)
        assert {each.status_code for each in seen("/v1/models/more")} == {200}
        assert [each.json()["cache"] for each in seen("/readyz")] == [{"memory": "up"}] * 20, "which takes a restart"
        assert {each.status_code for each in seen("/metrics")} == {404}
        assert valid() == 0
        file.write_text(yaml.safe_dump({"upstreams": upstreams}))
        process.send_signal(signal.SIGHUP)
        until(lambda: all(each.status_code == 404 for each in seen("/v1/models/more")), log)
        assert valid() == 1


@pytest.mark.parametrize("cut", [0, 1, 7, None])
async def test_a_worker_that_starts_while_settings_change_has_the_last_ones(cut: int | None) -> None:
    """The parent sends settings at the start and on each change, and a worker takes a second to listen."""
    ours, theirs = socket.socketpair()
    with ours:
        told = [_message(as_text(settings_of({"server": {"max_inputs": number}}))) for number in (1, 2, 3)]
        ours.sendall(told[0] + told[1] + told[2][:cut])
        orders = ParentChannel(theirs.detach(), UPSTREAMS)
        assert orders.config.load().server.max_inputs == (3 if cut is None else 2)
        reloads = asyncio.Event()
        orders.follow(stop=lambda: None, reload=reloads.set)
        ours.sendall(told[2][cut:] if cut is not None else told[2])
        await asyncio.wait_for(reloads.wait(), 30)
        assert orders.config.load().server.max_inputs == 3
        asyncio.get_running_loop().remove_reader(orders._socket)
        orders._socket.close()


def _message(text: str) -> bytes:
    return len(text).to_bytes(4) + text.encode()


def test_workers_do_not_outlive_their_parent(tmp_path: Path) -> None:
    with start(tmp_path, "--port", "0", *TWO, TMPDIR=str(tmp_path)) as process:
        url = address(tmp_path / "log", process)
        process.kill()
        process.wait(30)
        until(lambda: not answers(url), (tmp_path / "log").read_text)


def test_who_tidies_temporary_directories_is_told_that_theirs_is_in_use(tmp_path: Path) -> None:
    with start(tmp_path, "--port", "0", *TWO, TMPDIR=str(tmp_path)) as process:
        address(tmp_path / "log", process)
        [directory] = tmp_path.glob("embedding-gateway-*")
        descriptor = os.open(directory, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # systemd-tmpfiles takes the same lock
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


def test_workers_need_no_lock_on_their_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none; this machine's do."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with _locked(str(tmp_path)):
        pass


def test_workers_serve_where_there_is_no_room_for_their_metrics(tmp_path: Path) -> None:
    with limited(resource.RLIMIT_FSIZE, 32_000):
        process = start(tmp_path, "--port", "0", *TWO)
    with process:
        url = address(tmp_path / "log", process)
        assert {embed(url, f"{i}").status_code for i in range(20)} == {200}
        assert httpx.get(f"{url}/metrics").status_code == 200
        log = (tmp_path / "log").read_text()
        assert "starting another" not in log
        assert log.count("File too large") == 3, "once by each process"


@pytest.mark.parametrize(
    ("script", "code", "why"),
    [
        ("raise SystemExit(3)", 3, "ended with code 3"),
        ("import os; os.kill(os.getpid(), 9)", 137, "was ended by SIGKILL"),  # as the kernel does when memory is short
    ],
)
async def test_workers_that_cannot_start_stop_the_program_with_their_exit_code(
    tmp_path: Path, script: str, code: int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of({"server": {"workers": 2}})
    with multiprocess(str(tmp_path)), socket.create_server(("127.0.0.1", 0)) as listener:
        broken = Workers(lambda _: [sys.executable, "-c", script], settings, listener)
        assert await broken.run() == code
    assert f"workers cannot start: one {why}" in caplog.text


async def test_a_worker_that_can_no_longer_start_is_tried_less_and_less_often(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Until one is up again: its later end is not a failed start. The system may also have no room for a process."""
    kinds = iter(["up", "no room", *["broken"] * 7, "up", *["broken"] * 2])

    def command(orders: int) -> list[str]:
        kind = next(kinds)
        script = f"import socket; socket.socket(fileno={orders}).send(b'u')" if kind == "up" else "raise SystemExit(3)"
        return [str(tmp_path / "none") if kind == "no room" else sys.executable, "-c", script]

    class Hasty(Workers):
        async def _pause(self, seconds: float) -> None:
            rests.append(seconds)
            if len(rests) == 10:
                self.stop(signal.SIGTERM)

    rests: list[float] = []
    with multiprocess(str(tmp_path)), socket.create_server(("127.0.0.1", 0)) as listener:
        assert await asyncio.wait_for(Hasty(command, settings_of({}), listener).run(), 60) == 0
    assert rests == [1, 2, 4, 8, 16, 30, 30, 30, 1, 2]
    assert "a worker cannot be started: No such file or directory" in caplog.text


@pytest.mark.parametrize("up", [True, False], ids=["up", "still starting"])
async def test_a_worker_that_hangs_is_replaced(
    up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("app.workers.HEARTBEAT_TIMEOUT", 0.5)

    def command(orders: int) -> list[str]:
        report = "orders.send(b'u'); " if up else ""
        script = f"import socket, time; orders = socket.socket(fileno={orders}); {report}time.sleep(60)"
        return [sys.executable, "-c", script]

    with multiprocess(str(tmp_path)), socket.create_server(("127.0.0.1", 0)) as listener:
        hanging = Workers(command, settings_of({}), listener)
        running = asyncio.create_task(hanging.run())
        (first,) = await _started(hanging, running)
        await asyncio.sleep(3)  # time itself: a worker that starts slowly is not killed
        assert (first in hanging._live) != up
        for _ in range(2):
            hanging.stop(signal.SIGTERM)
        await asyncio.wait_for(running, 30)
    assert ("has hung for 1 s and is killed" in caplog.text) == ("starting another" in caplog.text) == up


async def test_a_worker_that_is_well_says_so_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.workers.HEARTBEAT_INTERVAL", 0.01)
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(_message(as_text(settings_of({}))))
        ours.settimeout(30)
        orders = ParentChannel(theirs.detach(), UPSTREAMS)
        orders.start_heartbeat()
        assert b"".join([await asyncio.to_thread(ours.recv, 1) for _ in range(3)]) == b"uuu"
    await asyncio.sleep(0.05)  # the other end is closed: some more are not sent, and that has no event
    orders._socket.close()


async def test_a_heartbeat_that_cannot_be_sent_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the system has no buffer for it. Here the socket is without a peer for a moment."""
    monkeypatch.setattr("app.workers.HEARTBEAT_INTERVAL", 0.01)
    ours, theirs = socket.socketpair()
    with ours, socket.socket(socket.AF_UNIX) as alone:
        ours.sendall(_message(as_text(settings_of({}))))
        ours.settimeout(5)
        orders = ParentChannel(theirs.detach(), UPSTREAMS)
        kept = os.dup(orders._socket.fileno())
        os.dup2(alone.fileno(), orders._socket.fileno())
        orders.start_heartbeat()
        os.dup2(kept, orders._socket.fileno())
        os.close(kept)
        assert await asyncio.to_thread(ours.recv, 1) == b"u"
    orders._socket.close()


@pytest.mark.parametrize("turns", range(1, 6))
async def test_a_stop_while_a_worker_is_about_to_be_started_is_no_trouble(
    tmp_path: Path, turns: int, caplog: pytest.LogCaptureFixture
) -> None:
    with multiprocess(str(tmp_path)), socket.create_server(("127.0.0.1", 0)) as listener:
        waits = Workers(lambda _: [sys.executable, "-c", "import time; time.sleep(60)"], settings_of({}), listener)
        running = asyncio.create_task(waits.run())
        for _ in range(turns):  # of the event loop
            await asyncio.sleep(0)
        waits.stop(signal.SIGTERM)
        for worker in await _started(waits, running):
            worker.process.kill()
        assert await asyncio.wait_for(running, 30) == 0
    assert not caplog.records


async def _started(workers: Workers, running: asyncio.Task[int]) -> set[Any]:
    while not (workers._live or running.done()):
        await asyncio.sleep(0)
    return workers._live
