"""`POST /v1/embeddings` as a plain ASGI application: from the first byte in to the last byte out.

The framework's own machinery would cost more than everything done here (bench/README.md), so this is
answered in front of it; the route is declared and documented in `app.api.routes` all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import structlog

from app.api import render
from app.api.auth import ANONYMOUS, Keys, Tenant
from app.api.schema import EmbeddingsBody, parse_body
from app.config import ServerSettings
from app.errors import (
    BodyTooLarge,
    GatewayError,
    InvalidRequest,
    MethodNotAllowed,
    Overloaded,
    SlowBody,
    UnsupportedEncoding,
    UpstreamTimeout,
)
from app.gateway import Gateway, PublicModel
from app.types import EmbedRequest, EmbedResult, Source

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Sender = Callable[[Message], Awaitable[None]]

_PLAIN = frozenset(
    path + slash for path in ("/v1/embeddings", "/embeddings", "/openai/v1/embeddings") for slash in ("", "/")
)
_NAMED = re.compile(r"/(?:v1/engines|openai/deployments)/(?P<model>.+)/embeddings/?")
LINGER = 5.0
"""Seconds for which the rest of a refused body is taken in and thrown away."""

_JSON = (b"content-type", b"application/json")
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def match(path: str) -> tuple[bool, str | None]:
    """Whether this path is the embeddings route in any of its forms, and the model it names, if it does."""
    if path in _PLAIN:
        return True, None
    named = _NAMED.fullmatch(path)
    return named is not None, named["model"] if named else None


def request_id(scope: Scope) -> bytes:
    """The caller's own `x-request-id` if it is one (printable, up to 128 bytes), else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return bytes(value)
    return b"req_" + os.urandom(12).hex().encode()


class ClientGone(Exception):
    """The caller hung up; there is nobody to answer."""


@dataclass(slots=True)
class _Exchange:
    """What is known of one exchange, for its metrics and its log line."""

    id: bytes
    started: float
    tenant: Tenant = ANONYMOUS
    public: PublicModel | None = None
    result: EmbedResult | None = None
    inputs: int = 0
    reading: bool = True
    """Whether the caller's body is still to come: then a passed deadline is the caller's."""


