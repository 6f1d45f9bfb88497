"""The only door to the network: one HTTP exchange, bounded in time and bytes, redirects never followed.

An engine performs it: `app.upstreams.network` by default, or any httpx transport that is passed in.
Knows no dialect, no retry and no credentials.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import httpx

from app import __version__
from app.deadlines import Deadlines
from app.errors import GatewayError, UpstreamInvalidResponse, UpstreamTimeout, UpstreamUnreachable
from app.types import WireReply, WireRequest
from app.upstreams.codings import compressions, decompress
from app.upstreams.connection import too_large

_HEADERS = {"user-agent": f"embedding-gateway/{__version__}", "accept-encoding": "identity"}


class Engine(Protocol):
    """Sends a request whose `url` already contains the query; reads the whole reply.

    Raises `UpstreamUnreachable`, `UpstreamTimeout`, and `UpstreamInvalidResponse` for a reply over `max_reply` bytes.
    """

    async def exchange(self, request: WireRequest) -> WireReply: ...

    async def aclose(self) -> None: ...


class Client:
    """Performs `WireRequest`s without changing them. One per upstream; its engine has its own connection pool.

    `headers` are added to every request and override the request's own.
    """

    def __init__(
        self,
        engine: Engine | httpx.AsyncBaseTransport,
        *,
        timeout: float,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._engine = HttpxEngine(engine) if isinstance(engine, httpx.AsyncBaseTransport) else engine
        self._timeout = timeout
        self._headers = {name.lower(): value for name, value in headers.items()}
        self._deadlines = Deadlines(extend_after_pause=True)

    async def send(self, request: WireRequest) -> WireReply:
        """One exchange, within `timeout` seconds in total, however slowly the bytes arrive.

        Raises `UpstreamTimeout`, `UpstreamUnreachable` (no connection, or one that broke), and
        `UpstreamInvalidResponse` (a reply over the request's `max_reply` bytes, or compressed with anything but gzip
        and deflate).
        """
        url = str(httpx.URL(request.url).copy_merge_params(request.query)) if request.query else request.url
        headers = {**_HEADERS, **request.headers, **self._headers}
        complete = WireRequest(request.method, url, headers, request.body, max_reply=request.max_reply)
        try:
            with self._deadlines.timeout(self._timeout):
                reply = await self._engine.exchange(complete)
        except TimeoutError:
            raise UpstreamTimeout(f"the upstream did not answer within {self._timeout:g} s") from None
        encoding = reply.headers.get("content-encoding")
        if encoding and reply.body and (applied := compressions(encoding)):
            return await _decompressed(reply, applied, request.max_reply)
        return reply

    async def aclose(self) -> None:
        await self._engine.aclose()


async def _decompressed(reply: WireReply, applied: list[str], limit: int) -> WireReply:
    """The reply of an upstream that compresses although we ask for `identity`: it is billed like any other. An error
    that cannot be read still says enough by its status and headers."""
    try:
        body = await asyncio.to_thread(decompress, reply.body, applied, limit + 1)
    except ValueError:
        if reply.status < 300:
            raise UpstreamInvalidResponse("the upstream compressed its reply although asked not to") from None
        body = bytearray()
    if len(body) > limit:
        raise too_large(limit)
    return WireReply(reply.status, reply.headers, body)


class HttpxEngine:
    """An engine over an httpx transport: a test's, or one inside this process."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport

    async def exchange(self, request: WireRequest) -> WireReply:
        outgoing = httpx.Request(request.method, request.url, headers=request.headers, content=request.body)
        try:
            response = await self._transport.handle_async_request(outgoing)
            # Not `aiter_raw`, which yields nothing for a response built with its whole body, as mocks' are.
            assert isinstance(response.stream, httpx.AsyncByteStream)
            try:
                chunks: list[bytes] = []
                size = 0
                async for chunk in response.stream:
                    size += len(chunk)
                    if size > request.max_reply:
                        raise too_large(request.max_reply)
                    chunks.append(chunk)
            finally:
                await response.aclose()
        except httpx.TransportError as error:
            raise _translate(error) from error
        return WireReply(response.status_code, dict(response.headers.items()), b"".join(chunks))

    async def aclose(self) -> None:
        await self._transport.aclose()


def _translate(error: httpx.TransportError) -> GatewayError:
    """A transport's error as one of ours. The exception's own text may contain a URL and is left out."""
    if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
        return UpstreamUnreachable("no connection to the upstream in time")
    if isinstance(error, httpx.TimeoutException):
        return UpstreamTimeout("the upstream did not answer in time")
    if isinstance(error, httpx.ConnectError):
        return UpstreamUnreachable("no connection to the upstream")
    return UpstreamUnreachable("the connection to the upstream broke")
