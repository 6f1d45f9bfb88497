"""`EMBEDDING_GATEWAY__A__B=…` sets a.b and wins over the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.config.load import ConfigError
from tests.config.kinds import AlphaSettings, environ, settings_from

TEXT = """
server: {port: 8000}
auth: {keys: {team-a: {key: abc}}}
upstreams:
  ds-compat: {type: alpha, api_key: a, timeout: 1s}
  Other.One: {type: alpha, api_key: b}
models:
  BAAI/bge-m3:567m:
    deployments:
      - {upstream: ds-compat, model: a-1}
      - {upstream: Other.One, model: a-1}
"""


def mistakes(tmp_path: Path, text: str, **variables: str) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        settings_from(text, tmp_path, environ(**variables))
    return refusal.value.mistakes


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    assert settings_from(TEXT, tmp_path, environ(SERVER__PORT="9000")).server.port == 9000


def test_a_name_may_be_a_number(tmp_path: Path) -> None:
    found = settings_from("", tmp_path, environ(AUTH__KEYS__0__KEY="abc"))
    assert found.auth is not None
    assert list(found.auth.keys) == ["0"]


def test_an_override_needs_no_file_and_no_section(tmp_path: Path) -> None:
    found = settings_from("", tmp_path, environ(CACHE__REDIS__URL="redis://x", CACHE__TTL="10m", SERVER__DRAIN="0"))
    assert found.cache.redis is not None
    assert (found.cache.ttl, found.server.drain) == (600.0, 0.0)


@pytest.mark.parametrize("name", ["DS_COMPAT", "ds_compat", "DS-COMPAT", "Ds_Compat"])
def test_names_match_in_any_case_and_an_underscore_matches_what_variables_cannot_hold(
    tmp_path: Path, name: str
) -> None:
    found = settings_from(TEXT, tmp_path, environ(**{f"UPSTREAMS__{name}__TIMEOUT": "7s"}))
    assert set(found.upstreams) == {"ds-compat", "Other.One"}
    assert found.upstreams["ds-compat"].timeout == 7.0


def test_the_variable_itself_may_be_in_any_case(tmp_path: Path) -> None:
    assert settings_from(TEXT, tmp_path, {"embedding_gateway__server__port": "9000"}).server.port == 9000


def test_names_with_dots_slashes_and_colons_can_be_reached(tmp_path: Path) -> None:
    variables = environ(UPSTREAMS__OTHER_ONE__API_KEY="new", MODELS__BAAI_BGE_M3_567M__DIMENSIONS="8")
    found = settings_from(TEXT, tmp_path, variables)
    assert found.upstreams["Other.One"].api_key is not None
    assert found.upstreams["Other.One"].api_key.get_secret_value() == "new"
    assert found.models["BAAI/bge-m3:567m"].dimensions == 8


def test_a_name_that_may_mean_two_is_refused(tmp_path: Path) -> None:
    text = "upstreams:\n  a-b: {type: plain}\n  a.b: {type: plain}\n"
    assert mistakes(tmp_path, text, UPSTREAMS__A_B__TIMEOUT="1s") == [
        "EMBEDDING_GATEWAY__UPSTREAMS__A_B__TIMEOUT: upstreams.a_b: may mean a-b or a.b"
    ]


def test_a_header_that_is_not_in_the_file_is_refused_if_a_variable_cannot_spell_it(tmp_path: Path) -> None:
    text = "upstreams:\n  a: {type: plain, headers: {X-Team: a}}\n  b: {type: plain}\n"
    found = settings_from(text, tmp_path, environ(UPSTREAMS__A__HEADERS__X_TEAM="b"))
    assert found.upstreams["a"].headers == {"X-Team": "b"}
    found = settings_from(text, tmp_path, environ(UPSTREAMS__B__HEADERS='{"X-Team": "c"}'))
    assert found.upstreams["b"].headers == {"X-Team": "c"}
    found = settings_from(text, tmp_path, environ(UPSTREAMS__B__HEADERS__AUTHORIZATION="Basic d"))
    assert found.upstreams["b"].headers == {"authorization": "Basic d"}
    for upstream, header in (("a", "X_Other"), ("b", "X_Team")):
        variable = f"UPSTREAMS__{upstream}__HEADERS__{header}"
        assert mistakes(tmp_path, text, **{variable: "d"}) == [
            f"EMBEDDING_GATEWAY__{variable}: upstreams.{upstream}.headers.{header.lower()}: "
            "a variable cannot spell a new key; set headers as a whole: {..} as JSON"
        ]


def test_items_of_a_list_go_by_number(tmp_path: Path) -> None:
    path = "MODELS__BAAI_BGE_M3_567M__DEPLOYMENTS"
    variables = environ(
        **{f"{path}__1__WEIGHT": "3", f"{path}__2": '{"upstream": "ds-compat", "model": "x", "space": "s"}'}
    )
    variables |= environ(**{f"{path}__0__SPACE": "s", f"{path}__1__SPACE": "s"})
    deployments = settings_from(TEXT, tmp_path, variables).models["BAAI/bge-m3:567m"].deployments
    assert [(each.weight, each.model) for each in deployments] == [(1, "a-1"), (3, "a-1"), (1, "x")]
    assert mistakes(tmp_path, TEXT, **{f"{path}__5__WEIGHT": "1"}) == [
        f"EMBEDDING_GATEWAY__{path}__5__WEIGHT: models.BAAI/bge-m3:567m.deployments.5: "
        "the list has 2 items, numbered from 0"
    ]


def test_a_list_that_is_not_there_begins_with_its_first_item(tmp_path: Path) -> None:
    path = "MODELS__DOCS__DEPLOYMENTS"
    variables = environ(**{f"{path}__0__UPSTREAM": "ds-compat", f"{path}__0__MODEL": "a-1", f"{path}__1__MODEL": "a-1"})
    variables |= environ(**{f"{path}__1__UPSTREAM": "Other.One", "AUTH__KEYS__TEAM_A__MODELS__0": "docs"})
    variables |= environ(AUTH__KEYS__0__KEY="other", AUTH__KEYS__0__MODELS__0="docs", UPSTREAMS__0__TYPE="plain")
    found = settings_from(TEXT, tmp_path, variables)
    assert [each.upstream for each in found.models["docs"].deployments] == ["ds-compat", "Other.One"]
    assert found.auth is not None
    assert {name: list(key.models or ()) for name, key in found.auth.keys.items()} == {
        "team-a": ["docs"],
        "0": ["docs"],
    }
    assert "0" in found.upstreams


def test_the_tenth_item_of_a_list_comes_after_the_ninth(tmp_path: Path) -> None:
    keys = [f"key-{number}" for number in range(12)]
    variables = environ(**{f"UPSTREAMS__NEW__API_KEYS__{number}": key for number, key in enumerate(keys)})
    found = settings_from(TEXT, tmp_path, variables | environ(UPSTREAMS__NEW__TYPE="alpha")).upstreams["new"]
    assert [key.get_secret_value() for key in found.api_keys] == keys


def test_lists_and_mappings_are_json(tmp_path: Path) -> None:
    variables = environ(
        UPSTREAMS='{"x": {"type": "alpha", "api_keys": ["1", "2"], "headers": {"X-A": "b"}}}',
        UPSTREAMS__X__HEADERS='{"X-C": "d"}',
        MODELS="{}",
    )
    found = settings_from(TEXT, tmp_path, variables)
    assert list(found.upstreams) == ["x"]
    assert [key.get_secret_value() for key in found.upstreams["x"].api_keys] == ["1", "2"]
    assert found.upstreams["x"].headers == {"X-C": "d"}
    assert found.models == {}


def test_json_that_is_none_is_refused_without_showing_it(tmp_path: Path) -> None:
    assert mistakes(tmp_path, TEXT, AUTH__KEYS='{"a": canary') == [
        "EMBEDDING_GATEWAY__AUTH__KEYS: auth.keys: not JSON; write [..] or {..} as JSON"
    ]
    assert mistakes(tmp_path, TEXT, SERVER="[canary") == [
        "EMBEDDING_GATEWAY__SERVER: server: not JSON; write [..] or {..} as JSON"
    ]


@pytest.mark.parametrize("value", ["123456", "[abc", "{x}", "true", "1e5", "0x10"])
def test_a_key_stays_text_whatever_it_looks_like(tmp_path: Path, value: str) -> None:
    variables = environ(UPSTREAMS__DS_COMPAT__SECRET_KEY=value, UPSTREAMS__DS_COMPAT__API_KEY=value)
    found = settings_from(TEXT, tmp_path, variables).upstreams["ds-compat"]
    assert isinstance(found, AlphaSettings)
    assert found.secret_key is not None
    assert found.api_key is not None
    assert {found.secret_key.get_secret_value(), found.api_key.get_secret_value()} == {value}


def test_null_takes_a_value_away(tmp_path: Path) -> None:
    found = settings_from(TEXT, tmp_path, environ(CACHE__MEMORY="null", SERVER__METRICS_PORT="null", AUTH="null"))
    assert found.cache.memory is None
    assert found.auth is None


def test_a_yes_or_no_is_read_from_text(tmp_path: Path) -> None:
    found = settings_from(TEXT, tmp_path, environ(UPSTREAMS__DS_COMPAT__FULL="true")).upstreams["ds-compat"]
    assert isinstance(found, AlphaSettings)
    assert found.full is True


def test_unknown_names_are_refused_by_the_variables_name(tmp_path: Path) -> None:
    variables = {"SERVR__PORT": "1", "SERVER__PROT": "1", "UPSTREAMS__DS_COMPAT__API_KYE": "canary", "SERVER__": "1"}
    variables |= {"UPSTREAMS__NEW__TIMEOUT": "1s", "SERVER__PORT": "many"}
    lines = mistakes(tmp_path, TEXT, **variables)
    assert sorted(line.removeprefix("EMBEDDING_GATEWAY__") for line in lines) == [
        "SERVER__: server.: unknown key",
        "SERVER__PORT: server.port: must be a whole number, 0 to 65535",
        "SERVER__PROT: server.prot: unknown key; did you mean port?",
        "SERVR__PORT: servr.port: unknown key; did you mean server?",
        "UPSTREAMS__DS_COMPAT__API_KYE: upstreams.ds-compat.api_kye: unknown key; did you mean api_key?",
        "UPSTREAMS__NEW__TIMEOUT: upstreams.new.type: missing; set it to one of alpha, beta, gamma, plain",
    ]


def test_an_override_mends_what_the_file_lacks(tmp_path: Path) -> None:
    text = "server: {port: '${NOT_SET}', host: ''}\nupstreams: {a: {type: nonsense}}"
    variables = environ(SERVER__PORT="9000", SERVER__HOST="::1", UPSTREAMS__A__TYPE="plain")
    assert settings_from(text, tmp_path, variables).server.port == 9000


def test_an_override_reaches_an_upstream_that_a_vendors_variable_switched_on(tmp_path: Path) -> None:
    variables = environ(UPSTREAMS__ALPHA__TIMEOUT="9s") | {"ALPHA_API_KEY": "k"}
    assert settings_from("", tmp_path, variables).upstreams["alpha"].timeout == 9.0


def test_an_override_value_is_taken_as_it_is(tmp_path: Path) -> None:
    found = settings_from(TEXT, tmp_path, environ(UPSTREAMS__DS_COMPAT__API_KEY="${HOME}"))
    assert found.upstreams["ds-compat"].api_key is not None
    assert found.upstreams["ds-compat"].api_key.get_secret_value() == "${HOME}"


@pytest.mark.parametrize("levels", [600, 100_000])
def test_an_override_that_is_nested_too_deeply_is_one_line(tmp_path: Path, levels: int) -> None:
    told = "EMBEDDING_GATEWAY__AUTH__KEYS: auth.keys: is nested too deeply"
    assert mistakes(tmp_path, TEXT, AUTH__KEYS="[" * levels + "]" * levels) == [told]


def test_single_underscores_are_somebody_elses_variables(tmp_path: Path) -> None:
    variables = {"EMBEDDING_GATEWAY_SERVICE_HOST": "10.0.0.1", "EMBEDDING_GATEWAY_PORT": "tcp://10.0.0.1:80"}
    assert settings_from(TEXT, tmp_path, variables).server.port == 8000


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.sampled_from(["server", "PORT", "upstreams", "DS_COMPAT", "0", "", "x", "models", "auth"]), min_size=1
    ),
    value=st.sampled_from(["1", "null", "[]", "{}", '{"a": 1}', "canary-value", "[1", '{"type": "canary-value"}']),
)
def test_no_override_whatever_ends_in_anything_but_settings_or_readable_mistakes(
    tmp_path: Path, steps: list[str], value: str
) -> None:
    try:
        settings_from(TEXT, tmp_path, {"EMBEDDING_GATEWAY__" + "__".join(steps): value})
    except ConfigError as refusal:
        lines = refusal.mistakes
    else:
        return
    assert lines
    assert "canary" not in "".join(lines)
