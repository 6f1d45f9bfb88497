"""A new configuration while the program runs: applied whole or not at all, keeping what was learned and cached."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app.catalog import Model
from app.clock import SystemClock
from app.config import Settings
from app.config.load import ConfigError
from app.config.source import ConfigSource
from app.errors import Overloaded, UpstreamError
from app.gateway import Gateway
from app.main import create_app
from app.metrics import multiprocess
from app.pipeline.admit import Admission
from app.pipeline.health import FAILURES
from app.upstreams import UPSTREAMS
from app.upstreams.openai import unlisted_model
from tests.fakes import FakeOpenAI, faults
from tests.harness import Running, running, settings_of
from tests.processes import Program, address, environment, free_port, metric, serving, until

MODEL = "text-embedding-3-small"


def config(fake: FakeOpenAI, **models: Any) -> dict[str, Any]:
    """A configuration with one upstream, and its models by public name."""
    return {
        "upstreams": {"up": {"type": "openai", "api_key": "sk-fake", "base_url": fake.url + "/v1"}},
        "models": {
            name: {"deployments": [{"upstream": "up", "model": MODEL}], **settings} for name, settings in models.items()
        },
    }


def write(directory: Path, values: Mapping[str, Any] | str) -> None:
    """Replaces the file in one step, as editors and Kubernetes do."""
    new = directory / "config.yaml.new"
    new.write_text(values if isinstance(values, str) else yaml.safe_dump(dict(values)))
    new.rename(directory / "config.yaml")


class Hasty(SystemClock):
    """Sleeps no longer than 20 ms."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.02))


@contextmanager
def watched(directory: Path, values: Mapping[str, Any]) -> Iterator[Running]:
    """A gateway that follows the directory's `config.yaml` and checks it all the time."""
    write(directory, values)
    source = ConfigSource("config.yaml", {}, UPSTREAMS, directory)
    source.load()  # the program does so before it serves
    with running(values, source=source, clock=Hasty()) as gateway:
        yield gateway


def names(gateway: Running) -> set[str]:
    return {model["id"] for model in gateway.get("/v1/models").json()["data"]}


def until_reloads(gateway: Running, result: str, count: int) -> None:
    def seen() -> bool:
        return gateway.metric("config_reloads_total", result=result) >= count

    until(seen, lambda: gateway.get("/metrics").text)


def test_a_changed_file_is_in_force_soon_and_memory_connections_and_limits_stay(tmp_path: Path) -> None:
    with FakeOpenAI(api_key="sk-fake", max_batch=4) as fake, watched(tmp_path, config(fake, old={})) as gateway:
        gateway.post({"model": "old", "input": [f"text {i}" for i in range(9)]})
        learned = gateway.app.gateway.names["old"].deployments[0].limits
        upstream = gateway.app.gateway.upstreams["up"]
        write(tmp_path, config(fake, new={}))
        until_reloads(gateway, "ok", 1)
        assert "new" in names(gateway)
        assert "old" not in names(gateway)
        assert gateway.app.gateway.names["new"].deployments[0].limits is learned
        assert gateway.app.gateway.upstreams["up"] is upstream
        calls = len(fake.calls)
        again = gateway.post({"model": "new", "input": "text 3"})
        assert again.headers["x-embedding-cache"] == "hit"
        assert gateway.post({"model": "new", "input": "another text"}).status_code == 200
        assert len(fake.calls) == calls + 1
        assert gateway.metric("config_valid") == 1


def test_a_token_limit_that_was_learned_stays_over_a_reload(tmp_path: Path) -> None:
    with (
        FakeOpenAI(api_key="sk-fake", max_tokens_per_request=50) as fake,
        watched(tmp_path, config(fake, old={})) as up,
    ):
        up.post({"model": "old", "input": [f"old text {i}" for i in range(30)]})
        write(tmp_path, config(fake, new={}))
        until_reloads(up, "ok", 1)
        before = len(fake.calls)
        assert up.post({"model": "new", "input": [f"new text {i}" for i in range(30)]}).status_code == 200
        assert [call.status for call in fake.calls[before:]] == [200] * (len(fake.calls) - before)
        assert len(fake.calls) - before > 1


