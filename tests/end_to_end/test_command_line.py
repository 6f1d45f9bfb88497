"""The program as users start it: processes, flags, signals, exit codes."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from redis import Redis

from app.cli import main
from app.upstreams import UPSTREAMS
from tests.fakes import FakeBaidu, FakeOllama, FakeOpenAI, OllamaModel, faults
from tests.processes import (
    PATIENCE,
    ROOT,
    Program,
    address,
    answers,
    environment,
    free_port,
    limited,
    metric,
    run,
    serving,
    start,
    start_into,
    until,
)
from tests.redis_server import RedisServer


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


def test_it_serves_where_python_leaves_assertions_out(tmp_path: Path) -> None:
    with serving(tmp_path, PYTHONOPTIMIZE="1") as (url, _):
        assert httpx.get(f"{url}/readyz").status_code == 200


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Handles Ctrl-C as in a terminal. A script's background process ignores it, and so do all its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_signals_are_heard_while_the_program_is_still_being_read(tmp_path: Path, number: signal.Signals) -> None:
    """Process 1 of a container gets no signal without a handler, and a reload must not end it."""
    # Some libraries swallow an exception raised during their import, and orjson crashes.
    keeps = "try: time.sleep(60)\nexcept BaseException: print('lost', flush=True)\n"
    (tmp_path / "uvicorn.py").write_text(f"import time\nprint('reading', flush=True)\n{keeps}")
    command = [sys.executable, "-m", "app", "serve", "--port", "0"]
    env = environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    with Program(
        command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        with process.stdout as said:
            assert said.readline() == "reading\n"
            process.send_signal(signal.SIGHUP)
            process.send_signal(number)
            assert process.wait(PATIENCE) == 128 + number
            assert said.read() == ""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_streams_that_are_closed_are_not_missed(tmp_path: Path, closed: str, workers: str) -> None:
    command = [sys.executable, "-m", "app", "serve", "--port", "0", "--workers", workers]
    with (tmp_path / "log").open("w") as log:
        process = Program(
            ["sh", "-c", f'exec "$@" {closed}', "sh", *command],
            env=environment(EMBEDDING_GATEWAY__SERVER__DRAIN="0s"), cwd=tmp_path, stderr=log, text=True,
        )  # fmt: skip
    with process:
        url = address(tmp_path / "log", process)
        assert httpx.post(f"{url}/v1/embeddings", json={"model": "lexical", "input": "x"}).status_code == 200
        process.terminate()
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_without_a_standard_error_it_serves_without_a_log(tmp_path: Path, workers: str) -> None:
    port = free_port()
    command = [sys.executable, "-m", "app", "serve", "--port", str(port), "--workers", workers]
    env = environment(EMBEDDING_GATEWAY__SERVER__DRAIN="0s")
    url = f"http://127.0.0.1:{port}"
    with Program(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], env=env, cwd=tmp_path, text=True) as process:
        until(lambda: process.poll() is not None or answers(f"{url}/healthz"), lambda: "no answer")
        assert process.poll() is None
        assert httpx.post(f"{url}/v1/embeddings", json={"model": "lexical", "input": "x"}).status_code == 200
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_check_needs_no_standard_error(tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "app", "check"]
    checked = subprocess.run(command, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=False)
    assert checked.returncode == 0
    assert "lexical" in checked.stdout


def test_where_there_is_nothing_to_put_in_place_of_a_closed_stream_the_program_starts_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example in a jail without /dev."""
    monkeypatch.setattr(os, "devnull", str(tmp_path / "none"))
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0


def test_several_workers_answer_and_one_scrape_tells_of_all(tmp_path: Path) -> None:
    with serving(tmp_path, "--workers", "2") as (url, process):
        for i in range(40):  # a new connection each, so that both workers get some requests
            assert httpx.post(f"{url}/v1/embeddings", json={"model": "lexical", "input": f"{i}"}).status_code == 200
        text = httpx.get(f"{url}/metrics").text
        assert metric(text, "requests_total") == 40
        assert metric(text, "upstream_available") == 1, "the gateway has one such deployment, not one per worker"
        process.terminate()
        assert process.wait(30) == 0


