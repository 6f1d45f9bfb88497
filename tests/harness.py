"""The gateway as its clients see it: the real program on a real port, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import resource
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import uvicorn
import yaml

from app.config import Settings
from app.config.load import load
from app.logs import RequestLine, RequestLog
from app.main import App, create_app
from app.serve import bind, uvicorn_config
from app.upstreams import UPSTREAMS

START = 20.0
"""Seconds in which a server on loopback must start or stop."""


def settings_of(config: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """The settings that `config` gives as a file."""
    with TemporaryDirectory() as directory:
        file = Path(directory, "config.yaml")
        file.write_text(yaml.safe_dump(dict(config), allow_unicode=True))
        return load(str(file), environ or {}, UPSTREAMS, listening=lambda *_: False)


@dataclass
class Running:
    """A running gateway."""

    app: App
    url: str
    log: io.StringIO = field(repr=False)

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def post(self, body: Any, *, path: str = "/v1/embeddings", **headers: str) -> httpx.Response:
        """Sends one request; header names are written with `_` for `-`."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, bytes):
            return httpx.post(self.url + path, content=body, headers=sent, timeout=30)
        return httpx.post(self.url + path, json=body, headers=sent, timeout=30)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels, from the registry that Prometheus reads."""
        total = 0.0
        for family in self.app.gateway.metrics.registry.collect():
            for sample in family.samples:
                if sample.name == f"embedding_gateway_{name}" and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    def call(self, coroutine: Any) -> Any:
        """Runs a coroutine in the gateway's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(START)

    _loop: asyncio.AbstractEventLoop = field(init=False, repr=False)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.up.set()


class _AtOnce(RequestLog):
    """Flushes each line at once, so that a test with its answer finds the line."""

    def line(self, fields: RequestLine) -> None:
        super().line(fields)
        self.flush()


@contextmanager
def no_descriptors() -> Iterator[None]:
    """The system gives this process no further files or sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    highest = max(int(file.name) for file in Path("/dev/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)


@contextmanager
def no_threads() -> Iterator[None]:
    """The system gives this process no further threads: their stacks would not fit in memory."""
    before = threading.stack_size(2**46)
    try:
        yield
    finally:
        threading.stack_size(before)


def _tasks(loop: asyncio.AbstractEventLoop | None) -> list[str]:
    return [repr(task) for task in asyncio.all_tasks(loop)] if loop else []


@contextmanager
def running(config: Mapping[str, Any], environ: Mapping[str, str] | None = None, **parts: Any) -> Iterator[Running]:
    """Runs a gateway with this configuration; `parts` are passed to `create_app`."""
    log = io.StringIO()
    request_log = _AtOnce("text", lambda lines: log.write(lines.decode()) and len(lines))
    settings = settings_of(config, environ)
    app = create_app(settings, request_log=request_log, **parts)
    listener = bind("127.0.0.1", 0)
    server = _Server(uvicorn_config(app, settings, app.on_invalid_http, app.request_timeout))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        if not server.up.wait(START) or not server.started:
            raise RuntimeError("the gateway did not start")
        gateway = Running(app, f"http://127.0.0.1:{listener.getsockname()[1]}", log)
        assert server.loop is not None
        gateway._loop = server.loop
        yield gateway
    finally:
        server.should_exit = True
        thread.join(START)
        assert not thread.is_alive(), f"the gateway did not stop; still there: {_tasks(server.loop)}"
