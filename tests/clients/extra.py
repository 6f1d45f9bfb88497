"""The clients that only `make test-clients` installs: where they are, and how tests run them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytest

from tests.clients.support import BGE, KEY, SMALL, TEXTS, config, exactly_float32, fake_upstream, same
from tests.fakes import FakeOpenAI, Vector
from tests.harness import running

FOLDER = Path(__file__).parent
NODE = FOLDER / "node-extra"
PYTHON = FOLDER / ".venv-extra" / "bin" / "python"
CLIENT = FOLDER / "extra_client.py"
READY = [FOLDER / ".venv-extra" / ".installed", NODE / "node_modules" / ".package-lock.json"]
"""Files that exist once the installation has finished."""

SLASHED = f"up/{BGE}"
ALIAS = "our-model"
"""A public name of `SMALL` that no client knows."""

MANY = [f"文档 {i}" for i in range(2100)]
"""More texts than any client sends in one request."""

PLAIN = {
    "HAYSTACK_TELEMETRY_ENABLED": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
}
"""The only settings that differ from the clients' defaults: they keep everything on this machine."""


def missing(what: str, language: Literal["python", "javascript"]) -> NoReturn:
    """Skips the test, or fails it under `make test-clients`, which names the languages it installed clients for."""
    words = f"{what}: run `make test-clients`"
    if language in os.environ.get("TEST_CLIENTS", "").split():
        pytest.fail(words)
    pytest.skip(words)


def python() -> list[str]:
    if not READY[0].exists():
        missing("LiteLLM and Haystack are not installed", "python")
    return [str(PYTHON)]


def node() -> list[str]:
    found = shutil.which("node")
    if not found or not READY[1].exists():
        missing("LangChain JS and the AI SDK are not installed", "javascript")
    return [found]


def run(command: Sequence[str], home: Path, **more: str) -> str:
    """The command's output, run without the keys, proxies and settings of this environment."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), **PLAIN, **more}
    ran = subprocess.run(command, cwd=NODE, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


class Results(dict[str, Any]):
    """What a script recorded, by the name of each step."""

    def value(self, name: str) -> Any:
        assert "value" in self[name], self[name]
        return self[name]["value"]

    def error(self, name: str, kind: str, status: int | None, words: str) -> None:
        assert "error" in self[name], name
        got = self[name]["error"]
        assert (got["class"], got.get("status")) == (kind, status), got
        assert re.search(words, got["message"]), got


def asked(command: Sequence[str], base_url: str, home: Path) -> Results:
    """Runs a script once for all its requests: starting it costs more than everything else."""
    address = {"base_url": base_url, "baseURL": base_url, "key": KEY, "apiKey": KEY}
    options = address | {"model": SMALL, "slashed": SLASHED, "alias": ALIAS, "texts": TEXTS, "many": MANY}
    printed = run([*command, json.dumps(options)], home)
    return Results(json.loads(printed.splitlines()[-1]))


@contextmanager
def gateway() -> Iterator[tuple[FakeOpenAI, str]]:
    """The upstream and the gateway's base URL."""
    with fake_upstream() as fake:
        alias = {"deployments": [{"upstream": "up", "model": SMALL}]}
        with running(config(fake) | {"models": {ALIAS: alias}}) as started:
            yield fake, started.base_url


Asked = tuple[FakeOpenAI, Results]


def assert_numbers(got: Sequence[Sequence[float]], wanted: Iterable[Vector]) -> None:
    """The client's vectors are the upstream's, read from decimal numbers."""
    for position, (row, vector) in enumerate(zip(got, wanted, strict=True)):
        assert same(row, vector), position


def assert_float32(got: Sequence[Sequence[float]], wanted: Iterable[Vector]) -> None:
    """The client's vectors are the upstream's, read from base64."""
    for position, (row, vector) in enumerate(zip(got, wanted, strict=True)):
        assert exactly_float32(row, vector), position