def test_an_upstream_that_is_gone_leaves_the_metrics_and_one_that_changed_is_a_new_one(tmp_path: Path) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        values = config(fake, docs={})
        values["upstreams"]["extra"] = {"type": "lexical"}
        with watched(tmp_path, values) as gateway:
            upstream = gateway.app.gateway.upstreams["up"]
            assert gateway.metric("upstream_available", upstream="extra") == 1
            del values["upstreams"]["extra"]
            values["upstreams"]["up"]["timeout"] = "7s"
            write(tmp_path, values)
            until_reloads(gateway, "ok", 1)
            assert gateway.app.gateway.upstreams["up"] is not upstream
            assert gateway.post({"model": "docs", "input": "text"}).status_code == 200

            def forgotten() -> bool:
                return 'upstream_available{model="lexical"' not in gateway.get("/metrics").text

            until(forgotten, lambda: gateway.get("/metrics").text)


def test_a_list_that_cannot_be_had_while_its_upstream_is_changed_takes_no_model_away(tmp_path: Path) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake, FakeOpenAI() as other, watched(tmp_path, config(fake)) as gateway:
        served = names(gateway)
        for each in (fake, other):
            each.fail(faults.http_error(502, b"bad gateway"), times=None, path="/models")
        changed = config(fake)
        changed["upstreams"]["up"]["timeout"] = "20s"
        write(tmp_path, changed)
        until_reloads(gateway, "ok", 1)
        assert gateway.get("/readyz").json()["upstreams"]["up"]["status"] == "down"
        assert names(gateway) == served
        assert gateway.post({"model": MODEL, "input": "a text"}).status_code == 200
        write(tmp_path, config(other))
        until_reloads(gateway, "ok", 2)
        assert names(gateway) == set(), "another server may have others"


def test_a_request_in_flight_ends_on_the_configuration_it_began_on(tmp_path: Path) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake, watched(tmp_path, config(fake, docs={})) as gateway:
        fake.hold()
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(gateway.post({"model": "docs", "input": "in flight"})))
        thread.start()
        fake.wait_for_calls(1)
        values = config(fake, other={})
        values["upstreams"]["up"]["timeout"] = "9s"
        write(tmp_path, values)
        until_reloads(gateway, "ok", 1)
        assert gateway.post({"model": "docs", "input": "x"}).status_code == 404
        fake.release()
        thread.join(20)
        assert answers[0].status_code == 200
        assert answers[0].json()["model"] == "docs"


def test_callers_keys_change_with_the_file(tmp_path: Path) -> None:
    values: dict[str, Any] = {"upstreams": {"built-in": {"type": "lexical"}}, "auth": {"keys": {"a": {"key": "first"}}}}
    with watched(tmp_path, values) as gateway:
        body = {"model": "lexical", "input": "x"}
        assert gateway.post(body, api_key="first").status_code == 200
        values["auth"] = {"keys": {"a": {"key": "second"}}}
        write(tmp_path, values)
        until_reloads(gateway, "ok", 1)
        assert gateway.post(body, api_key="first").status_code == 401
        assert gateway.post(body, api_key="second").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_a_file_that_no_longer_has_keys_opens_the_gateway_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str
) -> None:
    values: dict[str, Any] = {"upstreams": {"built-in": {"type": "lexical"}}, "auth": {"keys": {"a": {"key": "k"}}}}
    values["server"] = {"host": host}
    with watched(tmp_path, values) as gateway:
        values["server"]["max_inputs"] = 2
        write(tmp_path, values)
        until_reloads(gateway, "ok", 1)
        assert "anybody who reaches" not in caplog.text
        del values["auth"]
        write(tmp_path, values)
        until_reloads(gateway, "ok", 2)
        assert gateway.post({"model": "lexical", "input": "x"}).status_code == 200
        assert caplog.text.count(f"no auth.keys: anybody who reaches {host} can embed at your expense") == 1


@pytest.mark.parametrize("text", ["", "# auth: {keys: {a: {key: k}}}\n", "---\n", "{}\n"])
def test_a_file_that_was_emptied_changes_nothing_and_opens_the_gateway_to_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    values = {"upstreams": {"built-in": {"type": "lexical"}}, "auth": {"keys": {"a": {"key": "k"}}}}
    with watched(tmp_path, values) as gateway:
        write(tmp_path, text)
        until_reloads(gateway, "failed", 1)
        assert "configuration not changed: config.yaml: is empty" in caplog.text
        assert gateway.post({"model": "lexical", "input": "x"}).status_code == 401


def test_a_file_may_be_empty_at_the_start_and_stay_so(tmp_path: Path) -> None:
    write(tmp_path, "# all as it comes\n")
    source = ConfigSource("config.yaml", {}, UPSTREAMS, tmp_path)
    assert source.load().upstreams
    assert source.load().upstreams
    write(tmp_path, "upstreams: {built-in: {type: lexical}}\n")
    assert source.load().upstreams
    write(tmp_path, "# all as it comes\n")
    with pytest.raises(ConfigError, match="is empty"):
        source.load()


