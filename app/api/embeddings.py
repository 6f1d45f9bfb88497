"""`POST /v1/embeddings` as a plain ASGI application, from the first byte in to the last byte out.

FastAPI's own machinery would cost more than all the work done here (bench/README.md), so this runs in front of it.
`app.api.routes` still declares and documents the route.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from msgspec import Struct

from app import tokens
from app.api import head, render
from app.api.asgi import Receive, Scope, Sender
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
    Shortage,
    SlowBody,
    UnsupportedEncoding,
    UnsupportedMediaType,
    UpstreamTimeout,
    shortage,
)
from app.gateway import Gateway
from app.logs import RequestLine, RequestLog, Seldom
from app.pipeline.admit import INPUT_OVERHEAD, Admission
from app.pipeline.quota import Permit, Quota
from app.registry import PublicModel
from app.types import EmbedRequest, EmbedResult, Source

_PATHS = frozenset(
    path + slash for path in ("/v1/embeddings", "/embeddings", "/openai/v1/embeddings") for slash in ("", "/")
)
_MODEL_PATH = re.compile(r"/(?:v1/engines|openai/deployments)/(?P<model>.+)/embeddings/?")
LINGER = 5.0
"""Seconds to go on reading and discarding the rest of a rejected body."""

INLINE_PARSE_LIMIT = 256 * 2**10
"""Bytes of the largest body parsed on the event loop, which takes 10 ms if it is token ids. A larger body is parsed in
a thread, where only the JSON decoding itself blocks other requests."""
SERIAL_PARSE_LIMIT = 2 * 2**20
"""Bytes above which bodies are parsed one at a time: meanwhile token ids take up to 15 times the memory of their text,
and a request's `Admission` accounts only for the text."""

_OK = b"HTTP/1.1 200 OK\r\n"
_HEADERS = b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\nopenai-processing-ms: %d\r\n"
"""The headers that every response has, besides its date and `connection` (`render.head_end`)."""

log = logging.getLogger(__name__)


def match(path: str) -> tuple[bool, str | None]:
    """Whether the path is any form of the embeddings route, and the model it names, if any."""
    if path in _PATHS:
        return True, None
    named = _MODEL_PATH.fullmatch(path)
    return named is not None, named["model"] if named else None


class _Exchange(Struct):
    """The state of one request and its response, for metrics and the log line."""

    headers: Mapping[bytes, bytes]
    """The request's, by name: see `head.by_name`."""
    id: bytes
    started: float
    """On the event loop's clock, like deadlines; its resolution may be only a millisecond."""
    perf_started: float
    """On `time.perf_counter`, for durations."""
    admission: Admission
    """Held until the caller has taken the response."""
    tenant: Tenant = ANONYMOUS
    quota: Quota | None = None
    permit: Permit | None = None
    """The quota's, if it let the request in."""
    public: PublicModel | None = None
    result: EmbedResult | None = None
    usage: Usage | None = None
    """Of the result."""
    inputs: int = 0
    reading: bool = True
    """Whether the request body is incomplete: a missed deadline is then the caller's fault."""


