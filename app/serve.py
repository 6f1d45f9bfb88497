"""Runs the application: listeners, signals, worker processes. The only module that runs the ASGI server."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvicorn

from app.clock import SystemClock
from app.config import Settings
from app.config.source import ConfigSource
from app.config.watch import ConfigWatcher
from app.http.outbox import Outbox
from app.http.protocol import Protocol
from app.main import GRACE, App
from app.metrics import ConfigMetrics
from app.workers import ParentChannel, Workers

log = logging.getLogger(__name__)

T = TypeVar("T")

KEEP_ALIVE = 75
"""Seconds that a connection may be idle: longer than any load balancer in use keeps one."""
BACKLOG = 2048
"""Maximum number of connections waiting to be accepted."""
CLOSE_DELAY = 0.25
"""Seconds after the listener has closed for requests that were already on their way over idle connections."""

OTHER_DESCRIPTORS = 64
"""Descriptors for all that is no caller's or upstream's connection: Redis, the disk cache, files, the event loop."""

PROCESS_MEMORY = 60 * 2**20
"""Bytes that a process takes before its first request, in workers and in their parent (measured)."""
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container sees the limit on its memory in bytes: cgroup v2, or v1."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""


class CannotListen(Exception):
    """The address is not available. The message is for whoever started the program."""

    def __init__(self, host: str, port: int, reason: str | None) -> None:
        super().__init__(f"cannot listen on {host}:{port}: {reason}")


def bind(host: str, port: int) -> socket.socket:
    """Binds a socket, so that a port in use is noticed before anything is built. Raises `CannotListen`.

    It does not listen yet, so that no client waits at a port that nothing serves; the first to listen gets the port.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = addresses[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise CannotListen(host, port, error.strerror) from None
    except UnicodeError:
        raise CannotListen(host, port, "not a host name") from None
    return listener


def _start_listening(listener: socket.socket) -> None:
    """Listens, or goes on listening. Raises `CannotListen`."""
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise CannotListen(host, port, error.strerror) from None


def uvicorn_config(
    app: Any,
    settings: Settings,
    on_invalid_http: Callable[[tuple[str, int] | None, bytes, str], None] = lambda *_: None,
    timeout: Callable[[], float] | None = None,
    **options: Any,
) -> uvicorn.Config:
    """uvicorn's configuration for an application of ours. `on_invalid_http` is called for data that is not a valid HTTP
    request; `timeout` returns the current request timeout, where that may change."""
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
        **options,
    )


def _grace(settings: Settings) -> int:
    return int(settings.server.request_timeout + GRACE)


