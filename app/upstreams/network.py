"""The engine that reaches the network: connections to each origin, kept alive and used again, direct or by a proxy.

An HTTP client of our own, for those there are would cost more than all the rest of the gateway: with 16 calls at once,
a call costs httpx 1,100 µs of processor time, aiohttp 82 and this one 20 (bench/README.md). Addresses are tried as in
RFC 8305 (aiohappyeyeballs), TLS is the standard library's, framing llhttp's. No cookies, no redirects, no compression,
no environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import threading
from base64 import b64encode
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import aiohappyeyeballs
import httpx

from app.errors import GatewayError, Overloaded, UpstreamMisconfigured, UpstreamUnreachable
from app.types import WireReply, WireRequest
from app.upstreams.connection import Connection, StaleConnection

KEEP_ALIVE = 30.0
"""Seconds a connection may lie idle. Servers close theirs after 5 s (uvicorn) to 75 s (nginx) and longer."""
ADDRESS_DELAY = 0.25
"""Seconds after which the next address of a name is tried as well (RFC 8305, 8)."""
SCRATCH = 16 * 2**10
"""Bytes received at once until a body has memory of its own. What comes along with a head is copied once more."""
URLS = 64
"""URLs remembered in their parsed form: parsing one costs more than sending to it."""

_REFUSED = (403, 407)
"""Statuses with which a proxy refuses for good: it does not lead there, or not with this password."""

_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN)
"""Why no socket, or no thread to look its address up, could be had here, which no upstream has part in."""

_Addresses: TypeAlias = list[tuple[Any, ...]]
"""As `socket.getaddrinfo` gives them."""


class _Origin(NamedTuple):
    """Where a connection leads."""

    tls: bool
    host: str
    """As DNS wants it."""
    port: int
    authority: str
    """As the Host header wants it."""


class NetworkEngine:
    """One upstream's connections. `connect_timeout` in seconds, until the TLS handshake is done; `proxy` a URL or
    None."""

    def __init__(self, *, connect_timeout: float, proxy: str | None = None) -> None:
        self._connect_timeout = connect_timeout
        self._proxy = _Proxy(proxy) if proxy else None
        self._scratch = memoryview(bytearray(SCRATCH))
        self._idle: dict[_Origin, list[tuple[float, Connection]]] = {}
        """The one used last is at the end."""
        self._sweeping: asyncio.TimerHandle | None = None
        self._urls: dict[str, tuple[_Origin, str]] = {}
        self._tls: ssl.SSLContext | None = None
        self._looking: dict[_Origin, asyncio.Future[_Addresses]] = {}

    async def exchange(self, request: WireRequest) -> WireReply:
        """Sends; and once more, unasked, where a kept-alive connection turns out to have been closed."""
        origin, target = self._parsed(request.url)
        message = self._message(request, origin, target)
        kept = self._kept(origin)
        if kept is not None:
            try:
                return await self._over(kept, origin, message, request.max_reply)
            except StaleConnection:
                pass
        return await self._over(await self._connect(origin), origin, message, request.max_reply)

    async def aclose(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        for origin in list(self._idle):
            self._drop_idle(origin)

    async def _over(self, connection: Connection, origin: _Origin, message: bytes, max_reply: int) -> WireReply:
        try:
            reply = await connection.exchange(message, max_reply)
        except BaseException as fault:
            connection.close()  # left unread, it can carry nothing else
            if isinstance(fault, asyncio.CancelledError):  # no answer: where the way there has died, these have, too
                self._drop_idle(origin)
            raise
        if not connection.closed:
            self._keep(origin, connection)
        return reply

    def _message(self, request: WireRequest, origin: _Origin, target: str) -> bytes:
        """The whole message. Raises `UpstreamMisconfigured` for a header that would be more than one."""
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

    def _parsed(self, url: str) -> tuple[_Origin, str]:
        known = self._urls.get(url)
        if known is None:
            parsed = httpx.URL(url)
            known = self._urls[url] = (_origin(parsed), parsed.raw_path.decode("ascii"))
            if len(self._urls) > URLS:
                self._urls.pop(next(iter(self._urls)))
        return known

    # --- connections kept ---------------------------------------------------------------------------------

    def _kept(self, origin: _Origin) -> Connection | None:
        connections = self._idle.get(origin)
        oldest = asyncio.get_running_loop().time() - KEEP_ALIVE
        while connections:
            since, connection = connections.pop()
            if connection.closed:
                continue
            if since > oldest:
                return connection
            connection.close()
        return None

    def _keep(self, origin: _Origin, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        self._idle.setdefault(origin, []).append((loop.time(), connection))
        if self._sweeping is None:
            self._sweeping = loop.call_later(KEEP_ALIVE, self._sweep)

    def _drop_idle(self, origin: _Origin) -> None:
        for _, connection in self._idle.pop(origin, ()):
            connection.close()

    def _sweep(self) -> None:
        """Closes what has been idle too long; comes back while there is anything."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - KEEP_ALIVE
        for origin, connections in list(self._idle.items()):
            for since, connection in connections:
                if since <= oldest:
                    connection.close()
            self._idle[origin] = [each for each in connections if not each[1].closed]
            if not self._idle[origin]:
                del self._idle[origin]
        self._sweeping = loop.call_later(KEEP_ALIVE / 4, self._sweep) if self._idle else None

    # --- connections made ---------------------------------------------------------------------------------

    async def _connect(self, origin: _Origin) -> Connection:
        """Raises `UpstreamUnreachable`, or `Overloaded` where the system gives this process no more sockets; an
        exception's own text may hold a URL and stays out of it."""
        try:
            async with asyncio.timeout(self._connect_timeout):
                if self._proxy is None:
                    return await self._dial(origin)
                connection = await self._dial(self._proxy.origin)
                return await self._tunnel(connection, self._proxy, origin) if origin.tls else connection
        except TimeoutError:
            raise UpstreamUnreachable("no connection to the upstream in time") from None
        except OSError as error:
            raise _translate(error) from error

    async def _dial(self, origin: _Origin) -> Connection:
        loop = asyncio.get_running_loop()
        addresses = await self._addresses(origin)
        connects = cast("asyncio.AbstractEventLoop", _Connects())
        link = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=ADDRESS_DELAY, interleave=1, loop=connects
        )
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(self._scratch),
                sock=link,
                ssl=self._context() if origin.tls else None,
                server_hostname=origin.host if origin.tls else None,
            )
        except BaseException:
            link.close()
            raise
        return connection

    async def _addresses(self, origin: _Origin) -> _Addresses:
        """The addresses of its name. There is one look-up of it at a time, which goes on though callers give up: a name
        server that does not answer is not asked once for each of them."""
        looking = self._looking.get(origin)
        if looking is None:
            looking = self._looking[origin] = _look_up(origin.host, origin.port)
            looking.add_done_callback(partial(self._looked, origin))
        return await asyncio.shield(looking)

    def _looked(self, origin: _Origin, looking: asyncio.Future[_Addresses]) -> None:
        del self._looking[origin]
        if not looking.cancelled():
            looking.exception()  # so that it counts as seen, where all callers have gone

    async def _tunnel(self, connection: Connection, proxy: _Proxy, origin: _Origin) -> Connection:
        """TLS with the origin, by a proxy that sees only where it leads (RFC 9110, 9.3.6)."""
        loop = asyncio.get_running_loop()
        try:
            where = f"[{origin.host}]:{origin.port}" if ":" in origin.host else f"{origin.host}:{origin.port}"
            headers = "".join(f"{name}: {value}\r\n" for name, value in {"host": where, **proxy.headers}.items())
            asked = f"CONNECT {where} HTTP/1.1\r\n{headers}\r\n".encode()
            reply = await connection.exchange(asked, 0, tunnel=True)
            if reply.status // 100 != 2:
                refused = UpstreamUnreachable(f"the proxy does not lead to the upstream (HTTP {reply.status})")
                refused.retryable = reply.status not in _REFUSED
                raise refused
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
        """Made when first needed: it reads the system's certificates. Raises `OSError` where it has no descriptor for
        that: OpenSSL would say nothing, and trust nobody for as long as this process lives."""
        if self._tls is None:
            _need_descriptor()
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls


