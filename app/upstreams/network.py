"""The engine that reaches the network: kept-alive connections to each origin, direct or through a proxy.

We have our own HTTP client because the existing ones would cost more than the rest of the gateway: with 16 concurrent
calls, a call costs httpx 1,100 µs of CPU time, aiohttp 82 and this one 20 (bench/README.md). Addresses are tried as in
RFC 8305 (aiohappyeyeballs); TLS is the standard library's, framing llhttp's. No cookies, no redirects, no compression,
no environment variables.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from base64 import b64encode
from functools import lru_cache
from typing import Any, NamedTuple, cast

import aiohappyeyeballs
import httpx

from app.deadlines import Deadlines
from app.descriptors import require_descriptor
from app.errors import GatewayError, Overloaded, UpstreamMisconfigured, UpstreamUnreachable
from app.types import WireReply, WireRequest
from app.upstreams.connection import Connection, StaleConnection
from app.upstreams.resolver import Resolver

KEEP_ALIVE = 30.0
"""Seconds a connection may stay idle. Servers close idle ones after 5 s (uvicorn) to 75 s (nginx) or more."""
MAX_AGE = 300.0
"""Seconds after which a connection is not kept any longer, so that calls follow a name that has moved."""
STALE = 0.5
"""Seconds after sending within which a connection breaks that the peer had closed while it was idle: a round trip, and
some for a busy event loop. One that breaks later was open: the request has been read, and may be paid for."""
ADDRESS_DELAY = 0.25
"""Seconds before the next address of a name is tried as well (RFC 8305, 8)."""
SCRATCH = 16 * 2**10
"""Size in bytes of the shared receive buffer, used until a body has its own. Body bytes that arrive with a head are
copied once more."""
URL_CACHE_SIZE = 64
"""Parsed URLs cached: parsing one costs more than sending to it."""

_PROXY_REFUSALS = (403, 407)
"""Statuses of a proxy's permanent refusal: it does not serve this destination, or rejects our password."""

_LOCAL_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN, socket.EAI_MEMORY)
"""Errors of this machine and no upstream's fault: no socket or port is left, or no thread or memory for a lookup."""


class _Origin(NamedTuple):
    """Where a connection goes."""

    tls: bool
    host: str
    """As DNS takes it."""
    port: int
    authority: str
    """As the Host header takes it."""