def test_a_bad_file_changes_nothing_and_every_mistake_is_a_line_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake, watched(tmp_path, config(fake, docs={})) as gateway:
        before = gateway.app.gateway
        write(tmp_path, "server: {prot: 1}\nupstreams: {x: {type: openay, api_key: sk-canary}}\n")
        until_reloads(gateway, "failed", 1)
        told = [record.getMessage() for record in caplog.records if "configuration not changed" in record.getMessage()]
        assert len(told) == 2
        assert "config.yaml: server.prot: unknown key; did you mean port?" in told[0] + told[1]
        assert "sk-canary" not in caplog.text
        assert gateway.metric("config_valid") == 0
        assert gateway.app.gateway is before
        assert gateway.post({"model": "docs", "input": "x"}).status_code == 200
        write(tmp_path, config(fake, docs={}, more={}))
        until_reloads(gateway, "ok", 1)
        assert gateway.metric("config_valid") == 1
        assert "more" in names(gateway)


def test_a_gateway_that_cannot_start_is_closed_and_the_one_in_force_keeps_what_they_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Gateway] = []
    closed: list[tuple[Gateway, Gateway | None]] = []
    close = Gateway.aclose

    async def start(self: Gateway) -> None:
        started.append(self)
        raise RuntimeError("cannot start")

    async def aclose(self: Gateway, successor: Gateway | None = None) -> None:
        closed.append((self, successor))
        await close(self, successor)

    with FakeOpenAI(api_key="sk-fake") as fake, watched(tmp_path, config(fake, docs={})) as gateway:
        before = gateway.app.gateway
        assert gateway.post({"model": "docs", "input": "x"}).status_code == 200
        with monkeypatch.context() as patched:
            patched.setattr(Gateway, "start", start)
            patched.setattr(Gateway, "aclose", aclose)
            write(tmp_path, config(fake, docs={}, more={}))
            until_reloads(gateway, "failed", 1)
        assert started
        assert closed == [(each, before) for each in started]
        assert gateway.app.gateway is before
        assert gateway.metric("config_valid") == 0
        assert gateway.post({"model": "docs", "input": "y"}).status_code == 200


def test_a_gateway_that_cannot_start_leaves_alone_what_queues_under_a_name_it_would_have_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(_self: Gateway) -> None:
        raise RuntimeError("cannot start")

    with FakeOpenAI(api_key="sk-fake") as fake:
        values = config(fake, docs={}) | {"server": {"request_timeout": 10}}
        values["upstreams"]["up"]["requests_per_minute"] = 20
        values["models"]["docs"]["deployments"][0]["weight"] = 2  # so that no other name shares its queue
        with watched(tmp_path, values) as gateway, ThreadPoolExecutor() as threads:
            assert gateway.post({"model": "docs", "input": "goes at once"}).status_code == 200
            waits = threads.submit(gateway.post, {"model": "docs", "input": "goes in three seconds"})
            until(lambda: gateway.metric("queued_inputs") == 1, lambda: gateway.get("/metrics").text)
            monkeypatch.setattr(Gateway, "start", start)
            write(tmp_path, {**values, "models": {}})
            until_reloads(gateway, "failed", 1)
            assert waits.result().status_code == 200


def test_a_file_that_is_gone_is_waited_for_and_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake, watched(tmp_path, config(fake, docs={})) as gateway:
        (tmp_path / "config.yaml").unlink()
        gateway.call(_reload(gateway))
        until_reloads(gateway, "failed", 1)
        assert gateway.post({"model": "docs", "input": "x"}).status_code == 200


def test_a_file_that_came_after_the_start_is_followed_and_opens_the_gateway_to_nobody_when_it_is_gone(
    tmp_path: Path,
) -> None:
    source = ConfigSource(None, {}, UPSTREAMS, tmp_path)
    assert source.load().auth is None
    assert source.signature() is None
    write(tmp_path, {"upstreams": {"built-in": {"type": "lexical"}}, "auth": {"keys": {"team": {"key": "k"}}}})
    assert source.load().auth is not None
    assert source.loaded == source.signature() is not None
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml: no such file"):
        source.load()


