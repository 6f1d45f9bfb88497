"""README.md's table of clients: every line of code in it runs, and gets the same vector as a plain request."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.clients import extra
from tests.clients.support import same
from tests.harness import Running, running

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SHOWN = "http://127.0.0.1:8080"
SETTINGS = {"Spring AI", "Dify", "RAGFlow", "Open WebUI", "AnythingLLM"}
"""Clients that are configured and run no code of the user's; test_raw_shapes.py sends their requests."""


@dataclass
class Row:
    client: str
    lines: list[str]

    @property
    def javascript(self) -> bool:
        return self.lines[0].endswith(";")


def table() -> Iterator[Row]:
    _, _, rest = README.partition("\n| client | three lines | good to know |\n")
    assert rest, "README.md has lost its table of clients"
    for line in rest.splitlines()[1:]:
        if not line.startswith("| "):
            return
        client, lines, _ = line.strip("| ").split(" | ")
        yield Row(client, re.findall(r"`([^`]+)`", lines))


ROWS = list(table())
CODE = [row for row in ROWS if row.client not in SETTINGS]


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with running({"upstreams": {"lexical": {"type": "lexical"}}}) as gateway:
        yield gateway


def test_every_client_has_three_lines_with_the_address_and_the_model() -> None:
    assert {row.client for row in ROWS} >= SETTINGS
    assert len(CODE) >= 10
    for row in ROWS:
        assert len(row.lines) == 3, row.client
        text = "\n".join(row.lines)
        assert SHOWN in text, row.client
        assert "lexical" in text, row.client


@pytest.mark.parametrize("row", CODE, ids=[row.client for row in CODE])
@pytest.mark.usefixtures("cl100k")
def test_the_lines_give_the_vector(row: Row, gateway: Running, tmp_path: Path) -> None:
    code = "\n".join(row.lines).replace(SHOWN, gateway.url)
    if row.javascript:
        command = [*extra.node(), "--input-type=module", "--eval", f"{code}\nconsole.log(JSON.stringify(vector))"]
    else:
        python = extra.python() if re.search("litellm|haystack", code) else [sys.executable]
        command = [*python, "-c", f"{code}\nprint(__import__('json').dumps(vector))"]
    tables = {"TIKTOKEN_CACHE_DIR": os.environ["TIKTOKEN_CACHE_DIR"]}
    got = json.loads(extra.run(command, tmp_path, **tables).splitlines()[-1])
    plain = gateway.post({"model": "lexical", "input": "hello"}).json()["data"][0]["embedding"]
    assert len(got) == 512
    assert same(got, np.asarray(plain, dtype=np.float32))
