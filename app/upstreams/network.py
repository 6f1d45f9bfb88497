"""The engine that reaches the network: aiohttp's connection pool and parser, and nothing else of it.

httpcore's pool scans itself on every request and at 64 calls in flight falls to 8 % of what an upstream can do;
httpx's objects around aiohttp cost as much as aiohttp (bench/README.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp

from app.errors import GatewayError, UpstreamTimeout, UpstreamUnreachable
from app.types import WireReply, WireRequest
from app.upstreams.client import too_large


class Network:
    """`connect_timeout` in seconds; `proxy` a URL or None. The environment's proxies and .netrc are not read."""

    def __init__(self, *, connect_timeout: float, proxy: str | None = None) -> None:
        self._connect_timeout = connect_timeout
        self._proxy = proxy
        self._session: aiohttp.ClientSession | None = None

    async def exchange(self, request: WireRequest, max_reply: int) -> WireReply:
        try:
            response = await self._send(request)
            try:
                body = await _read(response, max_reply)
            finally:
                # Left unread, its connection is closed, not reused.
                if response.content.at_eof():
                    response.release()
                else:
                    response.close()
        except (aiohttp.ClientError, OSError) as error:
            raise translate(error) from error
        return WireReply(response.status, _headers(response.headers), body)

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _send(self, request: WireRequest) -> aiohttp.ClientResponse:
        """Sends; and once more, unasked, where a kept-alive connection turns out to have been closed."""
        reuse = _Reuse()
        try:
            return await self._once(request, reuse)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if not reuse.reused or isinstance(error, aiohttp.ClientConnectorError):
                raise
            return await self._once(request, _Reuse())

    async def _once(self, request: WireRequest, reuse: _Reuse) -> aiohttp.ClientResponse:
        session = self._session
        if session is None:
            session = self._session = self._open()
        return await session.request(
            request.method,
            request.url,
            data=request.body or None,
            headers=request.headers,
            allow_redirects=False,
            proxy=self._proxy,
            trace_request_ctx=reuse,
        )

    def _open(self) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_mark_reused)
        return aiohttp.ClientSession(
            # How many calls run at once is decided by the upstream's slots; a second bound here could
            # only make a call wait after it was told to go.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout),
            auto_decompress=False,
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[trace],
        )


class _Reuse:
    """Whether an exchange went over a kept-alive connection."""

    __slots__ = ("reused",)

    def __init__(self) -> None:
        self.reused = False


async def _mark_reused(_session: Any, context: Any, _params: Any) -> None:
    context.trace_request_ctx.reused = True


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while chunk := await response.content.readany():
        size += len(chunk)
        if size > limit:
            raise too_large(limit)
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _headers(received: Mapping[str, str]) -> dict[str, str]:
    """With lower-case names; lines of one name are one, and what is not UTF-8 is replaced (RFC 9110 5.3, 5.5)."""
    headers: dict[str, str] = {}
    for name, value in received.items():
        name = name.lower()
        if not value.isascii():
            value = value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def translate(error: aiohttp.ClientError | OSError) -> GatewayError:
    """aiohttp's trouble in the caller's words. The exception's own text may hold a URL and stays out."""
    match error:
        case aiohttp.ConnectionTimeoutError():
            return UpstreamUnreachable("no connection to the upstream in time")
        case TimeoutError():
            return UpstreamTimeout("the upstream did not answer in time")
        case aiohttp.ClientSSLError():
            failed = UpstreamUnreachable("the upstream's TLS certificate or handshake was refused")
            failed.retryable = False  # the next handshake meets the same certificate
            return failed
        case aiohttp.ClientConnectorError():
            return UpstreamUnreachable("no connection to the upstream")
        case _:
            return UpstreamUnreachable("the connection to the upstream broke")
