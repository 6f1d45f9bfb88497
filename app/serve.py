"""Running the application: listeners, signals, worker processes. The only module that knows the ASGI server."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import uvicorn

from app.clock import SystemClock
from app.config import Settings
from app.config.source import ConfigSource
from app.config.watch import ConfigWatcher
from app.main import GRACE, App
from app.metrics import ConfigMetrics
from app.outbox import Outbox
from app.protocol import Protocol
from app.workers import ParentChannel, Workers

log = logging.getLogger(__name__)

KEEP_ALIVE = 75
"""Seconds for which a connection may lie idle: longer than any load balancer in use takes it to."""
BACKLOG = 2048
"""Connections that wait to be accepted, at most."""
MOMENT = 0.25
"""Seconds after the listener has closed in which a request that was on its way over an idle connection is answered."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""mallopt(3)'s."""


class CannotListen(Exception):
    """The address cannot be had. The text is for whoever started the program."""

    def __init__(self, host: str, port: int, reason: str | None) -> None:
        super().__init__(f"cannot listen on {host}:{port}: {reason}")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port that is taken is known before anything is built. Raises `CannotListen`.

    Nobody is to wait at a port where nothing serves yet, so it listens later, and whoever listens first has the port.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise CannotListen(host, port, error.strerror) from None
    except UnicodeError:
        raise CannotListen(host, port, "not the name of a host") from None
    return listener


def _begin(listener: socket.socket) -> None:
    """Listens, or goes on. Raises `CannotListen`."""
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise CannotListen(host, port, error.strerror) from None


def uvicorn_config(
    app: Any,
    settings: Settings,
    on_invalid_http: Callable[[], None] = lambda: None,
    timeout: Callable[[], float] | None = None,
    **more: Any,
) -> uvicorn.Config:
    """The ASGI server as it serves an application of ours; `on_invalid_http` is told of what is no HTTP request, and
    `timeout` says how long a request may take in all, if that may change."""
    timeout = timeout or (lambda: settings.server.request_timeout)
    return uvicorn.Config(
        app,
        http=partial(Protocol, outbox=Outbox(), on_invalid_http=on_invalid_http, timeout=timeout),  # type: ignore[arg-type]  # is only called
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=_grace(settings),
        ws="none",
        backlog=BACKLOG,
        **more,
    )


def _grace(settings: Settings) -> int:
    return int(settings.server.request_timeout + GRACE)


