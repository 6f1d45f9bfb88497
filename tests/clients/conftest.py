"""A gateway on a real port before a fake upstream; nothing here reaches beyond this machine."""

from __future__ import annotations

import lzma
import os
import sys
from collections.abc import Iterator
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients.support import config, fake_upstream
from tests.fakes import FakeOpenAI
from tests.harness import Running, running

if TYPE_CHECKING:
    import tiktoken

CACHED_TABLE = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
"""Under which name tiktoken looks for cl100k_base: the SHA-1 of the table's address."""

HERE = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::"}


class _Watch:
    """Every host that anything in this process looks up or connects to, other than this machine."""

    def __init__(self) -> None:
        self.active = False
        self.abroad: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "socket.connect":
            host = args[1][0] if isinstance(args[1], tuple) else None  # a path is a local socket's
        elif event == "socket.getaddrinfo":
            host = args[0].decode() if isinstance(args[0], bytes) else args[0]
        else:
            return
        if host not in HERE:
            self.abroad.append(str(host))
            raise ConnectionRefusedError(f"tests do not talk to {host}")


@pytest.fixture(scope="session")
def _watch() -> _Watch:
    return _Watch()  # an audit hook cannot be taken away again, so there is one, and it can sleep


@pytest.fixture(autouse=True)
def _nothing_leaves_this_machine(_watch: _Watch) -> Iterator[None]:
    """Refuses connections to elsewhere, and fails the test that tried: telemetry, downloads, proxies."""
    _watch.abroad.clear()
    _watch.active = True
    yield
    _watch.active = False
    assert _watch.abroad == [], "something tried to reach the network"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients in their defaults: no key, address, proxy or tracing from whoever runs the tests."""
    for name in list(os.environ):
        if name.upper().startswith(("OPENAI_", "AZURE_", "LANGSMITH_", "LANGCHAIN_")) or "PROXY" in name.upper():
            monkeypatch.delenv(name)
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    monkeypatch.setenv("LANGCHAIN_TRACING_V2", "false")


@pytest.fixture(scope="module")
def _upstream() -> Iterator[FakeOpenAI]:
    with fake_upstream() as fake:
        yield fake


@pytest.fixture
def fake(_upstream: FakeOpenAI) -> FakeOpenAI:
    """The upstream, with nothing counted and nothing planned."""
    _upstream.reset()
    return _upstream


@pytest.fixture(scope="module")
def _gateway(_upstream: FakeOpenAI) -> Iterator[Running]:
    with running(config(_upstream)) as gateway:
        yield gateway


@pytest.fixture
def gateway(_gateway: Running, fake: FakeOpenAI) -> Running:
    """A gateway that asks for a key and keeps nothing, so that every answer was computed for this test."""
    return _gateway


@pytest.fixture(scope="session")
def cl100k(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiktoken.Encoding]:
    """tiktoken's cl100k_base, read offline from the very table that the gateway decodes with."""
    import tiktoken

    folder = tmp_path_factory.mktemp("tiktoken")
    packed = files("app.data").joinpath("cl100k_base.tiktoken.xz").read_bytes()
    table = folder / CACHED_TABLE
    table.write_bytes(lzma.decompress(packed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield tiktoken.get_encoding("cl100k_base")
    assert table.exists(), "tiktoken found the table damaged and deleted it"
