"""Which file is used, and what is served without one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from app.config import Settings
from app.config.load import ConfigError, listens, load
from app.upstreams import UPSTREAMS
from tests.config.kinds import KINDS, nobody_listens, settings_from


def without_file(tmp_path: Path, variables: dict[str, str], *ports: int) -> Settings:
    return load(None, variables, KINDS, cwd=tmp_path, listening=lambda _host, port: port in ports)


def test_with_nothing_set_the_built_in_upstream_serves(tmp_path: Path) -> None:
    settings = without_file(tmp_path, {})
    assert list(settings.upstreams) == ["plain"]
    assert settings.cache.redis is None
    assert settings.auth is None


def test_a_vendors_variables_switch_its_upstream_on_under_its_types_name(tmp_path: Path) -> None:
    settings = without_file(tmp_path, {"ALPHA_API_KEY": "k", "ALPHA_BASE_URL": "http://here/v1/"})
    assert list(settings.upstreams) == ["alpha"]
    assert settings.upstreams["alpha"].base_url == "http://here/v1"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none.pem", "cannot be read: No such file or directory"),
        ("", "cannot be read: Is a directory"),
        ("text", "holds no certificate in PEM format"),
    ],
)
def test_certificates_that_cannot_be_read_are_a_mistake(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "text").write_text("no certificate")
    variables = {"SSL_CERT_FILE": str(tmp_path / name), "EMBEDDING_GATEWAY__SERVER__PORT": "no number"}
    with pytest.raises(ConfigError) as refused:
        without_file(tmp_path, variables)
    assert len(refused.value.mistakes) == 2
    assert refused.value.mistakes[1] == f"SSL_CERT_FILE: {problem}"
    with pytest.raises(ConfigError, match=r"^SSL_CERT_FILE: "):
        without_file(tmp_path, {"SSL_CERT_FILE": variables["SSL_CERT_FILE"]})


def test_an_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    variables = {
        "ALPHA_API_KEY": "",
        "REDIS_URL": "",
        "EMBEDDING_GATEWAY_CONFIG": "",
        "EMBEDDING_GATEWAY__SERVER__PORT": "",
        "SSL_CERT_FILE": "",
    }
    settings = without_file(tmp_path, variables)
    assert list(settings.upstreams) == ["plain"]
    assert settings.cache.redis is None
    assert settings.server.port == 8080


def test_a_server_on_its_types_default_port_is_found_by_itself(tmp_path: Path) -> None:
    assert list(without_file(tmp_path, {"ALPHA_API_KEY": "k"}, 1234).upstreams) == ["alpha", "gamma"]


def test_an_address_that_is_set_is_not_looked_for(tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    def listening(host: str, port: int) -> bool:
        asked.append((host, port))
        return False

    load(None, {"GAMMA_HOST": "http://far:1"}, KINDS, cwd=tmp_path, listening=listening)
    assert asked == []
    load(None, {}, KINDS, cwd=tmp_path, listening=listening)
    assert asked == [("127.0.0.1", 1234)]


def test_redis_url_switches_the_shared_cache_on(tmp_path: Path) -> None:
    redis = without_file(tmp_path, {"REDIS_URL": "redis://cache:6379/0"}).cache.redis
    assert redis is not None
    assert redis.url.get_secret_value() == "redis://cache:6379/0"


def test_a_mistake_in_the_environment_names_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        without_file(tmp_path, {"REDIS_URL": "cache:6379", "ALPHA_API_KEY": "k", "ALPHA_BASE_URL": "here/v1"})
    assert refusal.value.mistakes == [
        "environment: upstreams.alpha.base_url: must be a URL that begins with http:// or https://",
        "REDIS_URL: cache.redis.url: must be a URL that begins with redis:// or rediss:// or unix://",
    ]


def test_a_file_without_upstreams_takes_them_from_the_environment(tmp_path: Path) -> None:
    for text in ("server: {port: 1}", "server: {port: 1}\nupstreams:\n"):
        settings = settings_from(text, tmp_path, {"ALPHA_API_KEY": "k", "REDIS_URL": "redis://x"})
        assert list(settings.upstreams) == ["alpha"]
        assert settings.server.port == 1
        assert settings.cache.redis is None, "a file says by itself what caches there are"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "server:\ncache:\nmodels:\nupstreams:\n"])
def test_an_empty_file_is_a_file_with_nothing_set(tmp_path: Path, text: str) -> None:
    assert list(settings_from(text, tmp_path).upstreams) == ["plain"]


def test_a_file_with_upstreams_takes_none_from_the_environment(tmp_path: Path) -> None:
    settings = settings_from("upstreams: {own: {type: plain}}", tmp_path, {"ALPHA_API_KEY": "k"})
    assert list(settings.upstreams) == ["own"]


def test_the_named_file_wins_over_the_variable_and_the_variable_over_the_folder(tmp_path: Path) -> None:
    for port, name in enumerate(("config.yaml", "variable.yaml", "option.yaml"), start=1):
        (tmp_path / name).write_text(f"server: {{port: {port}}}", encoding="utf-8")
    variable = {"EMBEDDING_GATEWAY_CONFIG": "variable.yaml"}
    assert load(None, {}, KINDS, cwd=tmp_path, listening=nobody_listens).server.port == 1
    assert load(None, variable, KINDS, cwd=tmp_path, listening=nobody_listens).server.port == 2
    assert load("option.yaml", variable, KINDS, cwd=tmp_path, listening=nobody_listens).server.port == 3
    absolute = str(tmp_path / "option.yaml")
    assert load(absolute, variable, KINDS, cwd=tmp_path, listening=nobody_listens).server.port == 3


def test_looking_for_a_server_finds_the_one_that_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listens("127.0.0.1", port)
    assert not listens("127.0.0.1", port)


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({}, {"lexical"}),
        ({"DASHSCOPE_API_KEY": "k"}, {"dashscope"}),
        ({"BAIDU_API_KEY": "k", "BAIDU_SECRET_KEY": "s"}, {"baidu"}),
        ({"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://here/v1"}, {"openai"}),
        ({"GEMINI_API_KEY": "k"}, {"gemini"}),
        ({"GEMINI_API_KEY": "", "GOOGLE_API_KEY": "k"}, {"gemini"}),
        ({"OLLAMA_HOST": "127.0.0.1"}, {"ollama"}),
    ],
)
def test_the_contracts_variables_switch_the_real_types_on(
    tmp_path: Path, variables: dict[str, str], names: set[str]
) -> None:
    settings = load(None, variables, UPSTREAMS, cwd=tmp_path, listening=nobody_listens)
    assert set(settings.upstreams) == names


def test_a_running_ollama_is_found_on_its_default_port(tmp_path: Path) -> None:
    found = load(None, {}, UPSTREAMS, cwd=tmp_path, listening=lambda *at: at == ("127.0.0.1", 11434))
    assert set(found.upstreams) == {"ollama"}


def test_a_directory_that_cannot_be_looked_into_has_no_file(tmp_path: Path) -> None:
    unusable = tmp_path / ("x" * 300)
    (tmp_path / "named.yaml").write_text("upstreams: {a: {type: plain}}")
    assert list(load(None, {}, KINDS, cwd=unusable, listening=nobody_listens).upstreams) == ["plain"]
    named = load(str(tmp_path / "named.yaml"), {}, KINDS, cwd=unusable, listening=nobody_listens)
    assert list(named.upstreams) == ["a"]
