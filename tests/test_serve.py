"""When the listener closes, whoever connected before is answered."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from app import serve
from app.config import Settings
from app.http.protocol import HEAD_TIMEOUT
from app.main import create_app
from app.serve import CannotListen, Server, _admin, bind, uvicorn_config
from tests.api.support import head, post
from tests.clock import settle
from tests.harness import settings_of

ASKED = post({"model": "lexical", "input": "x", "dimensions": 64})


@contextlib.asynccontextmanager
async def stopping() -> AsyncIterator[tuple[tuple[str, int], Callable[[], Coroutine[Any, Any, None]]]]:
    """Runs a server; yields its address, and a function that stops it."""
    settings = settings_of({"upstreams": {"lexical": {"type": "lexical"}}})
    app = create_app(settings)
    config = uvicorn_config(app, settings)
    config.load()
    server = Server(config, app)
    server.lifespan = config.lifespan_class(config)
    listener = bind("127.0.0.1", 0)
    await server.startup([listener])

    async def stop() -> None:
        server._stop()
        await server.shutdown([listener])

    try:
        yield listener.getsockname(), stop
    finally:
        if not server.should_exit:
            await stop()  # otherwise its event loop would never close


def run(test: Coroutine[Any, Any, None]) -> None:
    """Runs a test on the program's kind of event loop."""
    settings = settings_of({"upstreams": {"lexical": {"type": "lexical"}}})
    with asyncio.Runner(loop_factory=uvicorn_config(None, settings).get_loop_factory()) as runner:
        runner.run(test)


def all_of(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_who_waits_to_be_accepted_is_let_in() -> None:
    async def test() -> None:
        async with stopping() as (address, stop):
            with contextlib.ExitStack() as callers:
                # In one turn of the event loop, which accepts them in a later one.
                waiting = [callers.enter_context(socket.create_connection(address, timeout=10)) for _ in range(5)]
                for connection in waiting:
                    connection.sendall(ASKED)
                await stop()
                for connection in waiting:
                    answer = all_of(connection)
                    assert answer.startswith(b"HTTP/1.1 200 ")
                    assert b"connection: close" in answer
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)

    run(test())


@pytest.mark.parametrize("before", [b"", head("GET", "/healthz")], ids=["just let in", "kept alive"])
def test_a_request_that_comes_over_an_idle_connection_as_the_listener_closes_is_answered(before: bytes) -> None:
    async def test() -> None:
        async with stopping() as (address, stop):
            reader, writer = await asyncio.open_connection(*address)
            if before:
                writer.write(before)
                assert (await asyncio.wait_for(reader.readuntil(b'"ok"}'), 10)).startswith(b"HTTP/1.1 200 ")
            await settle()
            stopped = asyncio.create_task(stop())
            await settle()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(*address)
            writer.write(ASKED)
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" in answer
            writer.close()
            await stopped

    run(test())


def test_a_port_for_metrics_that_is_lost_while_starting_is_told() -> None:
    """A port bound with SO_REUSEADDR is taken only once its owner listens; the event loop would close it silently."""

    async def test() -> None:
        with bind("127.0.0.1", 0) as ours, socket.socket() as rival:
            rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            rival.bind(ours.getsockname())
            rival.listen()
            port = rival.getsockname()[1]
            with pytest.raises(CannotListen, match=rf"^cannot listen on 127\.0\.0\.1:{port}: Address already in use$"):
                async with _admin(create_app(settings_of({})), ours):
                    pass

    run(test())


def test_the_time_for_a_head_follows_the_configuration_on_a_port_for_metrics_too() -> None:
    def settings(request_timeout: float) -> Settings:
        server = {"metrics_port": 1234, "request_timeout": request_timeout}
        return settings_of({"upstreams": {"lexical": {"type": "lexical"}}, "server": server})

    async def test() -> None:
        app = create_app(settings(600))
        await app.gateway.start()
        with bind("127.0.0.1", 0) as listener:
            async with _admin(app, listener):
                await app._change_to(settings(0.05))
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                writer.write(b"GET /metrics HTTP/1.1\r\n")
                assert b"in time" in await asyncio.wait_for(reader.read(), HEAD_TIMEOUT / 2)
                writer.close()
        await asyncio.gather(*app._tasks)
        await app.gateway.aclose()

    run(test())


@pytest.mark.parametrize(
    ("limit", "workers", "memory", "needed"),
    [
        ("max", 1, {"max_size": "256MiB"}, None),  # cgroup v2 without a limit
        ("9223372036854771712", 1, {"max_size": "256MiB"}, None),  # v1 without one
        (str(342 * 2**20), 1, {"max_size": "256MiB"}, None),
        (str(341 * 2**20), 1, {"max_size": "256MiB"}, 341),
        (str(512 * 2**20), 2, {"max_size": "256MiB"}, 743),
        (str(128 * 2**20), 1, None, None),
    ],
)
def test_less_memory_than_full_caches_take_is_told_at_the_start(
    limit: str,
    workers: int,
    memory: dict[str, str] | None,
    needed: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(serve, "MEMORY_LIMITS", (tmp_path / "memory.max", tmp_path / "none"))
    serve._warn_of_little_memory(settings_of({"server": {"workers": workers}, "cache": {"memory": memory}}))
    told = [record.getMessage() for record in caplog.records]
    if needed is None:
        assert not told
    else:
        (line,) = told
        assert f"{int(limit) // 2**20} MiB of memory are little" in line
        assert f"may take {needed} MiB" in line