def test_metrics_and_docs_move_to_a_port_of_their_own(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, EMBEDDING_GATEWAY__SERVER__METRICS_PORT=str(port)) as (url, _):
        assert httpx.get(f"{url}/metrics").status_code == 404
        assert httpx.get(f"{url}/docs").status_code == 404
        assert "embedding_gateway" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert httpx.get(f"http://127.0.0.1:{port}/docs").status_code == 200


def test_what_is_not_http_is_one_line_of_our_own_and_counted_on_each_port(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, EMBEDDING_GATEWAY__SERVER__METRICS_PORT=str(port)) as (url, _):
        for each in (int(url.rpartition(":")[2]), port) * 3:
            with socket.create_connection(("127.0.0.1", each), timeout=PATIENCE) as connection:
                connection.sendall(b"PROXY TCP4 10.0.0.1 10.0.0.2 5 6\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                assert connection.recv(12) == b"HTTP/1.1 400"
        exposed = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert metric(exposed, "rejected_requests_total", 'reason="invalid_http"') == 6
    log = (tmp_path / "log").read_text()
    assert log.lower().count("invalid http") == 1
    assert "invalid HTTP from 127.0.0.1: the PROXY protocol (v1), which is not supported" in log


def test_sigterm_fails_readiness_at_once_keeps_listening_and_finishes_what_is_in_flight(tmp_path: Path) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        env = {"OPENAI_API_KEY": "sk-fake", "OPENAI_BASE_URL": fake.url + "/v1"}
        with start(tmp_path, "--port", "0", EMBEDDING_GATEWAY__SERVER__DRAIN="1s", **env) as process:
            url = address(tmp_path / "log", process)
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
                assert ready.headers["connection"] == "close", "who comes again is to come to another one"
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


def test_a_host_that_can_be_no_name_is_one_readable_line(tmp_path: Path) -> None:
    done = run("serve", "--host", "a..b", "--port", "0", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "cannot listen on a..b:0: not a host name\n")


def test_workers_without_a_temporary_directory_are_one_readable_line(tmp_path: Path) -> None:
    with limited(resource.RLIMIT_FSIZE, 0):
        done = run("serve", "--workers", "2", "--port", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("several workers need a temporary directory: No usable temporary")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [("reader gone", 141, ""), ("full disk", 2, "cannot write: No space left on device\n")],
)
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_check_whose_answer_nobody_takes_ends_without_ado(
    tmp_path: Path, kind: str, code: int, said: str, buffered: str
) -> None:
    command = [sys.executable, "-m", "app", "check"]
    env = environment(PYTHONUNBUFFERED=buffered)
    with _taking_nothing(kind) as output:
        done = subprocess.run(
            command, cwd=tmp_path, env=env, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (code, said)


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


def test_check_shows_what_all_deployments_of_a_model_take(tmp_path: Path) -> None:
    """As in `/v1/models`: an input that is too long for one of them is refused."""
    config = """
upstreams: {oai: {type: openai, api_key: k}, zh: {type: baidu, api_key: k, secret_key: k}}
models:
  docs:
    deployments:
      - {upstream: oai, model: text-embedding-3-small, space: ours}
      - {upstream: zh, model: bge-large-zh, space: ours}
"""
    (tmp_path / "config.yaml").write_text(config)
    lines = [line.split() for line in run("check", cwd=tmp_path).stdout.splitlines()]
    assert ["docs", "1536", "16", "512", "ours", "oai/text-embedding-3-small,", "zh/bge-large-zh"] in lines


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


def test_check_prints_nothing_of_an_upstreams_that_a_terminal_acts_on(tmp_path: Path) -> None:
    models = {"a\x1b]0;title\x07": OllamaModel(4, 64, "bert"), "b\u202egnp": OllamaModel(4, 64, "bert")}
    with FakeOllama(models) as fake:
        fake.fail(faults.http_error(403, "no\x1b[31m"), times=None, path="/api/embed")
        done = run("check", "--probe", env={"OLLAMA_HOST": fake.url}, cwd=tmp_path)
    assert "a\\x1b]0;title\\x07" in done.stdout
    assert "b\\u202egnp" in done.stderr
    assert all(line.isprintable() for line in (done.stdout + done.stderr).split("\n"))


def test_check_probe_leaves_no_trace_in_the_cache_that_it_is_configured_with(tmp_path: Path) -> None:
    """A token that was fetched for it would otherwise stay in Redis for a month."""
    vendor = FakeBaidu(api_key="ak", secret_key="sk", access_key="a", iam_secret_key="b", v2_key="bce-v3/ALTAK-x/y")
    with RedisServer() as server, vendor as fake, Redis.from_url(server.url) as redis:
        (tmp_path / "config.yaml").write_text(f"""
cache: {{disk: {{path: {tmp_path / "cache"}}}, redis: {{url: "{server.url}", timeout: 2s}}}}
upstreams: {{baidu: {{type: baidu, api_key: ak, secret_key: sk, base_url: "{fake.url}"}}}}
""")
        done = run("check", "--probe", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert fake.token_requests == 1
        assert redis.keys("*") == []
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_check_probe_waits_for_a_deployment_no_longer_than_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """However long its upstream may take."""
    monkeypatch.setattr("app.check.PROBE_TIMEOUT", 0.05)
    with FakeOpenAI(api_key=None, models={"m": 8}) as fake:
        fake.fail(faults.hang)
        (tmp_path / "config.yaml").write_text(
            f'upstreams: {{hung: {{type: openai, base_url: "{fake.url}/v1", timeout: 1s}}}}\n'
        )
        with pytest.raises(SystemExit) as ended:
            main(["check", "--config", str(tmp_path / "config.yaml"), "--probe"])
    assert ended.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1] == "hung/m: no answer within 0.05 s"


def test_check_probe_fails_where_an_upstream_cannot_be_reached(tmp_path: Path) -> None:
    env = {"OLLAMA_HOST": "127.0.0.1:9"}
    shown, probed = run("check", env=env, cwd=tmp_path), run("check", "--probe", env=env, cwd=tmp_path)
    assert (shown.returncode, probed.returncode) == (0, 2)
    assert "ollama: cannot list its models: " in probed.stderr


def test_check_probe_fails_where_a_server_has_neither_a_list_nor_a_configured_model(tmp_path: Path) -> None:
    """Its base_url is probably wrong."""
    with FakeOpenAI(api_key=None) as fake:
        env = {"OPENAI_API_KEY": "sk-fake", "OPENAI_BASE_URL": fake.url + "/elsewhere"}
        done = run("check", "--probe", env=env, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == (
            "openai: it has no list of models at its base_url, and none is configured for it"
        )


def test_check_finds_that_nothing_is_served(tmp_path: Path) -> None:
    """Unless an upstream is away."""
    with FakeOpenAI(api_key=None) as fake:
        config = f'upstreams: {{up: {{type: openai, base_url: "{fake.url}/elsewhere"}}}}'
        (tmp_path / "config.yaml").write_text(config)
        done = run("check", cwd=tmp_path)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "config.yaml: upstreams: no model is served")
    away = run("check", cwd=tmp_path)
    assert (away.returncode, "no model is served" in away.stderr) == (0, False)


def test_check_shows_what_is_hidden_behind_an_alias_of_another_model(tmp_path: Path) -> None:
    config = """
upstreams: {lex: {type: lexical}, oai: {type: openai, api_key: k}}
models: {docs: {aliases: [text-embedding-3-small], deployments: [{upstream: lex, model: lexical}]}}
"""
    (tmp_path / "config.yaml").write_text(config)
    shown = [line.split("  ")[0] for line in run("check", cwd=tmp_path).stdout.splitlines()]
    assert "oai/text-embedding-3-small" in shown
    assert "oai/text-embedding-3-large" not in shown, "its plain name leads there"


def test_check_finds_models_that_serve_no_plain_request(tmp_path: Path) -> None:
    config = """
upstreams:
  lexical: {type: lexical}
  oai: {type: openai, api_key: k}
  ds: {type: dashscope, mode: compatible, api_key: k}
models:
  short: {dimensions: 7, deployments: [{upstream: lexical, model: lexical}]}
  ada: {aliases: [old], dimensions: 100, deployments: [{upstream: oai, model: text-embedding-ada-002}]}
  query: {input_type: query, deployments: [{upstream: ds, model: text-embedding-v3}]}
  fit: {dimensions: 256, deployments: [{upstream: oai, model: text-embedding-3-small}]}
"""
    (tmp_path / "config.yaml").write_text(config)
    done = run("check", cwd=tmp_path)
    assert done.returncode == 2
    wrong = [line.split(": ")[:2] for line in done.stderr.splitlines()]
    assert wrong == [["config.yaml", f"models.{name}"] for name in ("short", "ada", "query")]
    assert "model 'ada' gives only 1536, not 100" in done.stderr, "by the name it is asked for"


@pytest.mark.parametrize(
    "another", ["", ', away: {type: ollama, base_url: "http://127.0.0.1:9"}'], ids=["", "one away"]
)
def test_check_finds_deployments_of_a_model_that_turn_out_to_be_of_different_spaces(
    another: str, tmp_path: Path
) -> None:
    """Even while an upstream that has nothing to do with it is down."""
    one, other = (FakeOllama({"m:latest": OllamaModel(size, 64, "bert")}) for size in (4, 8))
    with one:
        with other:
            (tmp_path / "config.yaml").write_text(f"""
upstreams: {{one: {{type: ollama, base_url: "{one.url}"}}, other: {{type: ollama, base_url: "{other.url}"}}{another}}}
models: {{docs: {{deployments: [{{upstream: one, model: m}}, {{upstream: other, model: m}}]}}}}
""")
            done = run("check", cwd=tmp_path)
        told = (
            "config.yaml: models.docs.deployments: its deployments are in different vector spaces;"
            " only one/m would serve it"
        )
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, told)
        assert run("check", cwd=tmp_path).returncode == 0, "nobody says now which space that one is of"


def test_check_finds_models_that_a_key_names_and_nobody_serves(tmp_path: Path) -> None:
    config = """
upstreams: {up: {type: ollama, base_url: "http://127.0.0.1:9"}, lexical: {type: lexical}}
auth: {keys: {team: {key: k, models: [lexicle, lexical]}}}
"""
    (tmp_path / "config.yaml").write_text(config)
    away = run("check", cwd=tmp_path)
    assert away.returncode == 0, "it may be one of an upstream that is away"
    (tmp_path / "config.yaml").write_text(config.replace('up: {type: ollama, base_url: "http://127.0.0.1:9"}, ', ""))
    done = run("check", cwd=tmp_path)
    told = "config.yaml: auth.keys.team.models: no model lexicle is served now\n"
    assert (done.returncode, done.stderr) == (2, told)


@pytest.mark.parametrize("arguments", [("--help",), ("serve", "--help"), ("check", "--help")])
def test_help_fits_a_screen_and_names_what_matters(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0
    assert 5 < len(done.stdout.splitlines()) <= 40
    if len(arguments) == 1:
        assert "DASHSCOPE_API_KEY" in done.stdout
        assert "curl" in done.stdout


def test_the_flag_is_named_when_it_is_what_is_wrong(tmp_path: Path) -> None:
    done = run("serve", "--port", "99999", "--workers", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert sorted(done.stderr.splitlines()) == [
        "--port: must be a whole number, 0 to 65535",
        "--workers: must be a whole number, 1 to 256",
    ]


def test_an_upstream_that_cannot_list_its_models_is_said_once(tmp_path: Path) -> None:
    done = run("check", env={"OLLAMA_HOST": f"127.0.0.1:{free_port()}"}, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.count("cannot list its models") == 1
    assert done.stderr.startswith("upstream ollama: cannot list its models: ")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_whoever_waits_for_the_line_with_the_address_can_connect_there(tmp_path: Path, workers: str) -> None:
    read, write = os.pipe()
    with os.fdopen(read) as log, start_into(write, tmp_path, "--port", "0", "--workers", workers) as process:
        os.close(write)
        url = next(found[1] for line in log if (found := re.search(r"base_url (http://\S+)/v1", line)))
        assert answers(url + "/healthz")
        process.terminate()
        rest = log.read()
        assert "base_url" not in rest, "it is said once"


def test_listening_everywhere_an_address_is_shown_that_can_be_used(tmp_path: Path) -> None:
    with serving(tmp_path, "--host", "0.0.0.0") as (url, _):
        assert url.startswith("http://127.0.0.1:")
        log = (tmp_path / "log").read_text()
        assert "docs at /docs, listening on all addresses of IPv4" in log
        assert "anybody who reaches 0.0.0.0 can embed at your expense" in log


@pytest.mark.parametrize(("host", "everywhere"), [("127.1", False), ("0", True)])
def test_who_can_reach_it_is_told_by_the_address_it_listens_on_however_that_is_written(
    tmp_path: Path, host: str, everywhere: bool
) -> None:
    with serving(tmp_path, "--host", host):
        log = (tmp_path / "log").read_text()
        assert ("listening on all addresses" in log) == everywhere
        assert ("anybody who reaches" in log) == everywhere


def test_half_of_what_switches_an_upstream_on_is_warned_of(tmp_path: Path) -> None:
    env = {"BAIDU_API_KEY": "canary", "OPENAI_BASE_URL": "http://canary", "DASHSCOPE_API_KEY": "sk-canary"}
    with serving(tmp_path, **env):
        log = (tmp_path / "log").read_text()
        told = re.findall(r"event='?\"?([A-Z_]+ alone has no effect: [^\"\n]*)\"", log)
        assert told == [
            "BAIDU_API_KEY alone has no effect: baidu is switched on by BAIDU_API_KEY with BAIDU_SECRET_KEY",
            "OPENAI_BASE_URL alone has no effect: openai is switched on by OPENAI_API_KEY (OPENAI_BASE_URL)",
        ]
        assert "canary" not in log


def test_help_names_every_variable_that_switches_an_upstream_on(tmp_path: Path) -> None:
    shown = run("--help", cwd=tmp_path).stdout
    for kind in UPSTREAMS.values():
        assert kind.switched_on_by in shown
        environ = dict.fromkeys(kind.variables, "some-value")
        assert bool(environ) == (kind.environment(environ) is not None), kind.name


def test_a_proxy_of_the_environment_is_given_no_key_and_no_text(tmp_path: Path) -> None:
    """Only a proxy in the configuration is used: the variables may be meant for something else."""
    with FakeOpenAI(api_key="sk-fake") as fake, FakeOpenAI() as proxy:
        names = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")
        env = dict.fromkeys(names, proxy.url) | {"OPENAI_API_KEY": "sk-fake", "OPENAI_BASE_URL": fake.url + "/v1"}
        with serving(tmp_path, **env) as (url, _):
            response = httpx.post(f"{url}/v1/embeddings", json={"model": "text-embedding-3-small", "input": "x"})
        assert response.status_code == 200
        assert fake.calls
        assert not proxy.requests


@contextmanager
def _taking_nothing(kind: str) -> Iterator[int]:
    """A file descriptor whose log lines reach nobody."""
    if kind == "full disk":
        with Path("/dev/full").open("w") as full:
            yield full.fileno()
        return
    reader, writer = os.pipe()
    if kind == "reader gone":
        os.close(reader)
    yield writer
    os.close(writer)
    if kind != "reader gone":
        os.close(reader)


@pytest.mark.parametrize("kind", ["pipe nobody reads", "reader gone", "full disk"])
def test_a_log_that_takes_nothing_holds_up_neither_requests_nor_the_end(kind: str, tmp_path: Path) -> None:
    file, port = tmp_path / "config.yaml", free_port()
    file.write_text("upstreams: {built-in: {type: lexical}}")
    url = f"http://127.0.0.1:{port}"
    with _taking_nothing(kind) as log, start_into(log, tmp_path, "--port", str(port)) as process:
        until(lambda: answers(f"{url}/healthz") or None, process.poll)
        # Each mistake in a configuration is a message: these are far more than a pipe holds.
        file.write_text("\n".join(f"no_such_setting_{i}: {{}}" for i in range(3000)))
        process.send_signal(signal.SIGHUP)
        with httpx.Client(timeout=10) as client:
            until(lambda: metric(client.get(f"{url}/metrics").text, "config_valid") == 0 or None, lambda: "no reload")
            for i in range(20):
                response = client.post(f"{url}/v1/embeddings", json={"model": "lexical", "input": f"{i}"})
                assert response.status_code == 200
        process.terminate()
        assert process.wait(30) == 0