class NetworkEngine:
    """One upstream's connections. `connect_timeout` is in seconds and includes the TLS handshake; `proxy` is a URL or
    None."""

    def __init__(self, *, connect_timeout: float, proxy: str | None = None) -> None:
        self._connect_timeout = connect_timeout
        self._deadlines = Deadlines(extend_after_pause=True)
        self._proxy = _Proxy(proxy) if proxy else None
        self._scratch = memoryview(bytearray(SCRATCH))
        self._idle: dict[_Origin, list[tuple[float, Connection]]] = {}
        """Most recently used last."""
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._parse_url = lru_cache(maxsize=URL_CACHE_SIZE)(_parse_url)
        self._tls: ssl.SSLContext | None = None
        self._resolver = Resolver()

    async def exchange(self, request: WireRequest) -> WireReply:
        """Sends the request, and resends it on a new connection if a kept-alive one turns out to have been closed."""
        origin, target = self._parse_url(request.url)
        message = self._message(request, origin, target)
        now = asyncio.get_running_loop().time
        sent = now()
        idle = self._take_idle(origin, sent - KEEP_ALIVE)
        if idle is not None:
            try:
                return await self._exchange_on(idle, origin, message, request.max_reply)
            except StaleConnection:
                self._drop_idle(origin)  # they have been idle for longer
                if now() - sent > STALE:
                    raise
        return await self._exchange_on(await self._connect(origin), origin, message, request.max_reply)

    async def aclose(self) -> None:
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        for origin in list(self._idle):
            self._drop_idle(origin)

    async def _exchange_on(self, connection: Connection, origin: _Origin, message: bytes, max_reply: int) -> WireReply:
        try:
            reply = await connection.exchange(message, max_reply)
        except BaseException as fault:
            connection.close()  # with a reply unread, it cannot be used again
            if isinstance(fault, asyncio.CancelledError):  # no answer: if the path is dead, so are the idle ones
                self._drop_idle(origin)
            raise
        if not connection.closed:
            self._put_idle(origin, connection)
        if reply.status == 407 and self._proxy and not origin.tls:
            raise _refused_by_proxy(reply.status)
        return reply

    def _message(self, request: WireRequest, origin: _Origin, target: str) -> bytes:
        """Head and body. Raises `UpstreamMisconfigured` for a header that would become several."""
        headers = {"host": origin.authority, **request.headers}
        if self._proxy and not origin.tls:
            target = f"http://{origin.authority}{target}"
            headers |= self._proxy.headers
        if request.body or request.method == "POST":
            headers["content-length"] = str(len(request.body))
        lines = "\r\n".join([f"{name}: {value}" for name, value in headers.items()])
        if lines.count("\n") != len(headers) - 1 or lines.count("\r") != len(headers) - 1:
            raise UpstreamMisconfigured("a header for the upstream holds a line break")
        return f"{request.method} {target} HTTP/1.1\r\n{lines}\r\n\r\n".encode() + request.body

    # --- idle connections ---------------------------------------------------------------------------------

    def _take_idle(self, origin: _Origin, cutoff: float) -> Connection | None:
        """One that has been idle since `cutoff` at the earliest."""
        connections = self._idle.get(origin)
        while connections:
            since, connection = connections.pop()
            if connection.closed:
                continue
            if since > cutoff:
                return connection
            connection.close()
        return None

    def _put_idle(self, origin: _Origin, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now - connection.opened > MAX_AGE:
            connection.close()
            return
        self._idle.setdefault(origin, []).append((now, connection))
        if self._sweep_timer is None:
            self._sweep_timer = loop.call_later(KEEP_ALIVE, self._sweep)

    def _drop_idle(self, origin: _Origin) -> None:
        for _, connection in self._idle.pop(origin, ()):
            connection.close()

    def _sweep(self) -> None:
        """Closes connections idle for too long; reschedules itself while any are left."""
        loop = asyncio.get_running_loop()
        cutoff = loop.time() - KEEP_ALIVE
        for origin, connections in list(self._idle.items()):
            for since, connection in connections:
                if since <= cutoff:
                    connection.close()
            self._idle[origin] = [each for each in connections if not each[1].closed]
            if not self._idle[origin]:
                del self._idle[origin]
        self._sweep_timer = loop.call_later(KEEP_ALIVE / 4, self._sweep) if self._idle else None

    # --- new connections ----------------------------------------------------------------------------------

    async def _connect(self, origin: _Origin) -> Connection:
        """Raises `UpstreamUnreachable`, or `Overloaded` when the system gives this process no more sockets. The
        exceptions' own texts may contain a URL and are left out."""
        peer = "the proxy" if self._proxy else "the upstream"
        try:
            with self._deadlines.timeout(self._connect_timeout):
                if self._proxy is None:
                    return await self._dial(origin)
                connection = await self._dial(self._proxy.origin)
                peer = "the upstream"
                return await self._tunnel(connection, self._proxy, origin) if origin.tls else connection
        except TimeoutError:
            raise UpstreamUnreachable(f"no connection to {peer} in time") from None
        except OSError as error:
            raise _translate(error, peer) from error

    async def _dial(self, origin: _Origin) -> Connection:
        loop = asyncio.get_running_loop()
        addresses = await self._resolver.addresses(origin.host, origin.port)
        connector = cast("asyncio.AbstractEventLoop", _Connector())
        sock = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=ADDRESS_DELAY, interleave=1, loop=connector
        )
        try:
            context = self._context() if origin.tls else None
        except OSError:
            sock.close()
            raise
        # Closes the socket itself if it fails, but not at once: closed here, its number would be another's too soon.
        _, connection = await loop.create_connection(
            lambda: Connection(self._scratch),
            sock=sock,
            ssl=context,
            server_hostname=origin.host if origin.tls else None,
        )
        return connection

    async def _tunnel(self, connection: Connection, proxy: _Proxy, origin: _Origin) -> Connection:
        """TLS with the origin through a proxy, which sees only the destination (RFC 9110, 9.3.6)."""
        loop = asyncio.get_running_loop()
        try:
            destination = f"[{origin.host}]:{origin.port}" if ":" in origin.host else f"{origin.host}:{origin.port}"
            headers = "".join(f"{name}: {value}\r\n" for name, value in {"host": destination, **proxy.headers}.items())
            connect = f"CONNECT {destination} HTTP/1.1\r\n{headers}\r\n".encode()
            reply = await connection.exchange(connect, 0, tunnel=True)
            if reply.status // 100 != 2:
                raise _refused_by_proxy(reply.status)
            transport = await loop.start_tls(
                connection.transport, connection, self._context(), server_hostname=origin.host
            )
            assert transport is not None
            connection.transport = transport
        except BaseException:
            connection.close()
            raise
        return connection

    def _context(self) -> ssl.SSLContext:
        """Created on first use, because it reads the system's certificates. Raises `OSError` if there is no descriptor
        to read them with: OpenSSL would report nothing, and trust nobody for the life of this process."""
        if self._tls is None:
            require_descriptor()
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls


