"""Running the application: listeners, workers, signals. The only module that knows the ASGI server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from types import FrameType

import uvicorn
from uvicorn.supervisors import Multiprocess

from app.config import Settings
from app.main import App
from app.protocol import Protocol

log = logging.getLogger(__name__)

STOPPING = 10.0
"""Seconds on top of a request's own time for the last of them to finish after the listener has closed."""


def drain_on_sigterm(app: App, seconds: float) -> None:
    """A lame-duck phase, for load balancers hear of a stop later than the process does.

    The first SIGTERM makes the application not ready at once and, `seconds` later, does what it would have
    done: close the listener and let requests finish. A second one, or Ctrl-C, does not wait. To be called
    once the server has set its own handlers.
    """
    stop = signal.getsignal(signal.SIGTERM)
    loop = asyncio.get_running_loop()

    def handle(number: int, frame: FrameType | None) -> None:
        if not callable(stop):
            return
        if app.gateway.draining or not seconds:
            stop(number, frame)
            return
        app.gateway.draining = True
        log.info("stopping: not ready any more, listening for another %g s", seconds)
        loop.call_soon_threadsafe(loop.call_later, seconds, stop, number, frame)

    signal.signal(signal.SIGTERM, handle)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port that is taken is known before anything is built. Raises `OSError`."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.set_inheritable(True)
    return listener


def config_of(app: App | str, settings: Settings) -> uvicorn.Config:
    """The ASGI server as it serves the application (or what its factory, `module:name`, makes)."""
    server = settings.server
    return uvicorn.Config(
        app,
        factory=isinstance(app, str),
        workers=server.workers,
        http=Protocol,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(server.request_timeout + STOPPING),
        ws="none",
    )


def serve(app: App, settings: Settings, listener: socket.socket) -> None:
    """One process, until a signal. With `metrics_port`, a second listener for /metrics and /docs."""
    app.on_started = lambda: drain_on_sigterm(app, settings.server.drain)
    main = uvicorn.Server(config_of(app, settings))
    if app.admin is None:
        main.run(sockets=[listener])
        return
    beside_listener = listen(settings.server.host, settings.server.metrics_port or 0)
    config = uvicorn.Config(
        app.admin,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
    )

    async def both() -> None:
        admin = _Quiet(config)
        beside = asyncio.create_task(admin.serve(sockets=[beside_listener]))
        await main.serve(sockets=[listener])
        admin.should_exit = True
        await beside

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(both())


class _Quiet(uvicorn.Server):
    """A server that leaves signals to the one beside it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve_workers(factory: str, settings: Settings, listener: socket.socket) -> None:
    """Several processes behind one listener; each builds its own application by calling `factory`.

    Their metrics are merged by prometheus_client over files in a directory of this run's own.
    """
    with tempfile.TemporaryDirectory(prefix="embedding-gateway-") as directory:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
        config = config_of(factory, settings)
        Multiprocess(config, sockets=[listener]).run()
