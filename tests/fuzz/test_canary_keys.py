"""Recognizable secrets are planted wherever there is one; then nothing that the gateway shows,
in success or in any failure, may contain them."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app.config.load import ConfigError, load
from app.upstreams import UPSTREAMS
from tests.fakes import FakeBaidu, FakeDashScope, FakeGemini, FakeOllama, FakeOpenAI, FakeUpstream, faults, unused_url
from tests.harness import settings_of
from tests.processes import free_port, run, serving
from tests.redis_server import RedisServer

MARK = "c4n4ry"
"""Part of every secret, so that a fragment of one is found as well."""
CALLER, OTHER_CALLER = f"caller-{MARK}-key-0123456789", f"other-{MARK}-key-0123456789"


def secret(name: str) -> str:
    return f"{MARK}{name}{MARK}0123456789"


KEYS = {
    "openai": "sk-" + secret("openai"),
    "second": secret("second"),
    "dashscope": "sk-" + secret("dashscope"),
    "gemini": "AIza" + secret("gemini"),
    "baidu ak": secret("baiduak"),
    "baidu sk": secret("baidusk"),
    "iam ak": "ALTAK" + secret("iamak"),
    "iam sk": secret("iamsk"),
    "v2": "bce-v3/ALTAK-x/" + secret("v2"),
    "header": secret("header"),
    "proxy": secret("proxy"),
    "redis": secret("redis"),
}


@dataclass
class Place:
    """The fakes, and the configuration with all the secrets."""

    fakes: dict[str, FakeUpstream]
    config: dict[str, Any]
    models: dict[str, str] = field(default_factory=dict)
    """Upstream -> a model to request."""


@contextmanager
def place(redis: str) -> Iterator[Place]:
    baidu = FakeBaidu(KEYS["baidu ak"], KEYS["baidu sk"], KEYS["iam ak"], KEYS["iam sk"], KEYS["v2"])
    fakes: dict[str, FakeUpstream] = {
        "openai": FakeOpenAI(KEYS["openai"]),
        "dashscope": FakeDashScope(KEYS["dashscope"]),
        "gemini": FakeGemini(KEYS["gemini"]),
        "baidu": baidu,
        "ollama": FakeOllama(),
    }
    with ExitStack() as stack:
        for fake in fakes.values():
            stack.enter_context(fake)
        openai, dead = fakes["openai"].url, unused_url()
        upstreams: dict[str, dict[str, Any]] = {
            "openai": {"type": "openai", "api_keys": [KEYS["openai"], KEYS["second"]], "base_url": f"{openai}/v1"},
            "dashscope": {
                "type": "dashscope", "api_key": KEYS["dashscope"], "base_url": f"{fakes['dashscope'].url}/api/v1",
            },
            "gemini": {"type": "gemini", "api_key": KEYS["gemini"], "base_url": f"{fakes['gemini'].url}/v1beta"},
            "token": {
                "type": "baidu", "api_key": KEYS["baidu ak"], "secret_key": KEYS["baidu sk"], "base_url": baidu.url,
            },
            "iam": {
                "type": "baidu", "auth": "iam", "access_key": KEYS["iam ak"], "secret_key": KEYS["iam sk"],
                "base_url": baidu.url,
            },
            "wrong-sk": {
                "type": "baidu", "api_key": KEYS["baidu ak"], "secret_key": secret("wrong"), "base_url": baidu.url,
            },
            "v2": {"type": "baidu", "mode": "v2", "api_key": KEYS["v2"], "base_url": f"{baidu.url}/v2"},
            "ollama": {
                "type": "ollama", "base_url": fakes["ollama"].url,
                "headers": {"x-internal-token": f"Token {KEYS['header']}"},
            },
            "proxied": {
                "type": "openai", "api_key": KEYS["openai"], "base_url": f"{openai}/v1",
                "proxy": f"{dead.replace('//', '//user:' + KEYS['proxy'] + '@')}",
            },
            "refusing-proxy": {
                "type": "openai", "api_key": KEYS["openai"], "base_url": "https://vendor.invalid/v1",
                "proxy": f"{openai.replace('//', '//user:' + KEYS['proxy'] + '@')}",
            },
            "no-tls": {
                "type": "openai", "api_key": KEYS["openai"], "base_url": f"{openai.replace('http', 'https', 1)}/v1",
            },
            "nobody": {"type": "openai", "api_key": KEYS["openai"], "base_url": f"{dead}/v1"},
        }  # fmt: skip
        own = {
            "dashscope": "text-embedding-v4", "gemini": "gemini-embedding-001", "token": "embedding-v1",
            "iam": "embedding-v1", "wrong-sk": "embedding-v1", "v2": "embedding-v1", "ollama": "nomic-embed-text",
        }  # fmt: skip
        config = {
            "server": {"request_timeout": "3s"},
            "auth": {"keys": {"one": {"key": CALLER}, "other": {"key": OTHER_CALLER, "models": ["nothing"]}}},
            "cache": {"redis": {"url": redis, "timeout": "1s"}},
            "upstreams": {name: {**each, "timeout": "500ms"} for name, each in upstreams.items()},
            "models": {
                name: {"deployments": [{"upstream": name, "model": own.get(name, "text-embedding-3-small")}]}
                for name in upstreams
            },
        }
        yield Place(fakes, config, {name: name for name in upstreams})


HELD = {
    "openai": ("openai", ("openai", "second")),
    "dashscope": ("dashscope", ("dashscope",)),
    "gemini": ("gemini", ("gemini",)),
    "token": ("baidu", ("baidu ak", "baidu sk", "token")),
    "iam": ("baidu", ("iam ak", "iam sk")),
    "v2": ("baidu", ("v2",)),
    "ollama": ("ollama", ("header",)),
}
"""Upstream -> its fake, and what that fake could repeat."""


def test_no_type_of_upstream_is_left_out() -> None:
    """But for the built-in one, which has no secret and calls nobody."""
    with place("redis://nowhere") as where:
        types = {upstream["type"] for upstream in where.config["upstreams"].values()}
        of_fakes = {where.config["upstreams"][name]["type"] for name in HELD}
    assert types | {"lexical"} == of_fakes | {"lexical"} == set(UPSTREAMS)


def echoes(names: tuple[str, ...]) -> Iterator[faults.Fault]:
    """A vendor that repeats what it was sent, in every kind of error and place."""
    for name in names:
        key = KEYS.get(name, f"24.0123456789abcdef0123456789abcdef.2592000.1.2-{MARK}")
        told = f"Incorrect API key provided: {key}."
        for alias in ("auth", "bad_input", "internal", "rate_limit", "quota", "unavailable"):
            yield faults.vendor_error(alias, told, headers={"retry-after": "0", "x-echo": key})
        yield faults.http_error(400, f"<html><p>Authorization: Bearer {key}</p></html>", {"Content-Type": "text/html"})
        yield faults.http_error(500, {"detail": [{"msg": f"headers were {{'api-key': '{key}'}}"}]})
        yield faults.http_error(418, {"error": f"GET /oauth/2.0/token?client_id={key}&client_secret={key}"})
        yield faults.redirect(f"http://elsewhere.invalid/?access_token={key}")
        yield faults.http_error(400, {"error": {"code": key, "type": key, "param": key, "message": key}})
        yield faults.http_error(200, f'{{"error_code": 336003, "error_msg": "{key}"}}')
        yield faults.http_error(200, f'{{"data": "{key}"}}')
        if name in ("second", "v2"):
            for before in (260, 275, 285, 290, 295):
                yield faults.vendor_error(
                    "bad_input", "x" * before + " " + key
                )  # messages are cut, but not within a key


def shows(text: str) -> list[str]:
    """Where a secret, or part of one, appears in the text: plain, quoted or in base64."""
    found = [text[max(0, match.start() - 80) : match.end() + 40] for match in re.finditer(MARK, text, re.IGNORECASE)]
    hidden = (f"user:{KEYS['proxy']}", *KEYS.values())
    encoded = {plain: base64.b64encode(plain.encode()).decode().rstrip("=")[:-2] for plain in hidden}
    return found + [f"base64 of {plain}" for plain, code in encoded.items() if code in text]


def everything(response: httpx.Response) -> str:
    return f"{response.status_code} {response.headers.raw!r} {response.text}"


def drive(url: str, where: Place) -> Iterator[str]:
    """Yields what callers get, in success and in every failure."""
    headers = {"authorization": f"Bearer {CALLER}"}
    fresh = itertools.count()
    with httpx.Client(base_url=url, headers=headers, timeout=30) as client:

        def ask(model: str, **more: Any) -> str:
            body = {"model": model, "input": [f"text {next(fresh)}", "other"], **more}
            return everything(client.post("/v1/embeddings", json=body))

        for model in where.models.values():
            yield ask(model)

        def echoed(name: str) -> list[str]:
            answers, fake = [], where.fakes[name]
            for model, (its, held) in HELD.items():
                for fault in echoes(held) if its == name else ():
                    fake.fail(fault, 2)
                    answers.append(ask(model))
                    fake.heal()
            return answers

        with ThreadPoolExecutor() as pool:  # each fake is one vendor's, so they do not interfere
            yield from itertools.chain.from_iterable(pool.map(echoed, where.fakes))
        for wire in (*faults.BROKEN_TRANSFERS, faults.hang, *faults.BROKEN_BODIES):
            where.fakes["openai"].fail(wire, None)
            yield ask("openai")
            where.fakes["openai"].heal()
        for authorization in (OTHER_CALLER, f"wrong-{MARK}", f"{CALLER}x"):
            yield everything(
                client.post(
                    "/v1/embeddings", json={"model": "openai", "input": "a"},
                    headers={"authorization": f"Bearer {authorization}"},
                )
            )  # fmt: skip
        yield ask("openai", dimensions="x")
        for path in ("/metrics", "/readyz", "/healthz", "/v1/models", "/v1/models/openai", "/openapi.json"):
            yield everything(client.get(path))


def test_no_key_is_ever_shown_whatever_happens(tmp_path: Path) -> None:
    with RedisServer(port=free_port(), password=KEYS["redis"]) as redis, place(redis.url) as where:
        (tmp_path / "gateway.yaml").write_text(yaml.safe_dump(where.config))
        with serving(tmp_path, "--config", "gateway.yaml", "--log-level", "debug") as (url, _):
            told = list(drive(url, where))
            redis.kill()
            told.append(embedded(url, "after redis"))
        log = (tmp_path / "log").read_text()
    statuses = {answer[:3] for answer in told}
    assert {"200", "400", "401", "403", "429", "502", "503", "504"} <= statuses
    assert [leak for answer in told for leak in shows(answer)] == []
    assert shows(log) == []
    assert "event=request" in log


def test_a_redis_that_refuses_the_password_does_not_make_it_known(tmp_path: Path) -> None:
    wrong = f"wrong{secret('redis')}"
    with RedisServer(port=free_port(), password="right") as redis, place(redis.url_with(wrong)) as where:
        (tmp_path / "gateway.yaml").write_text(yaml.safe_dump(where.config))
        with serving(tmp_path, "--config", "gateway.yaml", "--log-level", "debug") as (url, _):
            told = [
                embedded(url, "text"),
                everything(httpx.get(f"{url}/readyz")),
                everything(httpx.get(f"{url}/metrics")),
            ]
        log = (tmp_path / "log").read_text()
    assert told[0].startswith("200")
    assert "redis" in log
    assert shows(log + "".join(told)) == []


def embedded(url: str, text: str) -> str:
    return everything(
        httpx.post(
            f"{url}/v1/embeddings", json={"model": "gemini", "input": text}, headers={"api-key": CALLER}, timeout=30
        )
    )


def test_no_key_is_shown_by_a_check_or_in_what_the_settings_look_like(tmp_path: Path) -> None:
    with place(f"redis://:{KEYS['redis']}@127.0.0.1:{free_port()}/0") as where:
        settings = settings_of(where.config)
        (tmp_path / "good.yaml").write_text(yaml.safe_dump(where.config))
        shown = run("check", "--config", "good.yaml", cwd=tmp_path)
        probed = run("check", "--config", "good.yaml", "--probe", cwd=tmp_path)
    assert (shown.returncode, probed.returncode) == (0, 2), shown.stderr
    assert "probe openai/text-embedding-3-small: ok" in probed.stdout
    outputs = (shown.stdout, shown.stderr, probed.stdout, probed.stderr, repr(settings), str(settings))
    assert [leak for output in outputs for leak in shows(output)] == []


def test_no_key_is_shown_by_what_is_said_of_a_bad_configuration(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    with place("redis://127.0.0.1:1/0") as where:
        text = yaml.safe_dump(where.config)
    for name, bad in _mistaken(text):
        file.write_text(bad)
        with pytest.raises(ConfigError) as refused:
            load(str(file), {}, UPSTREAMS, listening=lambda *_: False)
        assert shows("\n".join([*refused.value.mistakes, str(refused.value), repr(refused.value)])) == [], name
    for command in ("check", "serve"):
        done = run(command, "--config", "bad.yaml", cwd=tmp_path)
        assert done.returncode == 2
        assert shows(done.stdout + done.stderr) == []


def _mistaken(text: str) -> Iterator[tuple[str, str]]:
    """Configurations with one mistake each, most of them on the line of a secret."""
    good = yaml.safe_load(text)

    def with_upstream(**more: Any) -> str:
        upstream = {"type": "openai", "base_url": "http://127.0.0.1:1/v1", "api_key": KEYS["openai"], **more}
        return str(yaml.safe_dump({**good, "upstreams": {"openai": upstream}, "models": {}}))

    yield "unknown-key", with_upstream(api_kye=KEYS["second"])
    yield "key-of-two-lines", with_upstream(api_key=f"{KEYS['openai']}\nmore")
    yield "key-is-a-list", with_upstream(api_key=[KEYS["openai"]])
    yield "both-keys", with_upstream(api_keys=[KEYS["second"]])
    yield "password-in-url", with_upstream(base_url=f"http://user:{KEYS['openai']}@host/v1")
    yield "query-in-url", with_upstream(base_url=f"http://host/v1?key={KEYS['openai']}")
    yield "bad-proxy", with_upstream(proxy=f"socks9://user:{KEYS['proxy']}@host")
    yield "bad-header", with_upstream(headers={"authorization": f"{KEYS['header']}\n"})
    yield "header-is-a-list", with_upstream(headers={"authorization": [KEYS["header"]]})
    yield "timeout-is-a-key", with_upstream(timeout=KEYS["openai"])
    yield "bad-redis", str(yaml.safe_dump({**good, "cache": {"redis": {"url": f"http://:{KEYS['redis']}@host"}}}))
    yield "redis-is-text", str(yaml.safe_dump({**good, "cache": {"redis": f"redis://:{KEYS['redis']}@host"}}))
    yield "caller-key-twice", str(yaml.safe_dump({**good, "auth": {"keys": {"a": {"key": CALLER, "sha256": CALLER}}}}))
    yield "callers-are-texts", str(yaml.safe_dump({**good, "auth": {"keys": [CALLER]}}))
    yield "no-yaml", text + f"\napi_key: '{KEYS['openai']}\n  : ["
    yield "tab", f"upstreams:\n  openai:\n\tapi_key: {KEYS['openai']}\n"
    yield "tag", f"upstreams:\n  openai:\n    api_key: !secret {KEYS['openai']}\n"
    yield "bad-reference", with_upstream(api_key=f"{KEYS['openai']}${{")
