"""`POST /v1/embeddings` as a plain ASGI application: from the first byte in to the last byte out.

The framework's own machinery would cost more than everything done here (bench/README.md), so this is
answered in front of it; the route is declared and documented in `app.api.routes` all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from msgspec import Struct

from app import tokens
from app.api import head, render
from app.api.auth import ANONYMOUS, Keys, Tenant
from app.api.guard import ClientGone, Guard
from app.api.schema import EmbeddingsBody, check_object_count, parse_body
from app.api.usage import Usage
from app.deadlines import Deadlines
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
from app.gateway import Gateway
from app.logs import RequestLine, RequestLog
from app.pipeline.admit import INPUT_OVERHEAD, Admission
from app.pipeline.quota import Quota
from app.registry import PublicModel
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

INLINE_PARSE_LIMIT = 256 * 2**10
"""Bytes of a body that are parsed between two turns of the event loop: 10 ms if they are token ids. A larger one is
parsed in a thread, in which only the JSON itself holds up others."""
SERIAL_PARSE_LIMIT = 2 * 2**20
"""Bytes of a body from which it is the only one that is parsed: token ids take up to 15 times their text meanwhile, and
the place among those inside counts the text."""

_OK = b"HTTP/1.1 200 OK\r\n"
_ALWAYS = b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\nopenai-processing-ms: %d\r\n"
"""The headers that every answer ends with."""

log = logging.getLogger(__name__)


def match(path: str) -> tuple[bool, str | None]:
    """Whether this path is the embeddings route in any of its forms, and the model it names, if it does."""
    if path in _PLAIN:
        return True, None
    named = _NAMED.fullmatch(path)
    return named is not None, named["model"] if named else None


class _Exchange(Struct):
    """What is known of one exchange, for its metrics and its log line."""

    headers: Mapping[bytes, bytes]
    """The caller's; where a name is there several times, the last."""
    id: bytes
    started: float
    """On the event loop's clock, as deadlines are; it may tell milliseconds only."""
    began: float
    """On `time.perf_counter`, for durations."""
    place: Admission
    """In the gateway, until the answer is taken."""
    tenant: Tenant = ANONYMOUS
    quota: Quota | None = None
    counted: bool = True
    """Whether the quota needs to hear no more of this request."""
    public: PublicModel | None = None
    result: EmbedResult | None = None
    usage: Usage | None = None
    """Of the result."""
    inputs: int = 0
    reading: bool = True
    """Whether the caller's body is still to come: then it is the caller who misses the deadline."""