def test_a_file_that_may_be_read_again_or_was_copied_with_its_time_is_another(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("one")
    source = ConfigSource("config.yaml", {}, UPSTREAMS, tmp_path)
    before, times = source.signature(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)

    def differs(change: Callable[[], object]) -> bool:
        change()
        return source.signature() != before

    def copied() -> None:
        file.write_text("two")
        os.utime(file, ns=times)

    until(
        lambda: differs(lambda: file.chmod(0o644)), source.signature
    )  # file times advance in steps of some milliseconds
    before = source.signature()
    until(lambda: differs(copied), source.signature)


async def _reload(gateway: Running) -> None:
    gateway.app.reload()


def test_what_takes_a_restart_is_said_and_the_rest_is_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake, watched(tmp_path, config(fake, docs={})) as gateway:
        values = config(fake, docs={})
        values["server"] = {"port": 1234, "workers": 3, "metrics_port": 4321, "max_inputs": 2}
        values["cache"] = {"ttl": "1h"}
        write(tmp_path, values)
        until_reloads(gateway, "ok", 1)
        for name in ("server.port", "server.workers", "server.metrics_port", "cache"):
            assert f"{name} has changed but needs a restart" in caplog.text
        assert "server.host" not in caplog.text
        assert gateway.post({"model": "docs", "input": ["a", "b", "c"]}).status_code == 400
        assert gateway.get("/metrics").status_code == 200


def test_a_key_for_a_model_that_nobody_serves_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values: dict[str, Any] = {
        "upstreams": {"built-in": {"type": "lexical"}},
        "auth": {"keys": {"team": {"key": "k", "models": ["lexical", "lexica"]}}},
    }
    with watched(tmp_path, values):
        assert [record.getMessage() for record in caplog.records if "auth.keys" in record.getMessage()] == [
            "auth.keys.team.models: no model lexica is served now"
        ]


# --- the program ------------------------------------------------------------------------------------


def has(url: str, name: str, times: int = 1) -> bool:
    """Whether the model is served on each of `times` new connections."""
    with httpx.Client(headers={"connection": "close"}) as client:
        return all(client.get(f"{url}/v1/models/{name}").status_code == 200 for _ in range(times))


def test_sighup_loads_the_file_anew(tmp_path: Path) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        write(tmp_path, config(fake, docs={}))
        with serving(tmp_path) as (url, process):
            write(tmp_path, config(fake, docs={}, more={}))
            process.send_signal(signal.SIGHUP)
            until(lambda: has(url, "more"), (tmp_path / "log").read_text)
            write(tmp_path, "servers: {}\n")
            process.send_signal(signal.SIGHUP)
            until(lambda: "configuration not changed" in (tmp_path / "log").read_text(), lambda: "no line of it")
            assert has(url, "more")


def test_sighup_without_a_file_ends_nobody(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, process):
        process.send_signal(signal.SIGHUP)
        until(lambda: "nothing has changed" in (tmp_path / "log").read_text(), (tmp_path / "log").read_text)
        assert has(url, "lexical")


def test_every_worker_loads_the_file_anew_and_loses_no_request(tmp_path: Path) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        write(tmp_path, config(fake, docs={}))
        with serving(tmp_path, "--workers", "2") as (url, process):
            fake.hold()
            with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)) as raw:
                raw.settimeout(30)
                body = b'{"model":"docs","input":"in flight"}'
                raw.sendall(
                    b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
                )
                fake.wait_for_calls(1)
                write(tmp_path, config(fake, more={}))
                process.send_signal(signal.SIGHUP)
                until(lambda: has(url, "more", times=20), (tmp_path / "log").read_text)
                fake.release()
                assert raw.recv(65536).startswith(b"HTTP/1.1 200")
            write(tmp_path, "servers: {}\n")
            process.send_signal(signal.SIGHUP)
            until(lambda: metric(httpx.get(f"{url}/metrics").text, "config_valid") == 0, (tmp_path / "log").read_text)


_PICKY = """
from app.cli import main
from app.gateway import Gateway
build = Gateway.__init__
def picky(self, settings, *others):
    if settings.server.max_inputs == 7:
        raise OverflowError("cannot be built")
    build(self, settings, *others)
Gateway.__init__ = picky
main(["serve", "--port", "0", "--workers", "2"])
"""


