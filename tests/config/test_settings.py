"""The settings: values, defaults, immutability, and no secret shown."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from app.cache.link import connections
from app.config import KeySettings, RedisSettings, ServerSettings, Settings, UpstreamSettings
from app.config.values import parse_duration, parse_size
from app.upstreams import UPSTREAMS
from tests.config.kinds import settings_from


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("250ms", 0.25),
        ("30s", 30.0),
        ("10m", 600.0),
        ("1h", 3600.0),
        ("30d", 2592000.0),
        ("1.5s", 1.5),
        ("2", 2.0),
        (3, 3),
    ],
)
def test_durations_are_seconds(written: Any, seconds: float) -> None:
    assert parse_duration(written) == seconds


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("64KiB", 65536),
        ("256 MiB", 2**28),
        ("2GiB", 2**31),
        ("1.5KiB", 1536),
        ("1MB", 10**6),
        ("7", 7),
        ("7B", 7),
        ("1125899906842624", 2**50),
        (8, 8),
    ],
)
def test_sizes_are_bytes(written: Any, size: int) -> None:
    assert parse_size(written) == size


@pytest.mark.parametrize("written", ["", "s", "1w", "-1s", "1 s s", "1e3", "inf", "١s"])
def test_what_is_no_duration_says_what_one_is(written: str) -> None:
    with pytest.raises(ValueError, match="must be a duration: 250ms"):
        parse_duration(written)


@pytest.mark.parametrize("written", ["", "KiB", "1kib", "1XB", "-1", "1 Mi"])
def test_what_is_no_size_says_what_one_is(written: str) -> None:
    with pytest.raises(ValueError, match="must be a size: 64KiB"):
        parse_size(written)


def test_the_values_without_a_file_are_the_contracts() -> None:
    server = ServerSettings()
    assert (server.host, server.port, server.workers, server.metrics_port) == ("127.0.0.1", 8080, 1, None)
    assert (server.request_timeout, server.max_body, server.max_inputs) == (60.0, 32 * 2**20, 2048)
    assert (server.max_inflight, server.max_inflight_size, server.drain) == (1000, 256 * 2**20, 5.0)


def test_every_cache_tier_can_be_off(tmp_path: Path) -> None:
    cache = settings_from("cache: {memory: null, disk: null, redis: null}", tmp_path).cache
    assert (cache.memory, cache.disk, cache.redis) == (None, None, None)


@pytest.mark.parametrize("host", ["münchen.example", "例え.jp", "ex_ample", "[::1]:8443", "10.0.0.1"])
def test_hosts_of_a_base_url(tmp_path: Path, host: str) -> None:
    found = settings_from(f"upstreams: {{a: {{type: beta, base_url: 'http://{host}/v1'}}}}", tmp_path)
    assert found.upstreams["a"].base_url == f"http://{host}/v1"


def test_a_trailing_slash_is_not_part_of_a_base_url(tmp_path: Path) -> None:
    found = settings_from("upstreams: {a: {type: beta, base_url: 'HTTPS://Host:8443/v1//'}}", tmp_path)
    assert found.upstreams["a"].base_url == "HTTPS://Host:8443/v1"


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://:pw@h:6379/0",
        "redis://u:p%23%2F%3F@h?db=3&client_name=eg",
        "rediss://u:p@h/1",
        "rediss://h?ssl_ca_certs=/ca.pem&ssl_cert_reqs=none&ssl_check_hostname=no",
        "unix:///run/redis.sock",
        "unix:///run/redis.sock?db=1&password=pw",
    ],
)
def test_redis_urls(url: str) -> None:
    assert RedisSettings(url=SecretStr(url)).url.get_secret_value() == url
    connections(url, 1, lambda: 0.0)  # the library accepts it, too


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("unix://", "must name a socket"),
        ("redis://h:x", "a number from 1 to 65535"),
        ("redis://h/1 ?db=2", "must not contain spaces"),
        ("redis://h?x=y", "only these are allowed: db, "),
        ("redis://h?socket_timeout=5s", "only these are allowed: db, "),
        ("redis://h?ssl_cert_reqs=none", "only these are allowed: db, "),
        ("redis://h?db=q", "db, after the ?"),
        ("redis://h?db=", "db, after the ?"),
        ("rediss://h?ssl_cert_reqs=foo", "ssl_cert_reqs, after the ?"),
        ("redis://h/abc", "number of a database"),
        ("redis://h:9/-1", "number of a database"),
        ("redis://h/0#canary", "%23"),
        ("redis://:canary?canary@h", "%3F for ?"),
        ("redis://:6379", "begins with redis://"),
    ],
)
def test_what_is_no_redis_url(url: str, told: str) -> None:
    with pytest.raises(ValidationError) as refused:
        RedisSettings(url=SecretStr(url))
    assert told in str(refused.value)
    assert "canary" not in str(refused.value)


def test_a_key_and_its_digest_are_the_same_caller() -> None:
    digest = hashlib.sha256(b"abc")
    assert KeySettings(key=SecretStr(" abc\n")).digest() == digest.digest()
    assert KeySettings(sha256=digest.hexdigest().upper()).digest() == digest.digest()


def test_a_deployment_may_be_declared_to_be_in_another_types_space(tmp_path: Path) -> None:
    text = """
upstreams: {alpha: {type: alpha, api_key: k}, own: {type: plain}}
models:
  docs: {deployments: [{upstream: alpha, model: a-1}, {upstream: own, model: words, space: alpha/a-1}]}
  newer: {deployments: [{upstream: alpha, model: not-in-the-catalogue}]}
"""
    assert set(settings_from(text, tmp_path).models) == {"docs", "newer"}


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        ServerSettings().port = 1


def test_settings_read_no_environment_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDING_GATEWAY__SERVER__PORT", "9")
    monkeypatch.setenv("SERVER", '{"port": 9}')
    upstream = UpstreamSettings(type="x", base_url="http://x")
    assert Settings(upstreams={"x": upstream}).server.port == 8080


def test_settings_show_no_secret(tmp_path: Path) -> None:
    text = """
auth: {keys: {a: {key: canary-1}, b: {sha256: "ca%s"}}}
cache: {redis: {url: "redis://:canary-2@h"}}
upstreams:
  a:
    {type: alpha, api_key: canary-3, secret_key: canary-4, proxy: "http://u:canary-5@h", headers: {X-A: canary-6}}
  b: {type: alpha, api_keys: [canary-7]}
""" % ("0" * 62)
    found = settings_from(text, tmp_path)
    assert "canary" not in repr(found) + str(found)
    assert "ca00" not in repr(found)


@pytest.mark.parametrize("name", UPSTREAMS)
def test_every_real_type_keeps_its_credentials_secret(name: str) -> None:
    for field, info in UPSTREAMS[name].settings.model_fields.items():
        if "key" in field.split("_")[-1] or field in ("api_keys", "proxy"):
            assert "SecretStr" in str(info.annotation), field