def _look_up(host: str, port: int) -> asyncio.Future[_Addresses]:
    """In a thread of its own: those of the event loop are few, and all upstreams would wait for one dead name."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[_Addresses] = loop.create_future()

    def tell(addresses: _Addresses, error: Exception | None) -> None:
        if found.done():
            return
        if error is None:
            found.set_result(addresses)
        else:
            found.set_exception(error)

    def look() -> None:
        addresses: _Addresses = []
        failed: Exception | None = None
        try:
            _need_descriptor()  # the first look-up of a process would say that there is no such host
            addresses = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
        except Exception as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the event loop has ended meanwhile
            loop.call_soon_threadsafe(tell, addresses, failed)

    try:
        threading.Thread(target=look, name="look-up", daemon=True).start()
    except RuntimeError as error:  # the system gives no more of them, which Python tells in words alone
        raise OSError(errno.EAGAIN, str(error)) from error
    return found


class _Connects:
    """Connects in place of the event loop: uvloop looks up even an address that is one, in its two threads for names,
    where a name of Redis that no name server answers for would keep all upstreams waiting."""

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        loop = asyncio.get_running_loop()
        error = sock.connect_ex(address)
        if error == errno.EINPROGRESS:
            settled = asyncio.Event()
            loop.add_writer(sock, settled.set)
            try:
                await settled.wait()
            finally:
                loop.remove_writer(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))


class _Proxy:
    def __init__(self, url: str) -> None:
        self.origin = _origin(httpx.URL(url))
        self.headers: dict[str, str] = {}
        if given := basic_credentials(url):
            self.headers["proxy-authorization"] = f"Basic {given}"


def basic_credentials(url: str) -> str:
    """User and password of a URL as they are sent (RFC 7617), or nothing where it has none."""
    parsed = httpx.URL(url)
    return b64encode(f"{parsed.username}:{parsed.password}".encode()).decode() if parsed.userinfo else ""


def _origin(url: httpx.URL) -> _Origin:
    tls = url.scheme == "https"
    host = url.raw_host.decode("ascii")
    return _Origin(tls, host, url.port or (443 if tls else 80), url.netloc.decode("ascii"))


def _need_descriptor() -> None:
    """Raises `OSError` where there is none, before somebody needs one who would not say so."""
    socket.socket(socket.AF_UNIX).close()  # as the event loop has them: it takes no file that may not be there


def _translate(error: OSError) -> GatewayError:
    why = _reason(error)
    told = f": {why}" if why else ""
    if error.errno in _OURS:
        return Overloaded(f"the gateway has no room for another connection{told}", retry_after=1)
    if isinstance(error, ssl.SSLError | ssl.CertificateError):
        failed = UpstreamUnreachable(f"the upstream's TLS certificate or handshake was refused{told}")
        failed.retryable = False  # the next handshake meets the same certificate
        return failed
    return UpstreamUnreachable(f"no connection to the upstream{told}")


def _reason(error: OSError) -> str:
    """In the system's words: Python's own may hold an address."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.partition(",")[0]  # what follows is the host's name
    if isinstance(error, ssl.SSLError):
        return (error.reason or "").replace("_", " ").lower()  # "wrong version number" where no TLS is spoken
    if isinstance(error, socket.gaierror):
        return error.strerror or "its host is not found"  # it may be for the moment only
    return os.strerror(error.errno) if error.errno else ""