def test_what_cannot_be_built_is_given_to_no_worker(tmp_path: Path) -> None:
    """The parent tries it first. In this test its workers could build it, which would show if they were given it."""
    port, log = free_port(), (tmp_path / "log").read_text
    values: dict[str, Any] = {"upstreams": {"built-in": {"type": "lexical"}}, "server": {"metrics_port": port}}
    write(tmp_path, values)
    with (tmp_path / "log").open("a") as file:
        process = Program([sys.executable, "-c", _PICKY], env=environment(), cwd=tmp_path, stderr=file, text=True)
    with process:
        url = address(tmp_path / "log", process)
        values["server"]["max_inputs"] = 7
        write(tmp_path, values)
        process.send_signal(signal.SIGHUP)
        until(lambda: metric(httpx.get(f"http://127.0.0.1:{port}/metrics").text, "config_valid") == 0, log)
        assert "configuration not changed" in log()
        for _ in range(10):  # a new connection each, so that both workers get some requests
            asked = {"model": "lexical", "input": ["x"] * 8}
            assert httpx.post(f"{url}/v1/embeddings", json=asked, timeout=30).status_code == 200


async def test_the_metrics_show_deployments_in_force_whatever_ends_late() -> None:
    upstreams = {name: {"type": "lexical"} for name in ("one", "two")}

    def settings(max_batch: int, *names: str) -> Settings:
        models = {"m": {"max_batch": max_batch, "deployments": [{"upstream": "two", "model": "lexical"}]}}
        return settings_of({"upstreams": {name: upstreams[name] for name in names}, "models": models})

    def shown(upstream: str) -> float | None:
        labels = {"upstream": upstream, "model": "lexical"}
        return app.gateway.metrics.registry.get_sample_value("embedding_gateway_upstream_available", labels)

    app = create_app(settings(8, "one", "two"))
    await app.gateway.start()
    first = app._current
    first.in_flight += 1  # a request in progress
    old = (await app.gateway.find("m")).deployments[0].health
    for _ in range(FAILURES):
        old.end(UpstreamError("down"), 0)
    assert shown("two") == 0
    await app._change_to(settings(9, "two"))
    assert (shown("one"), shown("two")) == (None, 1), "what was left out for failures has gone, too"
    await app._change_to(settings(9, "one", "two"))
    old.standing.take_out("too late")
    first.in_flight -= 1
    await asyncio.gather(*app._tasks)
    assert (shown("one"), shown("two")) == (1, 1)
    (await app.gateway.find("one/lexical")).deployments[0].standing.take_out("another model")
    assert (shown("one"), shown("two")) == (0, 1)
    await app.gateway.aclose()


async def test_the_metrics_show_nothing_of_what_a_request_inside_finds_after_the_change() -> None:
    def settings(*names: str) -> Settings:
        upstream = {"type": "openai", "base_url": "http://127.0.0.1:9"}
        return settings_of({"upstreams": dict.fromkeys(names, upstream)})

    app = create_app(settings("one", "two"))
    await app.gateway.start()
    old, first = app.gateway, app._current
    first.in_flight += 1  # a request in progress
    await app._change_to(settings("one"))
    for name in ("one", "two"):
        old.upstreams[name].models = {"new": Model("new")}
    for gateway in (old, app.gateway):
        gateway.registry.publish()
    for name in ("one/new", "two/new"):
        for _ in range(FAILURES):
            old.names[name].deployments[0].health.end(UpstreamError("down"), 0)
    told = (await app.gateway.metrics.exposition()).decode()
    assert re.findall(r'available\{model="new",upstream="(\w+)"\} (.*)', told) == [("one", "1.0")]
    first.in_flight -= 1
    await asyncio.gather(*app._tasks)
    await app.gateway.aclose()


async def test_who_only_tries_a_configuration_out_for_its_workers_shows_no_deployment_of_it(tmp_path: Path) -> None:
    """Its metric would stay, whatever its state in the workers."""
    parent = create_app(settings_of({"upstreams": {"one": {"type": "lexical"}}}))
    with multiprocess(str(tmp_path)):
        await parent.dry_run(settings_of({"upstreams": {name: {"type": "lexical"} for name in ("one", "two")}}))
        assert "upstream_available{" not in (await parent.gateway.metrics.exposition()).decode()
    await parent.gateway.aclose()


