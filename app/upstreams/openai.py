"""OpenAI's embeddings API and every server that speaks it: Azure, vLLM, TEI, infinity, LM Studio and so on.

They differ in configuration, never in code. Knows no vendor behind the dialect.
Facts: openai-openapi's openapi.yaml, openai-python, and the servers' own sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import orjson
from pydantic import Field, field_validator, model_validator

from app import vectors
from app.catalog import ANY, CATALOG, Model, family
from app.clock import Clock
from app.config import UpstreamKind, UpstreamSettings, VendorVariable
from app.errors import (
    ContextLengthExceeded,
    GatewayError,
    InvalidRequest,
    QuotaExhausted,
    UpstreamAuth,
    UpstreamError,
    UpstreamInvalidResponse,
    UpstreamMisconfigured,
)
from app.types import Adapter, Auth, Batch, Parsed, Send, Target, TokenStore, WireReply, WireRequest
from app.upstreams import auth, json_vectors, replies, wire

BASE_URL = "https://api.openai.com/v1"


class OpenAISettings(UpstreamSettings):
    type: Literal["openai"] = "openai"
    base_url: str = BASE_URL
    path: str = "/embeddings"
    query: dict[str, str] = Field(default={})
    auth: Literal["bearer", "api-key", "none"] = "bearer"
    encoding_format: Literal["base64", "float", "omit"] = "base64"
    """What requests ask for; replies in either form are understood. `omit` is for servers that refuse the field."""

    @field_validator("path")
    @classmethod
    def _is_a_path(cls, value: str) -> str:
        if not value.startswith("/"):
            raise ValueError("must begin with /")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.auth != "none" and self.base_url == BASE_URL:
            self.need_key("OPENAI_API_KEY")
        return self

    @property
    def key_header(self) -> str:
        return {"bearer": "authorization", "api-key": "api-key", "none": ""}[self.auth]


def request_builder(
    path: str, query: Mapping[str, str], encoding_format: str | None
) -> Callable[[Batch, Target], WireRequest]:
    """`build_request` for a server with its embeddings at `path`, asking for `encoding_format`."""

    def build_request(batch: Batch, target: Target) -> WireRequest:
        body: dict[str, object] = {"model": target.model.name, "input": batch.inputs}
        if batch.params.dimensions is not None:
            body["dimensions"] = batch.params.dimensions
        if encoding_format is not None:
            body["encoding_format"] = encoding_format
        return wire.post(target.base_url + path, body, query)

    return build_request


_CODES: Mapping[str, type[GatewayError]] = {
    "insufficient_quota": QuotaExhausted,
    "billing_hard_limit_reached": QuotaExhausted,
    "billing_not_active": QuotaExhausted,
    "budget_exceeded": QuotaExhausted,  # LiteLLM, with a 422, 400 or 429
    "insufficient_user_quota": QuotaExhausted,  # one-api, with a 403
    "accountoverdueerror": QuotaExhausted,  # Ark, with a 403
    "invalid_api_key": UpstreamAuth,
    "model_not_found": UpstreamMisconfigured,
    "deploymentnotfound": UpstreamMisconfigured,
    "operationnotsupported": UpstreamMisconfigured,  # Azure: a deployment of a model that is not for embeddings
    "context_length_exceeded": ContextLengthExceeded,
    "string_above_max_length": ContextLengthExceeded,
}


def parse_error(reply: WireReply) -> GatewayError | None:
    """Codes take precedence over statuses: OpenAI sends 403 as well as 404 for an unknown model."""
    if 200 <= reply.status < 300:
        return _error_in_success(reply)
    fields = replies.error_fields(reply)
    kind = replies.by_code(_CODES, fields) or replies.by_status(reply.status, fields.message)
    if kind is InvalidRequest and fields.param == "model":  # set by the configuration, not the caller
        kind = UpstreamMisconfigured
    return replies.make_error(kind, reply, fields.message)


def _error_in_success(reply: WireReply) -> GatewayError | None:
    """Some gateways in front of a server send errors with status 200. Such bodies are short."""
    if len(reply.body) > 4096 or b'"error"' not in reply.body:
        return None
    try:
        body = orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(body, dict) or not body.get("error") or body.get("data"):
        return None
    fields = replies.error_fields(reply)
    kind = replies.by_code(_CODES, fields)
    if kind is None and fields.code.isdecimal() and 400 <= int(fields.code) < 600:
        kind = replies.by_status(int(fields.code), fields.message)
    return replies.make_error(kind or UpstreamError, reply, fields.message)


def parse_response(reply: WireReply, batch: Batch) -> Parsed:
    """Accepts numbers and base64."""
    body = json_vectors.load(reply.body, len(batch.inputs))
    rows = body["data"]
    found = vectors.parse([row["embedding"] for row in rows])
    indexes = [row.get("index", 0) for row in rows]  # Gemini's OpenAI-style route omits an index of 0
    billed = replies.billed_tokens(body.get("usage"), "total_tokens", "prompt_tokens", "input_tokens")
    return Parsed(indexes, found, billed, model=body.get("model"))


def adapter(settings: OpenAISettings) -> Adapter:
    encoding_format = None if settings.encoding_format == "omit" else settings.encoding_format
    return Adapter(request_builder(settings.path, settings.query, encoding_format), parse_error, parse_response)


def credentials(settings: OpenAISettings, clock: Clock, _tokens: TokenStore | None) -> Auth:
    if settings.auth == "none":
        return auth.NoAuth()
    keys = auth.keys(settings)
    if settings.auth == "api-key":
        return auth.in_header(settings.key_header, keys, parse_error, clock)
    return auth.bearer(keys, parse_error, clock)


def models(settings: OpenAISettings) -> Mapping[str, Model]:
    """OpenAI's models; any other server is asked for its own."""
    return CATALOG["openai"] if settings.base_url == BASE_URL else {}


