"""The program as it is started: processes, flags, signals, exit codes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.fakes import FakeOpenAI, faults

ROOT = Path(__file__).parent.parent.parent


def environment(**more: str) -> dict[str, str]:
    """What the program may see: no vendor's variables but those a test sets, and no machine's proxy."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**keep, "PYTHONPATH": str(ROOT), **more}


def run(*arguments: str, env: Mapping[str, str] | None = None, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        env=environment(**(env or {})), cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@contextmanager
def serving(cwd: Path, *arguments: str, **env: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A served gateway on a free port: its URL and its process. Its log is in `log` of `cwd`."""
    with (cwd / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--port", "0", *arguments],
            env=environment(EMBEDDING_GATEWAY__SERVER__DRAIN="0s", **env), cwd=cwd, stderr=log, text=True,
        )  # fmt: skip
        try:
            yield _url(cwd / "log", process), process
        finally:
            process.terminate()
            process.wait(30)


def _url(log: Path, process: subprocess.Popen[str]) -> str:
    """The address that the program says it has, once it answers there."""
    with httpx.Client(trust_env=False) as client:
        for _ in range(300):
            said = re.search(r"base_url (http://\S+)/v1", log.read_text())
            if said:
                try:
                    client.get(said[1] + "/healthz")
                except httpx.TransportError:
                    pass
                else:
                    return said[1]
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            break
    raise AssertionError(log.read_text())


def test_with_nothing_configured_the_built_in_model_serves(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, _):
        response = httpx.post(f"{url}/v1/embeddings", json={"model": "lexical", "input": "hello"})
        assert response.status_code == 200
        assert len(response.json()["data"][0]["embedding"]) == 512


def test_with_a_vendors_key_in_the_environment_its_models_are_simply_there(tmp_path: Path) -> None:
    env = {"DASHSCOPE_API_KEY": "sk-canary", "BAIDU_API_KEY": "canary", "BAIDU_SECRET_KEY": "canary", "REDIS_URL": ""}
    with serving(tmp_path, **env) as (url, _):
        names = {model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]}
        assert {"text-embedding-v3", "dashscope/text-embedding-v4", "embedding-v1", "baidu/tao-8k"} <= names
        assert "lexical" not in names
    assert "canary" not in (tmp_path / "log").read_text()


def test_several_workers_answer_and_one_scrape_tells_of_all(tmp_path: Path) -> None:
    with serving(tmp_path, "--workers", "2") as (url, process):
        for i in range(40):  # a new connection each, so that both workers get some
            assert httpx.post(f"{url}/v1/embeddings", json={"model": "lexical", "input": f"{i}"}).status_code == 200
        text = httpx.get(f"{url}/metrics").text
        counted = re.findall(r"^embedding_gateway_requests_total\{.*\} (\S+)$", text, re.MULTILINE)
        assert sum(map(float, counted)) == 40
        process.terminate()
        assert process.wait(30) == 0


def test_metrics_and_docs_move_to_a_port_of_their_own(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(tmp_path, EMBEDDING_GATEWAY__SERVER__METRICS_PORT=str(port)) as (url, _):
        assert httpx.get(f"{url}/metrics").status_code == 404
        assert httpx.get(f"{url}/docs").status_code == 404
        assert "embedding_gateway" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert httpx.get(f"http://127.0.0.1:{port}/docs").status_code == 200


def test_sigterm_fails_readiness_at_once_keeps_listening_and_finishes_what_is_in_flight(tmp_path: Path) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        env = {"OPENAI_API_KEY": "sk-fake", "OPENAI_BASE_URL": fake.url + "/v1"}
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "app", "serve", "--port", "0"],
                env=environment(EMBEDDING_GATEWAY__SERVER__DRAIN="1s", **env), cwd=tmp_path, stderr=log, text=True,
            )  # fmt: skip
            url = _url(tmp_path / "log", process)
            fake.hold()
            with httpx.Client(timeout=30) as client, socket.create_connection(_address(url)) as raw:
                body = b'{"model":"text-embedding-3-small","input":"in flight"}'
                raw.sendall(
                    b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
                )
                fake.wait_for_calls(1)
                process.send_signal(signal.SIGTERM)
                ready = client.get(f"{url}/readyz")
                while ready.status_code == 200:
                    ready = client.get(f"{url}/readyz")
                assert ready.status_code == 503
                assert ready.json()["status"] == "draining"
                assert httpx.get(f"{url}/healthz").status_code == 200, "still listening, for new connections too"
                fake.release()
                assert raw.recv(65536).startswith(b"HTTP/1.1 200")
            assert process.wait(30) == 0


def _address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def test_a_port_that_is_taken_is_one_readable_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--port", str(port), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_mistakes_in_the_configuration_are_a_line_each_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("server: {prot: 1}\nupstreams: {x: {type: openay}}\n")
    for command in ("check", "serve"):
        done = run(command, cwd=tmp_path)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 2
        assert "config.yaml: server.prot: unknown key; did you mean port?" in done.stderr
        assert "Traceback" not in done.stderr


def test_check_shows_what_would_be_served(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "upstreams: {ds: {type: dashscope, api_key: sk-canary}}\n"
        "models: {docs: {aliases: [text-embedding-3-small], deployments: [{upstream: ds, model: text-embedding-v3}]}}\n"
    )
    done = run("check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["docs", "1024", "10", "8192", "dashscope/text-embedding-v3", "ds/text-embedding-v3"] in lines
    assert any(line[:4] == ["text-embedding-3-small", "(alias", "of", "docs)"] for line in lines)
    assert "canary" not in done.stdout + done.stderr


def test_check_probe_embeds_on_every_deployment_and_tells_what_is_wrong(tmp_path: Path) -> None:
    with FakeOpenAI(api_key="sk-right") as fake:
        env = {"OPENAI_API_KEY": "sk-right", "OPENAI_BASE_URL": fake.url + "/v1"}
        good = run("check", "--probe", env=env, cwd=tmp_path)
        assert good.returncode == 0, good.stderr
        assert "probe openai/text-embedding-3-small: ok" in good.stdout
        assert len(fake.calls) == good.stdout.count(": ok")
        fake.fail(faults.vendor_error("auth"), times=None)
        bad = run("check", "--probe", env=env, cwd=tmp_path)
        assert bad.returncode == 2
        assert "openai/text-embedding-3-small: upstream_auth: " in bad.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("serve", "--help"), ("check", "--help")])
def test_help_fits_a_screen_and_names_what_matters(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0
    assert 5 < len(done.stdout.splitlines()) <= 40
    if len(arguments) == 1:
        assert "DASHSCOPE_API_KEY" in done.stdout
        assert "curl" in done.stdout