class Server(uvicorn.Server):
    """The ASGI server, stopping the way load balancers need it, for they hear of a stop later than the process does.

    The first SIGTERM makes the application not ready at once; `drain` seconds later the listener closes and
    requests finish. A second one does not wait so long, nor does Ctrl-C; Ctrl-C after that drops what is left.
    SIGHUP reads the configuration again. A worker is told all that by its parent: see `app.workers`.
    """

    def __init__(self, config: uvicorn.Config, app: App, orders: ParentChannel | None = None) -> None:
        super().__init__(config)
        self._app, self._orders = app, orders
        self.interrupted = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        if self._orders:
            self._orders.follow(stop=self._begin_stop, reload=self._app.reload)
        else:
            loop.add_signal_handler(signal.SIGHUP, self._app.reload)
        yield
        # What is left to do takes no time and must not be cut short: the exit code is to say that all went well.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # The event loop closes a socket that it cannot listen on without a word. Listening again raises what it hid.
        again = [listener.dup() for listener in sockets or ()]
        await super().startup(sockets)
        try:
            for listener in again:
                _begin(listener)
        except CannotListen:
            await self.shutdown()
            raise
        finally:
            for listener in again:
                listener.close()
        if self._orders:
            self._orders.start_heartbeat()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As the server does it, but whoever came before the listener closed is answered: what is closed with bytes
        unread is reset, be it in the backlog or here."""
        for server, listener in zip(self.servers, sockets or (), strict=False):
            await self._let_in(server, listener)
        if not self.force_exit:
            await asyncio.sleep(MOMENT)
        await super().shutdown(sockets)

    async def _let_in(self, server: asyncio.Server, listener: socket.socket) -> None:
        """Closes the listener, and accepts the connections that wait in its backlog."""
        protocol: Any = self.config.http_protocol_class

        def connected() -> asyncio.BaseProtocol:
            made: asyncio.BaseProtocol = protocol(
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return made

        # An error is that there are no more, or that there are no descriptors for them.
        with contextlib.suppress(OSError), listener.dup() as backlog:
            server.close()
            backlog.setblocking(False)
            for _ in range(BACKLOG):
                connection, _ = backlog.accept()
                connection.setblocking(False)
                await asyncio.get_running_loop().connect_accepted_socket(connected, connection)

    def _terminate(self) -> None:
        if self._app.draining:
            self._stop()
        else:
            self._begin_stop()

    def _begin_stop(self) -> None:
        if self._app.draining:
            return
        seconds = self._app.settings.server.drain
        self._app.drain()
        if not self.started or not seconds:
            self._stop()
            return
        log.info("stopping: not ready any more, listening for another %g s", seconds)
        asyncio.get_running_loop().call_later(seconds, self._stop)

    def _stop(self) -> None:
        self._app.drain()
        self.config.timeout_graceful_shutdown = _grace(self._app.settings)
        self.should_exit = True

    def _interrupt(self) -> None:
        self.interrupted = True
        self.force_exit = self.should_exit
        self._stop()


class _Beside(uvicorn.Server):
    """A server that leaves signals to whoever it runs beside."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _admin(app: App, listener: socket.socket | None) -> AsyncIterator[None]:
    """Serves /metrics and /docs on a listener of their own, if there is one, as long as the block runs. Raises
    `CannotListen`."""
    if listener is None:
        yield
        return
    _begin(listener)
    server = _Beside(uvicorn_config(app.admin, app.settings, lifespan="off"))
    server.config.timeout_graceful_shutdown = 1  # a scrape is no work worth waiting for
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def keep_freed_memory() -> None:
    """Has glibc keep what big replies and bodies took, instead of giving it back to the kernel and paying for every
    page of the next one again: of 139 page faults a request of 128 texts 13 are left (bench/README.md). Elsewhere
    it does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def allow_connections() -> None:
    """Has the kernel give as many descriptors as it may. What is usual at first, 1024, is for programs that must be
    able to `select`; past it connections wait unseen, and upstreams cannot be called."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems give a process fewer than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve(
    app: App, listener: socket.socket, *, admin: socket.socket | None = None, orders: ParentChannel | None = None
) -> None:
    """One process, until a signal or an order. `admin` is the listener for /metrics and /docs, if they have one.

    Raises `CannotListen`, and `KeyboardInterrupt` when it was Ctrl-C that stopped it.
    """
    keep_freed_memory()
    allow_connections()
    config = uvicorn_config(app, app.settings, app.on_invalid_http, app.request_timeout)
    server = Server(config, app, orders)

    async def both() -> None:
        async with _admin(app, admin):
            await server.serve(sockets=[listener])

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(both())
    if server.interrupted:
        raise KeyboardInterrupt


def serve_workers(
    app: App,
    command: Callable[[int], list[str]],
    listener: socket.socket,
    *,
    source: ConfigSource,
    admin: socket.socket | None = None,
) -> int:
    """Several processes behind one listener, which they inherit. `command` starts one, given its orders' descriptor.

    `app` is not served here, only its /metrics, which tell of all workers where metrics are `shared`. The
    configuration is read again here, once for all of them. Returns the exit code. Raises `CannotListen`.
    """
    allow_connections()
    workers = Workers(command, app.settings, listener)

    async def both() -> int:
        config = ConfigMetrics()

        def result(valid: bool) -> None:
            if valid:  # each worker counts that it has followed
                config.config_valid.set(1)
            else:
                config.reloaded(False)

        async def change(settings: Settings) -> None:
            await app.dry_run(settings)  # no worker could start with what cannot be built
            await workers.change(settings)

        watch = ConfigWatcher(source, SystemClock(), change, result)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, workers.stop, signal.SIGTERM)
        loop.add_signal_handler(signal.SIGINT, workers.stop, signal.SIGINT)
        loop.add_signal_handler(signal.SIGHUP, watch.ask)
        watching = asyncio.create_task(watch.run())
        try:
            async with _admin(app, admin):
                return await workers.run()
        finally:
            watching.cancel()

    with asyncio.Runner(loop_factory=uvicorn_config(app, app.settings).get_loop_factory()) as runner:
        return runner.run(both())