class _Connector:
    """Connects in place of the event loop. uvloop resolves even literal addresses, in its two resolver threads, where
    a Redis host that no name server answers for would keep every upstream waiting."""

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        loop = asyncio.get_running_loop()
        error = sock.connect_ex(address)
        if error == errno.EINPROGRESS:
            writable = asyncio.Event()
            loop.add_writer(sock, writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error == errno.EADDRNOTAVAIL and sock.family == socket.AF_INET:
            error = errno.EAGAIN  # this host has no port left; with IPv6 it may have no address either
        if error:
            raise OSError(error, os.strerror(error))


class _Proxy:
    def __init__(self, url: str) -> None:
        self.origin = _origin(httpx.URL(url))
        self.headers: dict[str, str] = {}
        if credentials := basic_credentials(url):
            self.headers["proxy-authorization"] = f"Basic {credentials}"


def basic_credentials(url: str) -> str:
    """A URL's user and password as Basic authentication sends them (RFC 7617); empty if it has none."""
    parsed = httpx.URL(url)
    return b64encode(f"{parsed.username}:{parsed.password}".encode()).decode() if parsed.userinfo else ""


def _parse_url(url: str) -> tuple[_Origin, str]:
    """Where the connection goes, and the target of the request."""
    parsed = httpx.URL(url)
    return _origin(parsed), parsed.raw_path.decode("ascii")


def _origin(url: httpx.URL) -> _Origin:
    tls = url.scheme == "https"
    host = url.raw_host.decode("ascii")
    return _Origin(tls, host, url.port or (443 if tls else 80), url.netloc.decode("ascii"))


def _refused_by_proxy(status: int) -> UpstreamUnreachable:
    error = UpstreamUnreachable(f"the proxy does not lead to the upstream (HTTP {status})")
    error.retryable = status not in _PROXY_REFUSALS
    return error


def _translate(error: OSError, peer: str) -> GatewayError:
    reason = _reason(error)
    detail = f": {reason}" if reason else ""
    if error.errno in _LOCAL_ERRORS:
        return Overloaded(f"the gateway has no room for another connection{detail}", retry_after=1)
    if isinstance(error, ssl.SSLError | ssl.CertificateError):
        failed = UpstreamUnreachable(f"{peer}'s TLS certificate or handshake was refused{detail}")
        failed.retryable = False  # the next handshake would meet the same certificate
        return failed
    return UpstreamUnreachable(f"no connection to {peer}{detail}")


def _reason(error: OSError) -> str:
    """The system's message: Python's own may contain an address."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.partition(",")[0]  # the rest is the host's name
    if isinstance(error, ssl.SSLError):
        return (error.reason or "").replace("_", " ").lower()  # "wrong version number" if the peer speaks no TLS
    if isinstance(error, socket.gaierror):
        return error.strerror or "its host is not found"  # possibly a temporary failure
    return os.strerror(error.errno) if error.errno else ""