class Embeddings:
    """The embeddings route over a gateway."""

    def __init__(self, gateway: Gateway, keys: Keys, request_log: RequestLog) -> None:
        self._gateway, self._keys, self._request_log = gateway, keys, request_log
        self._server = gateway.settings.server
        self._metrics = metrics = gateway.metrics
        self._deadlines = Deadlines()
        self._seldom = Seldom(time.monotonic)
        self._serial_executor = ThreadPoolExecutor(1, thread_name_prefix="parse")
        """Parses the largest bodies one at a time, each to its end even if its caller has disconnected."""
        self._requests = metrics.requests.labels
        self._inputs = metrics.inputs.labels
        self._tokens = metrics.tokens.labels
        self._durations = metrics.request_duration.labels

    async def __call__(self, scope: Scope, receive: Receive, send: Sender, path_model: str | None) -> None:
        headers = head.by_name(scope["headers"])
        now, perf_started = asyncio.get_running_loop().time(), time.perf_counter()
        first_byte = scope.get("extensions", {}).get("first_byte")
        if first_byte is not None:  # the head arrived in pieces: its time counts too
            now, perf_started = first_byte, perf_started - (now - first_byte)
        with Admission(self._gateway.capacity) as admission:
            exchange = _Exchange(headers, head.request_id(headers), now, perf_started, admission)
            error: GatewayError | None = None
            try:
                lines, body = await self._answer(exchange, scope, receive, path_model)
            except ClientGone:
                self._record(exchange, 499, None)
                return
            except GatewayError as failure:
                error = failure.without_traceback()
            except asyncio.CancelledError:  # the server stops waiting, also for the rest of a body
                exchange.reading = False
                error = Overloaded("the gateway is stopping")
            except Exception as fault:
                error = shortage(fault) or _internal_error(exchange)
            finally:
                if exchange.permit is not None:  # a request rejected for its content counts too
                    exchange.permit.close(counts=error is not None and not isinstance(error, Overloaded))
            status = 200
            if error is not None:
                status = error.status
                lines, body = self._error_response(exchange, error)
            if exchange.quota is not None:
                lines += render.encode_headers(render.rate_limit_headers(exchange.quota.limit_statuses()))
            self._record(exchange, status, error)
            exchange.result = None  # while being sent, a response is in memory only once, as bytes
            await self._send(exchange, scope, receive, send, status, lines, body)

    async def _answer(
        self, exchange: _Exchange, scope: Scope, receive: Receive, path_model: str | None
    ) -> tuple[bytes, list[bytes]]:
        """Returns the response's header lines and the pieces of its body."""
        if scope["method"] != "POST":
            exchange.reading = False
            raise MethodNotAllowed(f"{scope['method']} is not allowed here; use POST")
        exchange.tenant = self._keys.tenant(exchange.headers)
        exchange.quota = self._gateway.quotas.get(exchange.tenant.caller.name)
        if exchange.quota is not None:
            # Before admission, so that a caller that floods takes no room from others.
            exchange.permit = exchange.quota.admit(head.content_length(exchange.headers))
        deadline, admission = exchange.started + self._server.request_timeout, exchange.admission
        try:
            guard = Guard(deadline, self._deadlines)
            with guard:
                admission.take_place()
                self._check_head(exchange.headers, scope)
                raw = self._buffered_body(scope, admission) or await self._read(receive, admission)
                exchange.reading = False
                guard.watch(scope)
                if len(raw) <= INLINE_PARSE_LIMIT:
                    body = self._parse(raw, path_model)
                else:
                    executor = self._serial_executor if len(raw) > SERIAL_PARSE_LIMIT else None  # None: the default one
                    loop = asyncio.get_running_loop()
                    body = await loop.run_in_executor(executor, self._parse_large, raw, path_model)
                admission.hold(max(len(raw), body.decoded) + INPUT_OVERHEAD * len(body.inputs))
                result, public = await self._embed(exchange, body, deadline, scope)
                exchange.usage = usage = Usage.of(result)
                rendered = await render.embeddings(result, usage, body.model, body.encoding)
        except TimeoutError:
            if exchange.reading:
                raise SlowBody("the request body did not arrive in time") from None
            if not exchange.inputs:  # not the upstream's fault: the body came late, or waited for other large ones
                raise Overloaded("the request body could not be read in time") from None
            raise UpstreamTimeout(f"no answer within the request's {self._server.request_timeout:g} s") from None
        return render.result_headers(result, usage, public.space), rendered

    def _error_response(self, exchange: _Exchange, error: GatewayError) -> tuple[bytes, list[bytes]]:
        """Returns the header lines and body of an error response. Ends the request's admission: there is little to
        send, but the rest of the request body may take long to arrive."""
        exchange.admission.end()
        if isinstance(error, Shortage) and self._seldom(error.message):
            log.warning("%s", error.message)
        if error.model is not None:
            exchange.public = self._gateway.names.get(error.model)
        headers = render.error_headers(error)
        if isinstance(error, MethodNotAllowed):
            headers.append((b"allow", b"POST"))
        if exchange.reading:
            # The rest of the body will not be read, so the connection cannot carry another request.
            headers.append((b"connection", b"close"))
        return render.encode_headers(headers), [render.error_body(error)]

    def _check_head(self, headers: Mapping[bytes, bytes], scope: Scope) -> None:
        self._check_size(head.content_length(headers))
        if head.is_compressed(headers, scope["headers"]):
            raise UnsupportedEncoding("compressed request bodies are not accepted; send the body uncompressed")
        if b"origin" in headers and not head.is_json(headers):
            raise UnsupportedMediaType("a web page's request needs the header `content-type: application/json`")

    def _check_size(self, size: int) -> None:
        if size > self._server.max_body:
            raise BodyTooLarge(f"the request body is larger than {self._server.max_body} bytes")

    def _account_for(self, size: int, admission: Admission) -> None:
        """Accounts for the `size` bytes of body received so far. A length that is only announced takes no room."""
        self._check_size(size)
        admission.hold(size)

    def _buffered_body(self, scope: Scope, admission: Admission) -> bytes | None:
        """The whole body, if the server has received all of it (`app.http.protocol`)."""
        body = scope.get("extensions", {}).get("body")
        raw: bytes | None = body() if body else None
        if raw:
            self._account_for(len(raw), admission)
        return raw

    async def _read(self, receive: Receive, admission: Admission) -> bytes:
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            self._account_for(size, admission)
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
        exchange.tenant.check_known(body.model, self._gateway.names)
        public = await self._gateway.find(body.model)
        exchange.public = public
        exchange.tenant.check(body.model, public.name)
        has_directives = b"cache-control" in exchange.headers
        read_cache, write_cache = head.cache_control(scope["headers"]) if has_directives else (True, True)
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
        if exchange.permit is None:
            exchange.result = await public.embed(request)
        else:
            exchange.result = await _embed_limited(exchange.permit, public, request)
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
        elapsed = time.perf_counter() - exchange.perf_started
        size = sum(map(len, body))
        lines += _HEADERS % (size, exchange.id, elapsed * 1000)
        respond = scope.get("extensions", {}).get("respond") if status == 200 else None
        if respond is not None:
            exchange.admission.hold_answer(size)
            try:
                await respond(_OK + lines, body, size, exchange.started + self._server.request_timeout)
            except TimeoutError:  # the connection is closed: there is no one left to answer
                self._metrics.rejected_requests.labels("answer_not_taken").inc()
            return
        payload = b"".join(body)
        await send({"type": "http.response.start", "status": status, "headers": render.decode_headers(lines)})
        if exchange.reading:
            await send({"type": "http.response.body", "body": payload, "more_body": True})
            await _linger(receive, 2 * self._server.max_body)
            payload = b""
        await send({"type": "http.response.body", "body": payload})

    def _record(self, exchange: _Exchange, status: int, error: GatewayError | None) -> None:
        """Updates the metrics and writes the request's one log line: names and numbers, never texts or keys."""
        metrics = self._metrics
        model = exchange.public.name if exchange.public else "other"
        elapsed = time.perf_counter() - exchange.perf_started
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
        """Counts the inputs by source, and the tokens that no upstream billed."""
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


def _internal_error(exchange: _Exchange) -> GatewayError:
    """The error for the exception being handled, a bug of ours."""
    log.exception("request %s failed", exchange.id.decode())
    return GatewayError("internal error")


async def _embed_limited(permit: Permit, public: PublicModel, request: EmbedRequest) -> EmbedResult:
    """Embeds the request if the quota has room for its estimated tokens; the estimate is corrected afterwards."""
    estimated = sum(tokens.estimates(request.inputs))
    await permit.take(estimated)
    result = await public.embed(request)
    permit.correct(sum(embedding.tokens for embedding in result.embeddings) - estimated)
    return result


async def _linger(receive: Receive, limit: int) -> None:
    """Reads and discards what the caller still sends, for up to `LINGER` seconds: many clients never read the response
    if the connection closes while they are sending."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while limit > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
                limit -= len(message["body"])
