"""A gateway on a real port in front of a fake upstream; nothing here connects beyond this machine."""

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
"""The file name under which tiktoken caches cl100k_base: the SHA-1 of the table's URL."""

HERE = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::"}


class _Watch:
    """Records and refuses every lookup of, and connection to, a host other than this machine, in this process."""

    def __init__(self) -> None:
        self.active = False
        self.abroad: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "socket.connect":
            host = args[1][0] if isinstance(args[1], tuple) else None  # a unix socket's is a path
        elif event == "socket.getaddrinfo":
            host = args[0].decode() if isinstance(args[0], bytes) else args[0]
        else:
            return
        if host not in HERE:
            self.abroad.append(str(host))
            raise ConnectionRefusedError(f"tests do not talk to {host}")


@pytest.fixture(scope="session")
def _watch() -> _Watch:
    return _Watch()  # an audit hook cannot be removed, so there is one, which can be inactive


@pytest.fixture(autouse=True)
def _nothing_leaves_this_machine(_watch: _Watch) -> Iterator[None]:
    """Refuses connections to other hosts, and fails the test that tried one: telemetry, downloads, proxies."""
    _watch.abroad.clear()
    _watch.active = True
    yield
    _watch.active = False
    assert _watch.abroad == [], "something tried to reach the network"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the clients at their defaults: no key, address, proxy or tracing from the environment of the tests."""
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
    """The upstream, with no calls recorded and no faults planned."""
    _upstream.reset()
    return _upstream


@pytest.fixture(scope="module")
def _gateway(_upstream: FakeOpenAI) -> Iterator[Running]:
    with running(config(_upstream)) as gateway:
        yield gateway


@pytest.fixture
def gateway(_gateway: Running, fake: FakeOpenAI) -> Running:
    """A gateway that requires a key and has no cache, so that every answer was computed for this test."""
    return _gateway


@pytest.fixture(scope="session")
def cl100k(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiktoken.Encoding]:
    """tiktoken's cl100k_base, loaded offline from the same table that the gateway decodes with."""
    import tiktoken

    folder = tmp_path_factory.mktemp("tiktoken")
    packed = files("app.data").joinpath("cl100k_base.tiktoken.xz").read_bytes()
    table = folder / CACHED_TABLE
    table.write_bytes(lzma.decompress(packed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield tiktoken.get_encoding("cl100k_base")
    assert table.exists(), "tiktoken found the table damaged and deleted it"