def assumed(settings: OpenAISettings) -> Mapping[str, Model]:
    """OpenAI's models, behind an address and credentials like OpenAI's: a proxy, or a server that stands in for it.
    Nothing where any name may be answered by whatever model there is: Azure's deployments, servers without a key."""
    address = settings.base_url
    alike = address.endswith("/v1") and "/deployments/" not in address and not settings.query
    if not alike or settings.auth != "bearer" or not auth.keys(settings):
        return {}
    return {name: replace(model, assumed=True) for name, model in CATALOG["openai"].items()}


def unlisted_model(name: str) -> Model:
    """The catalogue's facts if it has the name, wherever it is served; else 32 rows, TEI's default."""
    if name in CATALOG["openai"]:
        return CATALOG["openai"][name]
    known = family(name)
    if known is None:
        return Model(name, dimension_choices=ANY, max_batch=32)
    # The server may be configured for another length, or serve another model under this name: what it returns counts.
    full = None if known.dimensions is None else (known.dimensions,)
    return replace(
        known,
        name=name,
        max_batch=32,
        dimensions=None,
        matryoshka_dimensions=full if known.matryoshka_dimensions is None else known.matryoshka_dimensions,
    )


_NO_SUCH_ROUTE = (404, 405, 501)


async def discover(settings: OpenAISettings, send: Send) -> Sequence[Model] | None:
    """`GET /models`; None from a server without that route (TEI, a deployment on Azure). In old versions of infinity
    `data` is one object and not a list."""
    reply = await send(wire.get(settings.base_url + "/models", settings.query))
    if reply.status in _NO_SUCH_ROUTE:
        return None
    error = parse_error(reply)
    if error is not None:
        raise error
    try:
        rows = orjson.loads(reply.body)["data"]
        replies.check_count(rows)
        found = {row["id"]: _listed_model(row) for row in ([rows] if isinstance(rows, dict) else rows) if row["id"]}
    except (KeyError, TypeError, ValueError) as fault:
        raise UpstreamInvalidResponse("the upstream's list of models cannot be read") from fault
    return list(found.values())


def _listed_model(row: Mapping[str, Any]) -> Model:
    """vLLM and SGLang give the longest input that the server was started with."""
    model, limit = unlisted_model(str(row["id"])), row.get("max_model_len")
    return replace(model, max_tokens_per_input=limit) if type(limit) is int and limit > 0 else model


KIND = UpstreamKind(
    name="openai",
    settings=OpenAISettings,
    adapter=adapter,
    auth=credentials,
    models=models,
    unlisted_model=unlisted_model,
    discover=discover,
    assumed=assumed,
    vendor_variables=(
        VendorVariable("api_key", "OPENAI_API_KEY"),
        VendorVariable("base_url", "OPENAI_BASE_URL", optional=True),
    ),
)
