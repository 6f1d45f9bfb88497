"""A machine that has no memory, thread or file descriptor left: the log says so once, and callers that can be answered
get a 503 they can repeat."""

from __future__ import annotations

import json
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.processes import PATIENCE, Program, address, answers, environment, free_port, metric, serving, start, until

MIB = 2**20


@contextmanager
def starved(process: subprocess.Popen[str], spare: int) -> Iterator[None]:
    """Lets the process have `spare` more bytes of memory; a thread takes 8 MiB for its stack."""
    size = re.search(r"VmSize:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert size
    before = resource.prlimit(process.pid, resource.RLIMIT_AS)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (int(size[1]) * 1024 + spare, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it has ended
            resource.prlimit(process.pid, resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("inputs", "spare", "reason"),
    [
        (["x" * 4000] * 2000, 60 * MIB, "memory"),  # orjson wants twelve times the body
        (["x" * 4000] * 100, 4 * MIB, "threads"),  # a body that is parsed in a thread
        ([f"{i} {'x' * 2000}" for i in range(11)], 4 * MIB, "threads"),  # `lexical` embeds this many in a thread
    ],
    ids=["body to parse", "body for a thread", "upstream's thread"],
)
def test_what_the_system_has_no_room_for_is_a_503_and_is_served_once_it_has(
    tmp_path: Path, inputs: list[str], spare: int, reason: str
) -> None:
    body = {"model": "lexical", "input": inputs, "dimensions": 64}
    with serving(tmp_path) as (url, process), httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE) as client:
        assert client.post("/v1/embeddings", json={"model": "lexical", "input": "warm"}).status_code == 200
        with starved(process, spare):
            for _ in range(3):
                refused = client.post("/v1/embeddings", json=body)
                assert refused.status_code == 503, refused.text
                assert refused.json()["error"]["code"] == "overloaded"
                assert refused.json()["error"]["message"] == f"the gateway is out of {reason}"
                assert refused.headers["retry-after"] == "1"
        assert client.post("/v1/embeddings", json=body).status_code == 200
        assert metric(client.get("/metrics").text, "rejected_requests_total", 'reason="overloaded"') == 3
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert log.count("level=warning") == log.count(f"the gateway is out of {reason}") == 1, log


def test_who_has_no_descriptor_left_says_so_and_at_the_start_that_there_are_few(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "app", "serve", "--port", "0"]
    with log.open("w") as file:
        process = Program(
            ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *command],
            env=environment(EMBEDDING_GATEWAY__SERVER__DRAIN="0s"), cwd=tmp_path, stderr=file, text=True,
        )  # fmt: skip
    few = "64 file descriptors (ulimit -n) are few"
    none = "new connections are closed unanswered (ulimit -n): Too many open files"
    with process, ExitStack() as held:
        url = httpx.URL(address(log, process))
        assert few in log.read_text()
        for _ in range(80):
            held.enter_context(socket.create_connection((url.host, url.port or 80)))
        until(lambda: none in log.read_text(), log.read_text)
        held.close()
        until(lambda: answers(f"{url}/healthz"), log.read_text)
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert (log.read_text().count(few), log.read_text().count(none)) == (1, 1)


def test_where_a_thread_has_no_memory_to_begin_with_it_is_alive_once_there_is_some(tmp_path: Path) -> None:
    """glibc keeps a stack for it, so the system does start the thread."""
    away = {"type": "openai", "base_url": f"http://127.0.0.1:{free_port()}/v1", "api_key": "k", "connect_timeout": "1s"}
    models = {"m": {"deployments": [{"upstream": "away", "model": "m"}]}}
    (tmp_path / "config.yaml").write_text(json.dumps({"upstreams": {"away": away}, "models": models}))
    body = {"model": "m", "input": "x"}
    with start(tmp_path, "--port", "0") as process, httpx.Client(trust_env=False, timeout=5) as client:
        url = address(tmp_path / "log", process)
        for _ in range(5):  # each looks the address up in a thread, which ends
            assert client.post(f"{url}/v1/embeddings", json=body).is_server_error
        with starved(process, 0), suppress(httpx.TimeoutException):
            client.post(f"{url}/v1/embeddings", json=body)
        assert client.get(f"{url}/healthz").status_code == 200
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_it_ends_well_where_no_thread_can_be_started(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, process):
        assert httpx.get(f"{url}/metrics").status_code == 200  # in a thread, so there is a pool to shut down
        with starved(process, 4 * MIB):
            process.terminate()
            assert process.wait(PATIENCE) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_it_starts_without_a_thread_beside_its_own(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, process):
        assert len(list(Path(f"/proc/{process.pid}/task").iterdir())) == 1