class Server(uvicorn.Server):
    """The ASGI server, with a graceful stop for load balancers, which learn of it later than the process does.

    The first SIGTERM makes the application not ready at once; `drain` seconds later the listener closes and requests
    finish. A second SIGTERM skips that delay, and so does Ctrl-C; Ctrl-C after that drops the remaining requests.
    SIGHUP reloads the configuration. A worker is told all this by its parent: see `app.workers`.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: App,
        parent: ParentChannel | None = None,
        on_listening: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._app, self._parent, self._on_listening = app, parent, on_listening
        self.interrupted = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        if self._parent:
            self._parent.follow(stop=self._begin_stop, reload=self._app.reload)
        else:
            loop.add_signal_handler(signal.SIGHUP, self._app.reload)
        yield
        _ignore_signals()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # The event loop silently closes a socket that it cannot listen on. Listening again raises the hidden error.
        duplicates = [listener.dup() for listener in sockets or ()]
        await super().startup(sockets)
        try:
            for listener in duplicates:
                _start_listening(listener)
        except CannotListen:
            await self.shutdown()
            raise
        finally:
            for listener in duplicates:
                listener.close()
        self._on_listening()
        if self._parent:
            self._parent.start_heartbeat()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As in uvicorn, but answers every caller that connected before the listener closed: a connection closed with
        unread bytes, whether in the backlog or here, is reset."""
        for server, listener in zip(self.servers, sockets or (), strict=False):
            await self._accept_backlog(server, listener)
        if not self.force_exit:
            await asyncio.sleep(CLOSE_DELAY)
        await super().shutdown(sockets)

    async def _accept_backlog(self, server: asyncio.Server, listener: socket.socket) -> None:
        """Closes the listener, and accepts the connections waiting in its backlog."""
        protocol: Any = self.config.http_protocol_class

        def connected() -> asyncio.BaseProtocol:
            instance: asyncio.BaseProtocol = protocol(
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return instance

        # An error means that the backlog is empty, or that there are no descriptors left.
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
        log.info("stopping: no longer ready, listening for another %g s", seconds)
        asyncio.get_running_loop().call_later(seconds, self._stop)

    def _stop(self) -> None:
        self._app.drain()
        self.config.timeout_graceful_shutdown = _grace(self._app.settings)
        self.should_exit = True

    def _interrupt(self) -> None:
        self.interrupted = True
        self.force_exit = self.should_exit
        self._stop()


def _ignore_signals() -> None:
    """What remains to be done takes no time and must not be interrupted: the exit code is to report success."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


class _SideServer(uvicorn.Server):
    """A server that handles no signals: the process does that elsewhere."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _admin(app: App, listener: socket.socket | None) -> AsyncIterator[None]:
    """Serves /metrics and /docs on a listener of their own, if there is one, while the block runs. Raises
    `CannotListen`."""
    if listener is None:
        yield
        return
    _start_listening(listener)
    server = _SideServer(
        uvicorn_config(app.admin, app.settings, app.on_invalid_http, app.request_timeout, lifespan="off")
    )
    server.config.timeout_graceful_shutdown = 1  # a scrape is not worth waiting for
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of large replies and bodies, instead of returning it to the kernel and faulting in
    every page of the next one: a request of 128 texts then takes 13 page faults, not 139 (bench/README.md). Does
    nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def raise_descriptor_limit() -> None:
    """Raises the limit on file descriptors as far as allowed. The usual 1024 is for programs that must be able to use
    `select`; beyond it connections are closed unanswered, and upstreams cannot be called."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems allow fewer than they report
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _warn_of_few_descriptors(settings: Settings) -> None:
    """Warns if a process may run out of descriptors before anything else bounds its connections."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    calls = sum(upstream.max_concurrency for upstream in settings.upstreams.values())
    needed = settings.server.max_inflight + calls + OTHER_DESCRIPTORS
    if 0 < limit < needed:  # -1: no limit
        log.warning("%d file descriptors (ulimit -n) are few: max_inflight and upstreams may take %d", limit, needed)


def _warn_of_little_memory(settings: Settings) -> None:
    """Warns if full memory caches alone may take more than the container may use: the system would end a process
    without a word."""
    workers, cache = settings.server.workers, settings.cache.memory
    processes = workers + (workers > 1)
    # A tenth more than its size, for the table and what the allocator cannot use (measured).
    needed = processes * PROCESS_MEMORY + (workers * cache.max_size * 11 // 10 if cache else 0)
    for file in MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not in a container; "max": no limit
            if (limit := int(file.read_text())) < needed:
                log.warning(
                    "%d MiB of memory are little: processes and cache.memory may take %d MiB, and requests come on top",
                    limit // 2**20,
                    needed // 2**20,
                )


def serve(
    app: App,
    listener: socket.socket,
    on_listening: Callable[[], None] = lambda: None,
    *,
    admin: socket.socket | None = None,
    parent: ParentChannel | None = None,
) -> None:
    """Serves in this process until a signal, or its parent, stops it. `on_listening` is called once clients can
    connect. `admin` is the listener for /metrics and /docs, if they have one of their own.

    Raises `CannotListen`, and `KeyboardInterrupt` if Ctrl-C stopped it.
    """
    keep_freed_memory()
    raise_descriptor_limit()
    if parent is None:  # it has warned
        _warn_of_few_descriptors(app.settings)
        _warn_of_little_memory(app.settings)
    config = uvicorn_config(app, app.settings, app.on_invalid_http, app.request_timeout)
    server = Server(config, app, parent, on_listening)

    async def run() -> None:
        async with _admin(app, admin):
            await server.serve(sockets=[listener])

    _run(run(), config)
    if server.interrupted:
        raise KeyboardInterrupt


def serve_workers(
    app: App,
    command: Callable[[int], list[str]],
    listener: socket.socket,
    on_listening: Callable[[], None],
    *,
    source: ConfigSource,
    admin: socket.socket | None,
) -> int:
    """Serves in several processes that inherit one listener. `command` returns the command line of one, given the
    descriptor of its channel to this process. `on_listening` is called once clients can connect.

    `app` itself is not served here, only its /metrics, which cover all workers where metrics are `multiprocess`.
    The configuration is reloaded here, once for all workers. Returns the exit code. Raises `CannotListen`.
    """
    raise_descriptor_limit()
    _warn_of_few_descriptors(app.settings)
    _warn_of_little_memory(app.settings)
    workers = Workers(command, app.settings, listener, on_listening)

    async def run() -> int:
        config = ConfigMetrics()

        def result(valid: bool) -> None:
            if valid:  # each worker counts its own reload
                config.config_valid.set(1)
            else:
                config.reloaded(False)

        async def apply(settings: Settings) -> None:
            await app.dry_run(settings)  # no worker could start with settings that cannot be built
            await workers.change(settings)

        watch = ConfigWatcher(source, SystemClock(), apply, result)
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
            _ignore_signals()

    return _run(run(), uvicorn.Config(app, log_config=None))


def _run(main: Coroutine[Any, Any, T], config: uvicorn.Config) -> T:
    """Runs it to its end, in an event loop of uvicorn's choice."""
    runner = asyncio.Runner(loop_factory=config.get_loop_factory())
    try:
        return runner.run(main)
    finally:
        # Waiting for the other threads takes one more. The program ends here: it is no failure if there is none.
        with contextlib.suppress(RuntimeError):
            runner.close()