async def test_of_deployments_that_are_put_together_otherwise_no_earlier_set_is_kept() -> None:
    def settings(weight: int, *names: str) -> Settings:
        deployments = [{"upstream": name, "model": "lexical", "weight": weight} for name in names]
        upstreams = {name: {"type": "lexical"} for name in ("one", "two")}
        return settings_of({"upstreams": upstreams, "models": {"m": {"deployments": deployments}}})

    app = create_app(settings(2, "one", "two"))
    await app.gateway.start()
    shown = []
    for weight, *names in ((3, "one", "two"), (4, "one", "two"), (4, "two", "one"), (4, "one")):
        await app._change_to(settings(weight, *names))
        await asyncio.gather(*app._tasks)
        fleet = app.gateway.fleet
        shown.append((len(fleet._batchers), len(fleet.canaries)))
    assert shown == [(4, 2)] * 3 + [(4, 1)], "`m`, `lexical`, and each upstream's alone; two pairs, and then one"
    await app.gateway.aclose()


async def test_upstreams_and_models_in_another_order_are_another_configuration() -> None:
    """The first name has priority, and lists are in the file's order."""
    models = {f"m-{name}": {"deployments": [{"upstream": name, "model": "lexical"}]} for name in ("one", "two")}
    before = settings_of({"upstreams": {name: {"type": "lexical"} for name in ("one", "two")}, "models": models})
    turned = {part: dict(reversed(getattr(before, part).items())) for part in ("upstreams", "models")}
    app = create_app(before)
    await app.gateway.start()
    await app._change_to(before.model_copy(update=turned))
    names, gateway = app.gateway.names, app.gateway
    assert [each.name for each in names["lexical"].deployments] == ["two/lexical", "one/lexical"]
    assert list(names)[:2] == ["m-two", "m-one"]
    await app._change_to(before.model_copy(update=turned))
    assert app.gateway is gateway
    await asyncio.gather(*app._tasks)
    await app.gateway.aclose()


@pytest.mark.parametrize(
    ("changed", "proved"),
    [
        ({"timeout": 20, "max_concurrency": 3}, True),
        ({"max_batch": 7}, True),
        ({"api_key": "sk-other"}, False),
        ({"base_url": "http://127.0.0.1:10"}, False),
    ],
)
async def test_what_is_only_asked_otherwise_is_asked_as_before_also_while_it_is_compared_anew(
    changed: dict[str, Any], proved: bool
) -> None:
    """The others of its space may be down at the time."""
    server = {"type": "openai", "base_url": "http://127.0.0.1:9"}

    def settings(max_batch: int | None = None, **more: Any) -> Settings:
        models = {"m": {"max_batch": max_batch, "deployments": [{"upstream": name, "model": MODEL} for name in "ab"]}}
        return settings_of({"upstreams": {"a": server, "b": {**server, **more}}, "models": models})

    async def unverified(*states: bool) -> list[bool]:
        for each, state in zip(app.gateway.names["m"].deployments, states, strict=True):
            each.standing.unverified = state
        after = app._build_gateway(settings(**changed), app.gateway)
        told = [each.standing.unverified for each in after.names["m"].deployments]
        await after.aclose(app.gateway)
        return told

    app = create_app(settings())
    assert await unverified(False, False) == [False, not proved]
    assert await unverified(False, True) == [False, True], "one that had not been compared still has not been"
    health = app.gateway.names["m"].deployments[1].health
    for _ in range(FAILURES):
        health.end(UpstreamError("down"), 0)
    assert await unverified(False, False) == [False, True], "one that was left out may be back as another"
    await app.gateway.aclose()


@pytest.mark.parametrize(
    ("changed", "stays"), [({"timeout": 20}, True), ({"max_batch": 7}, True), ({"api_key": "sk-other"}, False)]
)
async def test_one_that_was_taken_out_and_is_only_asked_otherwise_stays_out(
    changed: dict[str, Any], stays: bool, tmp_path: Path
) -> None:
    """Even if it is alone, and would otherwise be checked only once it has answered a caller."""

    def settings(max_batch: int | None = None, **more: Any) -> Settings:
        upstreams = {"a": {"type": "openai", "base_url": "http://127.0.0.1:9", **more}}
        models = {"m": {"max_batch": max_batch, "deployments": [{"upstream": "a", "model": MODEL}]}}
        cache = {"disk": {"path": str(tmp_path / "cache")}}
        return settings_of({"cache": cache, "upstreams": upstreams, "models": models})

    app = create_app(settings())
    health = app.gateway.names["m"].deployments[0].health
    health.asked, health.answered = 1.0, True
    health.standing.take_out("another model")
    after = app._build_gateway(settings(**changed), app.gateway)
    assert after.names["m"].deployments[0].standing.out == ("another model" if stays else None)
    looked_at = [canary for canary in after.fleet.canaries if canary.due(1000.0)]
    assert bool(looked_at) == stays
    await after.aclose(app.gateway)
    await app.gateway.aclose()