class Embeddings:
    """The embeddings route over a gateway."""

    def __init__(
        self, gateway: Gateway, keys: Keys, server: ServerSettings, log: structlog.typing.FilteringBoundLogger
    ) -> None:
        self._gateway, self._keys, self._server, self._log = gateway, keys, server, log
        self._metrics = gateway.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Sender, path_model: str | None) -> None:
        exchange = _Exchange(request_id(scope), asyncio.get_running_loop().time())
        status, error = 200, None
        try:
            status, headers, body = await self._answer(exchange, scope, receive, path_model)
        except ClientGone:
            self._record(exchange, 499, None)
            return
        except GatewayError as failure:
            status, error = failure.status, failure
        except Exception:
            self._log.exception("request failed", request_id=exchange.id.decode())
            error = GatewayError("internal error")
            status = error.status
        if error is not None:
            headers, body = render.error_headers(error), render.error_body(error)
            if isinstance(error, MethodNotAllowed):
                headers.append((b"allow", b"POST"))
            if exchange.reading:
                # The rest of the body will not be read, so the connection cannot carry another request.
                headers.append((b"connection", b"close"))
        self._record(exchange, status, error)
        await self._send(exchange, receive, send, status, headers, body)

    async def _answer(
        self, exchange: _Exchange, scope: Scope, receive: Receive, path_model: str | None
    ) -> tuple[int, list[render.Header], bytes]:
        if scope["method"] != "POST":
            exchange.reading = False
            raise MethodNotAllowed(f"{scope['method']} is not allowed here; use POST")
        exchange.tenant = self._keys.tenant(scope["headers"])
        deadline = exchange.started + self._server.request_timeout
        try:
            async with asyncio.timeout_at(deadline):
                with self._gateway.room:
                    raw = await self._read(scope, receive)
                    exchange.reading = False
                    body = parse_body(raw, max_inputs=self._server.max_inputs, path_model=path_model)
                    result, public = await self._embed(exchange, body, deadline, scope, receive)
                    rendered = await render.embeddings(result, body.model, body.encoding)
        except TimeoutError:
            if exchange.reading:
                raise SlowBody("the request body did not arrive in time") from None
            raise UpstreamTimeout(f"no answer within the request's {self._server.request_timeout:g} s") from None
        return 200, render.result_headers(result, public.space), rendered

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._server.max_body
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > limit:
                raise _too_large(limit)
            if name == b"content-encoding" and value.lower() != b"identity":
                raise UnsupportedEncoding("compressed request bodies are not accepted; send it as it is")
        chunks: list[bytes] = []
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            chunks.append(chunk)
            more = message.get("more_body", False)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _embed(
        self, exchange: _Exchange, body: EmbeddingsBody, deadline: float, scope: Scope, receive: Receive
    ) -> tuple[EmbedResult, PublicModel]:
        exchange.inputs = len(body.inputs)
        public = await self._gateway.find(body.model)
        exchange.public = public
        exchange.tenant.check(body.model, public.name)
        read_cache, write_cache = _cache_control(scope)
        request = EmbedRequest(
            model=public.name,
            inputs=body.inputs,
            params=body.params,
            deadline=deadline,
            caller=exchange.tenant.caller,
            read_cache=read_cache,
            write_cache=write_cache,
        )
        with _HangUp(receive):
            exchange.result = await public.embed(request)
        return exchange.result, public

    async def _send(
        self,
        exchange: _Exchange,
        receive: Receive,
        send: Sender,
        status: int,
        headers: list[render.Header],
        body: bytes,
    ) -> None:
        elapsed = asyncio.get_running_loop().time() - exchange.started
        headers += (
            _JSON,
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", exchange.id),
            (b"openai-processing-ms", b"%d" % (elapsed * 1000)),
        )
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if exchange.reading:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await _linger(receive, 2 * self._server.max_body)
            body = b""
        await send({"type": "http.response.body", "body": body})

    def _record(self, exchange: _Exchange, status: int, error: GatewayError | None) -> None:
        """Counts the exchange and writes its one log line: names and numbers, never texts or keys."""
        metrics = self._metrics
        model = exchange.public.name if exchange.public else "other"
        elapsed = asyncio.get_running_loop().time() - exchange.started
        metrics.requests.labels(model, str(status), exchange.tenant.caller.name).inc()
        metrics.request_duration.labels(model).observe(elapsed)
        result = exchange.result
        if result is not None:
            for source in Source:
                count = result.sources.count(source)
                if count:
                    metrics.inputs.labels(model, source).inc(count)
            _count_spared(self._metrics, model, result)
        if isinstance(error, InvalidRequest | Overloaded) and result is None:
            metrics.rejected_requests.labels(error.code).inc()
        if status == 499:
            metrics.rejected_requests.labels("client_gone").inc()
        self._log.info(
            "request",
            request_id=exchange.id.decode(),
            client=exchange.tenant.caller.name,
            model=model,
            status=status,
            error=error.code if error else None,
            inputs=exchange.inputs,
            cached=result.sources.count(Source.CACHE) if result else 0,
            calls=result.calls if result else 0,
            ms=round(elapsed * 1000, 1),
        )


def _count_spared(metrics: Any, model: str, result: EmbedResult) -> None:
    """Tokens nobody was billed for: found in the cache, or asked once for several inputs."""
    spared = {Source.CACHE: 0, Source.INFLIGHT: 0}
    for embedding, source in zip(result.embeddings, result.sources, strict=True):
        if source is not Source.UPSTREAM:
            spared[source] += embedding.tokens
    for source, name in ((Source.CACHE, "cached"), (Source.INFLIGHT, "deduplicated")):
        if spared[source]:
            metrics.tokens.labels(model, "", name).inc(spared[source])


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {limit} bytes")


def _cache_control(scope: Scope) -> tuple[bool, bool]:
    """(read the cache, write the cache), by the request's `Cache-Control`: several lines count as one."""
    lines = [value for name, value in scope["headers"] if name == b"cache-control"]
    if not lines:
        return True, True
    directives = {part.strip().lower() for part in b",".join(lines).split(b",")}
    return b"no-cache" not in directives, b"no-store" not in directives


async def _linger(receive: Receive, limit: int) -> None:
    """Takes in what the caller still sends, for a while: closed at once, many clients never read the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while limit > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
                limit -= len(message["body"])


class _HangUp:
    """While the block runs, cancels it when the caller hangs up, which then raises `ClientGone`.

    Watching begins on the next turn of the event loop: an answer from memory never pays for it.
    """

    __slots__ = ("_gone", "_handle", "_receive", "_task", "_watcher")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._handle = asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._handle.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._gone:
            # Whether the block had just finished or not, the cancellation was ours and ends here.
            self._task.uncancel()
            if kind is None or issubclass(kind, asyncio.CancelledError):
                raise ClientGone
