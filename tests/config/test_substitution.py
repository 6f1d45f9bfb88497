"""`${VAR}` in the strings of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.kinds import settings_from


def host(text: str, tmp_path: Path, **variables: str) -> str:
    return settings_from(f"server: {{host: '{text}'}}", tmp_path, variables).server.host


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${A}", "one"),
        ("x${A}y${B}z", "xoneytwoz"),
        ("${A:-other}", "one"),
        ("${EMPTY:-other}", "other"),
        ("${NONE:-http://h:1/p?q=1 2}", "http://h:1/p?q=1 2"),
        ("x${NONE:-}", "x"),
        ("$${A}", "${A}"),
        ("$${A} ${A}", "${A} one"),
        ("$A $ {A} $$ }", "$A $ {A} $$ }"),
        ("${NESTED}", "${A}"),
    ],
)
def test_references_are_replaced_once_and_anywhere_in_a_text(text: str, value: str, tmp_path: Path) -> None:
    assert host(text, tmp_path, A="one", B="two", EMPTY="", NESTED="${A}") == value


def test_a_replaced_text_becomes_the_number_that_is_needed(tmp_path: Path) -> None:
    text = """
server: {port: "${PORT:-8081}", request_timeout: "${SECONDS}s", max_body: "${SIZE}", metrics_port: "${NONE:-null}"}
upstreams:
  alpha: {type: alpha, api_keys: ["${KEY}"], headers: {X-A: "${KEY}"}, full: "${FULL:-true}"}
models:
  docs: {deployments: [{upstream: alpha, model: "${MODEL:-a-1}", weight: "${WEIGHT:-0.5}"}]}
"""
    found = settings_from(text, tmp_path, {"SECONDS": "1.5", "SIZE": "1KiB", "KEY": "k"})
    assert (found.server.port, found.server.request_timeout, found.server.max_body) == (8081, 1.5, 1024)
    assert found.server.metrics_port is None
    assert found.upstreams["alpha"].headers == {"X-A": "k"}
    assert found.models["docs"].deployments[0].weight == 0.5


def test_a_date_is_text_and_a_merge_is_followed(tmp_path: Path) -> None:
    text = """
upstreams:
  one: &one {type: alpha, api_key: k, timeout: 3s}
  two: {<<: *one, timeout: 4s}
models:
  docs: {deployments: [{upstream: one, model: 2024-05-01}]}
"""
    found = settings_from(text, tmp_path)
    assert [found.upstreams[name].timeout for name in ("one", "two")] == [3.0, 4.0]
    assert found.models["docs"].deployments[0].model == "2024-05-01"