@pytest.mark.parametrize("lasts", [True, False])
@pytest.mark.parametrize("timeout", [10, 20])
async def test_one_that_was_taken_out_and_is_alone_now_is_looked_at(timeout: int, lasts: bool, tmp_path: Path) -> None:
    """Otherwise it would stay out for ever: it cannot be used before, and may never have served a caller."""

    def settings(timeout: int, *names: str) -> Settings:
        server = {"type": "openai", "base_url": "http://127.0.0.1:9"}
        upstreams = {"a": server, "b": {**server, "timeout": timeout}}
        models = {"m": {"deployments": [{"upstream": name, "model": MODEL} for name in names]}}
        cache = {"disk": {"path": str(tmp_path / "cache")}} if lasts else {"memory": {}}
        return settings_of({"cache": cache, "upstreams": upstreams, "models": models})

    app = create_app(settings(10, "a", "b"))
    app.gateway.names["m"].deployments[1].standing.take_out("another model")
    after = app._build_gateway(settings(timeout, "b"), app.gateway)
    assert after.names["m"].deployments[0].standing.out
    looked_at = [canary for canary in after.fleet.canaries if canary.due(1000.0)]
    assert [canary.upstream for canary in looked_at] == ["b"]
    await after.aclose(app.gateway)
    await app.gateway.aclose()


async def test_beside_one_that_is_only_asked_otherwise_a_changed_one_waits_though_it_is_named_first() -> None:
    """Otherwise both would serve, and one may be another model by now."""

    def settings(key: str, timeout: int) -> Settings:
        server = {"type": "openai", "base_url": "http://127.0.0.1:9"}
        upstreams = {"a": {**server, "api_key": key}, "b": {**server, "timeout": timeout}}
        models = {"m": {"deployments": [{"upstream": name, "model": MODEL} for name in "ab"]}}
        return settings_of({"upstreams": upstreams, "models": models})

    app = create_app(settings("sk-one", 10))
    for each in app.gateway.names["m"].deployments:
        each.standing.unverified = False
    after = app._build_gateway(settings("sk-other", 20), app.gateway)
    assert [each.standing.unverified for each in after.names["m"].deployments] == [True, False]
    await after.aclose(app.gateway)
    await app.gateway.aclose()


def of_new_and_b(timeout: int, *names: str, **facts: int) -> Settings:
    """A model on the named ones of two upstreams; `timeout` is b's, and `facts` are the model's."""
    server = {"type": "openai", "base_url": "http://127.0.0.1:9"}
    upstreams = {"new": server, "b": {**server, "timeout": timeout}}
    models = {"m": {**facts, "deployments": [{"upstream": name, "model": MODEL} for name in names]}}
    return settings_of({"upstreams": upstreams, "models": models})


@pytest.mark.parametrize("unverified", [False, True])
async def test_what_callers_have_been_given_counts_also_where_it_is_only_asked_otherwise_now(unverified: bool) -> None:
    """A new deployment is named first. The two are compared before the old one answers a caller again."""
    app = create_app(of_new_and_b(10, "b"))
    health = app.gateway.names["m"].deployments[0].health
    health.answered, health.standing.unverified = True, unverified
    after = app._build_gateway(of_new_and_b(20, "new", "b"), app.gateway)
    deployments = after.names["m"].deployments
    assert [(each.standing.unverified, each.health.answered) for each in deployments] == [
        (True, False),
        (unverified, True),
    ]
    await after.aclose(app.gateway)
    await app.gateway.aclose()


async def test_what_callers_have_been_given_counts_also_where_its_upstream_s_list_says_something_else_of_it() -> None:
    """The upstream's own name leads to a deployment with other facts, which was neither used nor compared."""
    app = create_app(of_new_and_b(10, "b", max_batch=16))
    app.gateway.upstreams["b"].models = {MODEL: unlisted_model(MODEL)}
    app.gateway.registry.publish()
    used, unused = (app.gateway.names[name].deployments[0].health for name in ("m", f"b/{MODEL}"))
    used.answered = True
    assert unused.standing.unverified
    after = app._build_gateway(of_new_and_b(20, "new", "b", max_batch=16), app.gateway)
    deployments = after.names["m"].deployments
    assert [(each.standing.unverified, each.health.answered) for each in deployments] == [(True, False), (False, True)]
    await after.aclose(app.gateway)
    await app.gateway.aclose()