class Embeddings:
    """The embeddings route over a gateway."""

    def __init__(self, gateway: Gateway, keys: Keys, request_log: RequestLog) -> None:
        self._gateway, self._keys, self._request_log = gateway, keys, request_log
        self._server = gateway.settings.server
        self._metrics = metrics = gateway.metrics
        self._deadlines = Deadlines()
        self._alone = ThreadPoolExecutor(1, thread_name_prefix="parse")
        """For heavy bodies: one is parsed to its end, though its caller may have gone, before the next one is."""
        self._requests, self._inputs = (
            metrics.buffered_counters(metrics.requests),
            metrics.buffered_counters(metrics.inputs),
        )
        self._tokens = metrics.buffered_counters(metrics.tokens)
        self._durations = metrics.buffered_histograms(metrics.request_duration)

    async def __call__(self, scope: Scope, receive: Receive, send: Sender, path_model: str | None) -> None:
        sent = dict(scope["headers"])
        now, began = asyncio.get_running_loop().time(), time.perf_counter()
        first_byte = scope.get("extensions", {}).get("first_byte")
        if first_byte is not None:  # its head took time as well
            now, began = first_byte, began - (now - first_byte)
        with Admission(self._gateway.capacity) as place:
            exchange = _Exchange(sent, head.request_id(sent), now, began, place)
            error: GatewayError | None = None
            try:
                lines, body = await self._answer(exchange, scope, receive, path_model)
            except ClientGone:
                self._record(exchange, 499, None)
                return
            except GatewayError as failure:
                error = failure.without_traceback()
            except asyncio.CancelledError:  # the server waits no longer, not for the rest of a body either
                exchange.reading = False
                error = Overloaded("the gateway is stopping")
            except Exception:
                log.exception("request %s failed", exchange.id.decode())
                error = GatewayError("internal error")
            status = 200
            if error is not None:
                status = error.status
                lines, body = self._refusal(exchange, error)
            if exchange.quota is not None:
                if not exchange.counted:
                    exchange.quota.adjust(1, 0)  # refused for what it says: that counts as well
                lines += render.lines(render.rate_limit_headers(exchange.quota.limit_statuses()))
            self._record(exchange, status, error)
            exchange.result = None  # until it is taken an answer is in memory once, as bytes
            await self._send(exchange, scope, receive, send, status, lines, body)

    async def _answer(
        self, exchange: _Exchange, scope: Scope, receive: Receive, path_model: str | None
    ) -> tuple[bytes, list[bytes]]:
        """The answer's headers, a line each, and its body in pieces."""
        if scope["method"] != "POST":
            exchange.reading = False
            raise MethodNotAllowed(f"{scope['method']} is not allowed here; use POST")
        exchange.tenant = self._keys.tenant(exchange.headers)
        exchange.quota = self._gateway.quotas.get(exchange.tenant.caller.name)
        if exchange.quota is not None:
            # Before it takes room: a caller that floods takes none from others.
            exchange.quota.check(head.content_length(exchange.headers))
            exchange.counted = False
        deadline, place = exchange.started + self._server.request_timeout, exchange.place
        try:
            guard = Guard(deadline, self._deadlines)
            with guard:
                place.enter()
                self._check_head(exchange.headers, scope)
                raw = self._at_hand(scope, place) or await self._read(receive, place)
                exchange.reading = False
                guard.watch(scope)
                if len(raw) <= INLINE_PARSE_LIMIT:
                    body = self._parse(raw, path_model)
                else:
                    threads = self._alone if len(raw) > SERIAL_PARSE_LIMIT else None  # None: the common ones
                    loop = asyncio.get_running_loop()
                    body = await loop.run_in_executor(threads, self._parse_large, raw, path_model)
                place.hold(max(len(raw), body.decoded) + INPUT_OVERHEAD * len(body.inputs))
                result, public = await self._embed(exchange, body, deadline, scope)
                exchange.usage = usage = Usage.of(result)
                rendered = await render.embeddings(result, usage, body.model, body.encoding)
        except TimeoutError:
            if exchange.reading:
                raise SlowBody("the request body did not arrive in time") from None
            if not exchange.inputs:  # no upstream's fault: it came late, or waited for other large ones
                raise Overloaded("the request body could not be read in time") from None
            raise UpstreamTimeout(f"no answer within the request's {self._server.request_timeout:g} s") from None
        return render.result_headers(result, usage, public.space), rendered

    def _refusal(self, exchange: _Exchange, error: GatewayError) -> tuple[bytes, list[bytes]]:
        """Headers and body for a request that ends in this error. Gives up its place: there is little to send, but it
        may be long until the rest of the caller's body has come."""
        exchange.place.leave()
        if error.model is not None:
            exchange.public = self._gateway.names.get(error.model)
        headers = render.error_headers(error)
        if isinstance(error, MethodNotAllowed):
            headers.append((b"allow", b"POST"))
        if exchange.reading:
            # The rest of the body will not be read, so the connection cannot carry another request.
            headers.append((b"connection", b"close"))
        return render.lines(headers), [render.error_body(error)]

    def _check_head(self, headers: Mapping[bytes, bytes], scope: Scope) -> None:
        self._check_size(head.content_length(headers))
        if head.is_compressed(headers, scope["headers"]):
            raise UnsupportedEncoding("compressed request bodies are not accepted; send it as it is")

    def _check_size(self, size: int) -> None:
        if size > self._server.max_body:
            raise BodyTooLarge(f"the request body is larger than {self._server.max_body} bytes")

    def _take_in(self, size: int, place: Admission) -> None:
        """Counts what has come of the body, `size` bytes so far. What is only announced takes no room."""
        self._check_size(size)
        place.hold(size)

    def _at_hand(self, scope: Scope, place: Admission) -> bytes | None:
        """The whole body, if the server has all of it already (`app.protocol`)."""
        body = scope.get("extensions", {}).get("body")
        raw: bytes | None = body() if body else None
        if raw:
            self._take_in(len(raw), place)
        return raw

    async def _read(self, receive: Receive, place: Admission) -> bytes:
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            self._take_in(size, place)
            chunks.append(chunk)
            more = message.get("more_body", False)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _parse(self, raw: bytes, path_model: str | None) -> EmbeddingsBody:
        server = self._server
        return parse_body(raw, max_inputs=server.max_inputs, max_decoded=server.max_body, path_model=path_model)

    def _parse_large(self, raw: bytes, path_model: str | None) -> EmbeddingsBody:
        check_object_count(raw, max_inputs=self._server.max_inputs)
        return self._parse(raw, path_model)

    async def _embed(
        self, exchange: _Exchange, body: EmbeddingsBody, deadline: float, scope: Scope
    ) -> tuple[EmbedResult, PublicModel]:
        exchange.inputs = len(body.inputs)
        public = await self._gateway.find(body.model)
        exchange.public = public
        exchange.tenant.check(body.model, public.name)
        told = b"cache-control" in exchange.headers
        read_cache, write_cache = head.cache_control(scope["headers"]) if told else (True, True)
        request = EmbedRequest(
            model=public.name,
            inputs=body.inputs,
            params=body.params,
            deadline=deadline,
            caller=exchange.tenant.caller,
            media=body.media,
            numbers=body.encoding == "float",
            read_cache=read_cache,
            write_cache=write_cache,
            on_long_input=body.on_long_input,
        )
        if exchange.quota is None:
            exchange.result = await public.embed(request)
        else:
            exchange.result = await _within(exchange.quota, exchange, public, request)
        return exchange.result, public

    async def _send(
        self,
        exchange: _Exchange,
        scope: Scope,
        receive: Receive,
        send: Sender,
        status: int,
        lines: bytes,
        body: list[bytes],
    ) -> None:
        elapsed = time.perf_counter() - exchange.began
        size = sum(map(len, body))
        lines += _ALWAYS % (size, exchange.id, elapsed * 1000)
        respond = scope.get("extensions", {}).get("respond") if status == 200 else None
        if respond is not None:
            exchange.place.hold_answer(size)
            try:
                await respond(_OK + lines, body, size, exchange.started + self._server.request_timeout)
            except TimeoutError:  # the connection is gone: there is nobody left to tell
                self._metrics.rejected_requests.labels("answer_not_taken").inc()
            return
        whole = b"".join(body)
        await send({"type": "http.response.start", "status": status, "headers": render.headers(lines)})
        if exchange.reading:
            await send({"type": "http.response.body", "body": whole, "more_body": True})
            await _linger(receive, 2 * self._server.max_body)
            whole = b""
        await send({"type": "http.response.body", "body": whole})

    def _record(self, exchange: _Exchange, status: int, error: GatewayError | None) -> None:
        """Counts the exchange and writes its one log line: names and numbers, never texts or keys."""
        metrics = self._metrics
        model = exchange.public.name if exchange.public else "other"
        elapsed = time.perf_counter() - exchange.began
        self._requests(model, status, exchange.tenant.caller.name).inc()
        self._durations(model).observe(elapsed)
        result = exchange.result
        if exchange.usage is not None:
            self._count(model, exchange.usage)
        if error is not None and result is None and isinstance(error, InvalidRequest | Overloaded):
            metrics.rejected_requests.labels(error.code).inc()
        if status == 499:
            metrics.rejected_requests.labels("client_gone").inc()
        self._request_log.line(
            RequestLine(
                request_id=exchange.id,
                client=exchange.tenant.caller.name,
                model=model,
                status=status,
                error=error.code if error else None,
                inputs=exchange.inputs,
                cached=exchange.usage.cached if exchange.usage else 0,
                calls=result.calls if result else error.calls if error else 0,
                ms=elapsed * 1000,
            )
        )

    def _count(self, model: str, usage: Usage) -> None:
        """Inputs, and the tokens nobody was billed for."""
        if usage.upstream:
            self._inputs(model, Source.UPSTREAM).inc(usage.upstream)
        if usage.cached:
            self._inputs(model, Source.CACHE).inc(usage.cached)
        if usage.shared:
            self._inputs(model, Source.INFLIGHT).inc(usage.shared)
        if usage.cached_tokens:
            self._tokens(model, "", "cached").inc(usage.cached_tokens)
        if usage.shared_tokens:
            self._tokens(model, "", "deduplicated").inc(usage.shared_tokens)


async def _within(quota: Quota, exchange: _Exchange, public: PublicModel, request: EmbedRequest) -> EmbedResult:
    """Embeds the request if the quota has room for its estimated tokens, which are set right in the end."""
    estimated = sum(tokens.estimates(request.inputs))
    exchange.counted = True
    await quota.take(estimated)
    result = await public.embed(request)
    quota.adjust(0, sum(embedding.tokens for embedding in result.embeddings) - estimated)
    return result


async def _linger(receive: Receive, limit: int) -> None:
    """Takes in what the caller still sends, for a while: closed at once, many clients never read the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while limit > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
                limit -= len(message["body"])
