"""The innermost stage: one upstream call. Adapter, credentials, HTTP, the contract check, the bill."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import suppress

from app import tokens
from app.catalog import Model
from app.errors import (
    GatewayError,
    InvalidRequest,
    UnsupportedDimensions,
    UpstreamInvalidResponse,
    UpstreamInvalidVector,
    UpstreamTimeout,
    shortage,
)
from app.metrics import Metrics
from app.pipeline import contract
from app.types import MAX_REPLY, Batch, BatchResult, Embedding, Parsed, Target, WireReply
from app.upstreams import replies
from app.upstreams.redact import quotable, quotes_input
from app.upstreams.upstream import Upstream

INLINE_PARSE_LIMIT = 8 * 2**20
"""Maximum bytes of a reply that are parsed in one turn of the event loop: 12 ms if they are numbers. A larger reply is
parsed in a thread."""
ONE_PER_TURN = 2**20
"""Bytes above which only one reply of a deployment is parsed in a turn of the event loop: calls made together are
answered together, and would block everything else for ten times as long."""

REPLY_BASE, REPLY_PER_INPUT = 2**20, 2**21
"""Maximum bytes of a reply: a base, and as many more for each input. `MAX_DIMENSIONS` numbers with 17 digits, signs and
exponents are 1.7 MiB."""
MAX_ECHOES = 4
"""Times that a reply may also repeat what was sent: some servers refuse an input by quoting all of it, once for each
type that it fails to match."""

_NAN = re.compile(rb"([\[,]\s*+)-?(?:NaN|Infinity)\b")
"""What some servers write into a list of numbers, which makes it invalid JSON. A single text may be the cause."""
MAX_NAN = 2**16
"""Of them that are replaced, at most: each takes as long as a hundred numbers, and one is enough to name a vector."""
_INFINITE = rb"\g<1>1e39"
"""The same as JSON: infinite as a float32. So the contract check finds the vector, and the others are kept."""
_UNREADABLE = (KeyError, TypeError, ValueError, IndexError)


class Call:
    """Embeds a batch on one deployment. Raises `GatewayError`, its message free of secrets."""

    def __init__(self, upstream: Upstream, model: Model, metrics: Metrics) -> None:
        self._target = Target(upstream.settings.base_url, model)
        self._adapter, self._auth, self._send = upstream.adapter, upstream.auth, upstream.send
        self._redact, self._upstream, self._metrics = upstream.redact, upstream.name, metrics
        self._labels = upstream.name, model.name
        self._parsing = asyncio.Lock()

    async def __call__(self, batch: Batch) -> BatchResult:
        started = time.perf_counter()
        # Series are made here, not above: an upstream may list thousands of models, and every scrape would carry all.
        self._metrics.upstream_batch_inputs.labels(*self._labels).observe(len(batch.inputs))
        try:
            parsed = await self._exchange(batch)
            # Whatever was answered is billed, whether or not it can be used.
            weights = tokens.estimates(batch.inputs)
            bills = tokens.bills(self._charge(batch, parsed.tokens, weights), batch.inputs, weights)
            params, model = batch.params, self._target.model
            if model.assumed:
                contract.same_model(parsed.model, model.name)
            checked = contract.checked(parsed, bills, params.dimensions, params.output_type, native=model.dimensions)
        except GatewayError as error:
            error.message = self._redact(error.message)
            self._count(error.code)
            raise
        except asyncio.CancelledError:
            # By its callers' last deadline, or sooner: by a check that needs no more answers, or by shutdown. Only the
            # first says something about the upstream.
            if asyncio.get_running_loop().time() >= batch.deadline:
                self._count(UpstreamTimeout.code)
            raise
        finally:
            elapsed = time.perf_counter() - started
            self._metrics.upstream_request_duration.labels(*self._labels).observe(elapsed)
        first = checked[0]
        if isinstance(first, Embedding) or any(isinstance(each, Embedding) for each in checked):
            self._count("ok")
        else:
            self._count(first.code)
        return BatchResult(checked)

    def _count(self, outcome: str) -> None:
        self._metrics.upstream_requests.labels(*self._labels, outcome).inc()

    async def _exchange(self, batch: Batch) -> Parsed:
        request = self._adapter.build_request(batch, self._target)
        expected = REPLY_BASE + len(batch.inputs) * REPLY_PER_INPUT + MAX_ECHOES * len(request.body)
        request.max_reply = min(expected, MAX_REPLY)
        try:
            reply = await self._auth(request, self._send)
            if len(reply.body) > INLINE_PARSE_LIMIT:
                return await asyncio.to_thread(self._parse, reply, batch)
            if len(reply.body) > ONE_PER_TURN:
                async with self._parsing:
                    await asyncio.sleep(0)
                    return self._parse(reply, batch)
            return self._parse(reply, batch)
        except (MemoryError, RuntimeError) as fault:
            error = shortage(fault)
            if error is None:
                raise
            raise error from None

    def _parse(self, reply: WireReply, batch: Batch) -> Parsed:
        """Raises `GatewayError` for a reply that is an error, or is not an embeddings reply."""
        error = self._adapter.parse_error(reply)
        if error is not None:
            raise self._without_inputs(error, reply, batch)
        try:
            return self._adapter.parse_response(reply, batch)
        except _UNREADABLE as exc:
            if _NAN.search(reply.body) is None:
                raise self._not_embeddings(reply, batch) from exc
            if len(batch.inputs) > 1:  # or it is known whose vector it is
                readable = _NAN.sub(_INFINITE, reply.body, MAX_NAN)
                with suppress(*_UNREADABLE):
                    return self._adapter.parse_response(WireReply(reply.status, reply.headers, readable), batch)
            raise UpstreamInvalidVector("the upstream returned a vector that holds NaN or infinity") from exc

    def _not_embeddings(self, reply: WireReply, batch: Batch) -> UpstreamInvalidResponse:
        """The error for a reply that is not an embeddings reply, quoting the page (a proxy's, a login's) that came in
        its place. Nothing else is quoted: it may be half a reply, full of vectors."""
        kind = reply.headers.get("content-type", "no content type")
        page = self._redact(replies.html_text(reply))
        excerpt = f": {page}" if page and not quotes_input(page, quotable(batch)) else ""
        return UpstreamInvalidResponse(
            f"the upstream's reply (HTTP {reply.status}, {kind}) is not an embeddings reply{excerpt}"
        )

    def _without_inputs(self, error: GatewayError, reply: WireReply, batch: Batch) -> GatewayError:
        """The error as it may be shown to all callers that share the call, in the log and in `/readyz`: without any
        caller's text."""
        message = self._redact(replies.upstream_message(error))
        if isinstance(error, UnsupportedDimensions):
            texts = [each for each in quotable(batch) if type(each) is str]
            misleading = [each for each in texts if replies.may_mention_dimensions(each)]
            if batch.params.dimensions is None or quotes_input(message, misleading):
                # None were requested, so it may be about the dimensions of one input, an image. Or the word is a quoted
                # text's.
                error = replies.make_error(InvalidRequest, reply, message)
        # The refusal of a single input is shown only to the callers that sent it.
        shared = not isinstance(error, InvalidRequest) or (len(batch.inputs) > 1 and not error.blames_input)
        if shared and quotes_input(message, quotable(batch)):
            error.message = replies.make_error(type(error), reply).message
        return error

    def _charge(self, batch: Batch, stated: int | None, weights: list[int]) -> int:
        """Counts the batch's tokens in the metrics, and returns them: the upstream's number, or our estimate if it
        reports none that is credible, since callers' and upstreams' rate limits are charged with it."""
        total = sum(weights) if stated is None or not tokens.credible(stated, batch.inputs, weights) else stated
        model = self._target.model
        # By the name callers know the model by; several names may lead here.
        self._metrics.tokens.labels(batch.model, self._upstream, "billed").inc(total)
        if price := model.price_per_million_tokens:
            self._metrics.cost.labels(batch.model, self._upstream, model.currency).inc(total * price / 1_000_000)
        return total