async def test_a_changed_one_does_not_wait_for_one_that_has_not_been_compared() -> None:
    """Otherwise neither would be known to be in the space, and both would serve."""

    def settings(key: str) -> Settings:
        server = {"type": "openai", "base_url": "http://127.0.0.1:9"}
        upstreams = {"a": {**server, "api_key": key}, "b": server}
        models = {"m": {"deployments": [{"upstream": name, "model": MODEL} for name in "ab"]}}
        return settings_of({"upstreams": upstreams, "models": models})

    app = create_app(settings("sk-one"))
    assert [each.standing.unverified for each in app.gateway.names["m"].deployments] == [False, True]
    after = app._build_gateway(settings("sk-other"), app.gateway)
    assert [each.standing.unverified for each in after.names["m"].deployments] == [False, True]
    await after.aclose(app.gateway)
    await app.gateway.aclose()


async def test_beside_one_that_has_answered_callers_alone_a_new_one_waits_though_it_is_named_first() -> None:
    """It was added while another served its space, has had nothing to be compared with since, and is right."""

    def settings(*names: str) -> Settings:
        upstreams = {name: {"type": "openai", "base_url": "http://127.0.0.1:9"} for name in {"a", "b", *names}}
        models = {"m": {"deployments": [{"upstream": name, "model": MODEL} for name in names]}}
        return settings_of({"upstreams": upstreams, "models": models})

    app = create_app(settings("a"))
    alone = app._build_gateway(settings("b"), app.gateway)
    alone.names["m"].deployments[0].health.answered = True
    after = app._build_gateway(settings("new", "b"), alone)
    assert [each.upstream for each in after.names["m"].deployments] == ["new", "b"]
    assert after.names["m"].deployments[0].standing.unverified
    await alone.aclose(after)
    await after.aclose(app.gateway)
    await app.gateway.aclose()


async def test_who_is_inside_counts_on() -> None:
    def settings(most: int) -> Settings:
        return settings_of({"server": {"max_inflight": most}, "upstreams": {"up": {"type": "lexical"}}})

    app = create_app(settings(2))
    await app.gateway.start()
    with Admission(app.gateway.capacity) as one, Admission(app.gateway.capacity) as two:
        one.take_place()
        two.take_place()
        for most, fits in ((1, False), (2, False), (3, True)):
            await app._change_to(settings(most))
            with contextlib.suppress(Overloaded), Admission(app.gateway.capacity) as three:
                three.take_place()
                assert fits
                continue
            assert not fits
    await app._change_to(settings(1))
    with Admission(app.gateway.capacity) as one, Admission(app.gateway.capacity) as two:
        one.take_place()
        with pytest.raises(Overloaded):
            two.take_place()
    await asyncio.gather(*app._tasks)
    await app.gateway.aclose()


async def test_the_description_on_a_port_of_its_own_follows_the_configuration() -> None:
    """Also in the parent of workers, which only tries out the configuration that they serve."""
    upstreams = {"upstreams": {"up": {"type": "lexical"}}, "server": {"metrics_port": 1234}}
    opened, closed = settings_of(upstreams), settings_of({**upstreams, "auth": {"keys": {"a": {"key": "k"}}}})
    app, parent = create_app(opened), create_app(opened)
    await app.gateway.start()
    await app._change_to(closed)
    await parent.dry_run(closed)
    for each in (app, parent):
        assert each.admin is not None
        async with httpx.AsyncClient(transport=httpx.ASGITransport(each.admin), base_url="http://admin") as client:
            described = (await client.get("/openapi.json")).json()
        assert "securitySchemes" in described["components"]
    await asyncio.gather(*app._tasks)
    for each in (app, parent):
        await each.gateway.aclose()


async def test_a_configuration_that_is_no_longer_in_force_leaves_nothing_behind() -> None:
    def settings(most: int, auth: dict[str, Any]) -> Settings:
        server = {"max_inputs": most, "metrics_port": 1234}
        return settings_of({"server": server, "upstreams": {"up": {"type": "lexical"}}, **auth})

    app = create_app(settings(1, {}))
    await app.gateway.start()
    gone = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        for most, auth in ((2, {}), (3, {"auth": {"keys": {"a": {"key": "k"}}}}), (4, {})):
            gone.append(weakref.ref(app.gateway))
            assert (await client.get("/v1/models")).status_code == (401 if app.settings.auth else 200)
            assert (await client.get("/readyz")).json()["status"] == "ready"
            await app._change_to(settings(most, auth))
            await asyncio.gather(*app._tasks)
    gc.collect()
    assert [each() for each in gone] == [None] * 3
    await app.gateway.aclose()
