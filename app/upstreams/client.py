"""The only door to the network: one HTTP exchange, bounded in time and bytes, redirects never followed.

httpx gives the words (Request, Response, the transport seam) and aiohttp the engine: httpcore's pool
scans itself on every request and at 64 calls in flight falls to 8 % of what an upstream can do
(bench/README.md). Knows no dialect, no retry and no credentials.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import httpx

from app import __version__
from app.errors import GatewayError, UpstreamInvalidResponse, UpstreamTimeout, UpstreamUnreachable
from app.types import WireReply, WireRequest

MAX_REPLY = 256 * 2**20
"""Bytes. 2,048 vectors of 3,072 numbers are 160 MB as text."""


_HEADERS = {"user-agent": f"embedding-gateway/{__version__}", "accept-encoding": "identity"}


class Client:
    """Performs `WireRequest`s over an httpx transport. One per upstream; has its own connection pool."""

    def __init__(self, transport: httpx.AsyncBaseTransport, *, timeout: float, max_reply: int = MAX_REPLY) -> None:
        self._transport = transport
        self._timeout = timeout
        self._max_reply = max_reply
        # A handful of URLs are asked over and over; parsing one costs as much as sending to it.
        self._urls: dict[str, httpx.URL] = {}

    async def send(self, request: WireRequest) -> WireReply:
        """One exchange within `timeout` seconds in total, however slowly the bytes come.

        Raises `UpstreamTimeout`, `UpstreamUnreachable` (no connection, or one that broke), and
        `UpstreamInvalidResponse` (a reply over `max_reply`, or compressed although we refuse that).
        """
        message = httpx.Request(
            request.method, self._url(request), headers={**_HEADERS, **request.headers}, content=request.body
        )
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._transport.handle_async_request(message)
                try:
                    return await self._read(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise UpstreamTimeout(f"the upstream did not answer within {self._timeout:g} s") from None
        except httpx.TransportError as error:
            raise _translate(error) from error

    async def aclose(self) -> None:
        await self._transport.aclose()

    def _url(self, request: WireRequest) -> httpx.URL:
        url = self._urls.get(request.url)
        if url is None:
            url = self._urls[request.url] = httpx.URL(request.url)
            if len(self._urls) > 64:
                self._urls.pop(next(iter(self._urls)))
        return url.copy_merge_params(request.query) if request.query else url

    async def _read(self, response: httpx.Response) -> WireReply:
        headers = {name.lower(): value for name, value in response.headers.items()}
        if headers.get("content-encoding", "identity") != "identity":
            raise UpstreamInvalidResponse("the upstream compressed its reply although asked not to")
        chunks: list[bytes] = []
        size = 0
        async for chunk in response.aiter_raw():
            size += len(chunk)
            if size > self._max_reply:
                raise UpstreamInvalidResponse(f"the upstream's reply is larger than {self._max_reply} bytes")
            chunks.append(chunk)
        return WireReply(response.status_code, headers, chunks[0] if len(chunks) == 1 else b"".join(chunks))


def _translate(error: httpx.TransportError) -> GatewayError:
    """Transport trouble in the caller's words. The exception's own text may hold a URL and stays out."""
    if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
        return UpstreamUnreachable("no connection to the upstream in time")
    if isinstance(error, httpx.TimeoutException):
        return UpstreamTimeout("the upstream did not answer in time")
    if isinstance(error, httpx.ConnectError):
        if isinstance(error.__cause__, aiohttp.ClientSSLError | ssl.SSLError):
            failed = UpstreamUnreachable("the upstream's TLS certificate or handshake was refused")
            failed.retryable = False  # the next handshake meets the same certificate
            return failed
        return UpstreamUnreachable("no connection to the upstream")
    return UpstreamUnreachable("the connection to the upstream broke")


class AiohttpTransport(httpx.AsyncBaseTransport):
    """An httpx transport over aiohttp's pool and parser.

    `connect_timeout` in seconds; `proxy` a URL or None. The environment's proxies and .netrc are not read.
    """

    def __init__(self, *, connect_timeout: float, proxy: str | None = None) -> None:
        self._connect_timeout = connect_timeout
        self._proxy = proxy
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            response = await self._exchange(request)
        except Exception as error:
            raise _as_httpx(error, request) from error
        return httpx.Response(
            response.status, headers=response.raw_headers, stream=_Body(response, request), request=request
        )

    async def _exchange(self, request: httpx.Request) -> aiohttp.ClientResponse:
        """Sends; and once more, unasked, where a kept-alive connection turns out to have been closed."""
        reuse = _Reuse()
        try:
            return await self._send(request, reuse)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if not reuse.reused or isinstance(error, aiohttp.ClientConnectorError):
                raise
            return await self._send(request, _Reuse())

    async def _send(self, request: httpx.Request, reuse: _Reuse) -> aiohttp.ClientResponse:
        session = self._session
        if session is None:
            session = self._session = self._open()
        return await session.request(
            request.method,
            str(request.url),
            data=request.content,
            headers=request.headers.multi_items(),
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
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[trace],
        )

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


class _Reuse:
    """Whether an exchange went over a kept-alive connection."""

    __slots__ = ("reused",)

    def __init__(self) -> None:
        self.reused = False


async def _mark_reused(_session: Any, context: Any, _params: Any) -> None:
    context.trace_request_ctx.reused = True


class _Body(httpx.AsyncByteStream):
    """aiohttp's reply as an httpx byte stream; left unread, its connection is closed, not reused."""

    def __init__(self, response: aiohttp.ClientResponse, request: httpx.Request) -> None:
        self._response = response
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except Exception as error:
            raise _as_httpx(error, self._request) from error

    async def aclose(self) -> None:
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


def _as_httpx(error: Exception, request: httpx.Request) -> Exception:
    """aiohttp's errors in httpx's tree; a test holds that every `aiohttp.ClientError` has a place.

    Anything else is a bug and keeps its name.
    """
    match error:
        case aiohttp.ConnectionTimeoutError():
            return httpx.ConnectTimeout("connect", request=request)
        case TimeoutError():
            return httpx.ReadTimeout("read", request=request)
        case aiohttp.ClientConnectorError() | aiohttp.ClientProxyConnectionError() | aiohttp.ClientSSLError():
            return httpx.ConnectError("connect", request=request)
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError():
            return httpx.RemoteProtocolError("read", request=request)
        case aiohttp.ClientResponseError():
            return httpx.RemoteProtocolError("response", request=request)
        case aiohttp.InvalidURL():
            return httpx.UnsupportedProtocol("url", request=request)
        case aiohttp.ClientError() | OSError():
            return httpx.ReadError("read", request=request)
        case _:
            return error
