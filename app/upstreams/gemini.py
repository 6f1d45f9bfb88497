"""Gemini's own API, `models/…:batchEmbedContents`: its OpenAI-style route supports no roles.

Does not know how a model takes a role: that is the catalogue's. Facts: ai.google.dev/api/embeddings and
google-genai 3.4.0 (PyPI).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Literal
from urllib.parse import quote

from app import vectors
from app.catalog import ANY, Model
from app.config import UpstreamKind, UpstreamSettings, VendorVariable
from app.errors import GatewayError, QuotaExhausted, UnsupportedDimensions, UpstreamAuth
from app.types import Adapter, Batch, Parsed, Target, WireReply, WireRequest
from app.upstreams import auth, json_vectors, replies, wire


class GeminiSettings(UpstreamSettings):
    type: Literal["gemini"] = "gemini"
    base_url: str = "https://generativelanguage.googleapis.com/v1beta"
    key_variable: ClassVar = "GEMINI_API_KEY"
    key_header: ClassVar = "x-goog-api-key"  # not `?key=`, which ends up in logs


def build_request(batch: Batch, target: Target) -> WireRequest:
    """One content per input: several parts in one content would be merged into one vector."""
    model, params = target.model, batch.params
    options: dict[str, object] = {"model": f"models/{model.name}"}
    if params.input_type is not None:
        options["taskType"] = f"RETRIEVAL_{params.input_type.upper()}"
    if params.dimensions is not None:
        options["outputDimensionality"] = params.dimensions
    requests = [{**options, "content": {"parts": [{"text": text}]}} for text in batch.inputs]
    url = f"{target.base_url}/models/{quote(model.name, safe='')}:batchEmbedContents"
    return wire.post(url, {"requests": requests})


# The body, an object or a list of one, says what the status leaves open; the first match counts. Quotes within a
# message are escaped, so that no caller's text reads as a field.
_FIELDS: Sequence[tuple[re.Pattern[bytes], type[GatewayError]]] = (
    (re.compile(rb'"reason"\s*:\s*"API_KEY_INVALID"'), UpstreamAuth),  # sent as a 400
    (re.compile(rb'"message"\s*:\s*"API key (not|expired)\b', re.IGNORECASE), UpstreamAuth),  # the same without details
    (re.compile(rb'"status"\s*:\s*"FAILED_PRECONDITION"'), UpstreamAuth),  # no service in this country, or no free tier
    (re.compile(rb'"quotaId"\s*:\s*"[^"]*PerDay'), QuotaExhausted),
    (re.compile(rb'"message"\s*:\s*"[^"]*dimensionality', re.IGNORECASE), UnsupportedDimensions),
)
_DELAY = re.compile(rb'"retryDelay"\s*:\s*"(\d{1,9}(?:\.\d{1,9})?)s"')


def parse_error(reply: WireReply) -> GatewayError | None:
    if 200 <= reply.status < 300:
        return None
    message, body = replies.error_fields(reply).message, reply.body[: replies.MAX_ERROR_BODY]
    kind = next((kind for pattern, kind in _FIELDS if pattern.search(body)), None)
    error = replies.make_error(kind or replies.by_status(reply.status, message), reply, message)
    delay = _DELAY.search(body)
    if delay and kind is not QuotaExhausted:  # a daily quota comes with a per-minute quota's delay
        error.retry_after = float(delay[1])
    return error


def parse_response(reply: WireReply, batch: Batch) -> Parsed:
    """No indexes: vectors come in input order. Those with reduced dimensions are not of unit length."""
    body = json_vectors.load(reply.body, len(batch.inputs))
    found = [_unit_length(vector) for vector in vectors.parse([row["values"] for row in body["embeddings"]])]
    return Parsed(range(len(found)), found, replies.billed_tokens(body.get("usageMetadata"), "promptTokenCount"))


def _unit_length(vector: bytes) -> bytes:
    """The vector at unit length. An invalid one stays as it is, for the contract check to refuse."""
    return vector if vectors.fault(vector) else vectors.normalise(vector)


def adapter(_settings: GeminiSettings) -> Adapter:
    return Adapter(build_request, parse_error, parse_response)


def unlisted_model(name: str) -> Model:
    """The route takes 100 inputs, whatever the model."""
    return Model(name, dimension_choices=ANY, max_batch=100)


KIND = UpstreamKind(
    name="gemini",
    settings=GeminiSettings,
    adapter=adapter,
    auth=auth.by_header(GeminiSettings.key_header, parse_error),
    unlisted_model=unlisted_model,
    vendor_variables=(VendorVariable("api_key", "GEMINI_API_KEY", alternative="GOOGLE_API_KEY"),),
)
