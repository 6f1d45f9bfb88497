"""Alibaba Cloud Model Studio (DashScope): embeddings in its own dialect, or in OpenAI's.

Knows no batching or limits: those are the catalogue's. Facts: help.aliyun.com/zh/model-studio, pages
text-embedding-synchronous-api and error-code, and the dashscope SDK 2.0.2 (PyPI).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from app import vectors
from app.catalog import CATALOG, Model
from app.config import CAPABILITIES, UpstreamKind, UpstreamSettings, VendorVariable
from app.errors import (
    GatewayError,
    InvalidRequest,
    QuotaExhausted,
    RateLimited,
    UnreadableMedia,
    UpstreamAuth,
    UpstreamError,
    UpstreamMisconfigured,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from app.types import Adapter, Batch, Input, Parsed, Target, WireReply, WireRequest
from app.upstreams import auth, json_vectors, openai, replies, wire

_PATH = "/services/embeddings/text-embedding/text-embedding"
_MULTIMODAL_PATH = "/services/embeddings/multimodal-embedding/multimodal-embedding"


class DashScopeSettings(UpstreamSettings):
    type: Literal["dashscope"] = "dashscope"
    mode: Literal["native", "compatible"] = "native"
    base_urls: ClassVar = {
        "native": "https://dashscope.aliyuncs.com/api/v1",
        "compatible": "https://dashscope.aliyuncs.com/compatible-mode/v1",
    }
    key_variable: ClassVar = "DASHSCOPE_API_KEY"


def build_request(batch: Batch, target: Target) -> WireRequest:
    """The native form. `parameters` is sent even when empty: omitting it is a BadRequest.EmptyParameters."""
    params = batch.params
    parameters: dict[str, object] = {}
    role = params.input_type or target.model.default_role
    if role is not None:
        parameters["text_type"] = role
    if params.dimensions is not None:
        parameters["dimension"] = params.dimensions
    if params.output_type != "dense":
        parameters["output_type"] = params.output_type
    if params.instruct is not None:
        parameters["instruct"] = params.instruct
    body: dict[str, object] = {"model": target.model.name, "parameters": parameters}
    if _takes_contents(target.model):
        body["input"] = {"contents": [_content(each) for each in batch.inputs]}
        return wire.post(target.base_url + _MULTIMODAL_PATH, body)
    body["input"] = {"texts": batch.inputs}
    return wire.post(target.base_url + _PATH, body)


def _takes_contents(model: Model) -> bool:
    """Whether the model uses the multimodal route, even if an operator allows it no images."""
    known = CATALOG["dashscope"].get(model.name, model)
    return known.images > 0 or known.videos > 0


def _content(each: Input) -> dict[str, str]:
    return {"text": each} if isinstance(each, str) else {each.kind: each.source}


# Lower-case codes of both modes, complete or up to the first dot.
_CODES: Mapping[str, type[GatewayError]] = {
    "invalidparameter": InvalidRequest,
    "invalidparameter.datainspection": UnreadableMedia,
    "invalid_parameter_error": InvalidRequest,
    "badrequest": InvalidRequest,
    "datainspectionfailed": InvalidRequest,
    "data_inspection_failed": InvalidRequest,
    "invalidurl": InvalidRequest,
    "invalidfile": InvalidRequest,
    "unsupportedoperation": InvalidRequest,
    "serviceunavailableerror": InvalidRequest,  # misnamed by the vendor: empty content, bad role
    "arrearage": QuotaExhausted,
    "prepaidbilloverdue": QuotaExhausted,
    "postpaidbilloverdue": QuotaExhausted,
    "commoditynotpurchased": QuotaExhausted,
    "allocationquota": QuotaExhausted,
    "invalidapikey": UpstreamAuth,
    "invalid_api_key": UpstreamAuth,
    "not authorized": UpstreamAuth,
    "accessdenied": UpstreamAuth,
    "access_denied": UpstreamAuth,
    "workspace": UpstreamAuth,
    "app": UpstreamAuth,
    # The key is valid, but not for this model: it still serves others.
    "model": UpstreamMisconfigured,
    "endpoint": UpstreamMisconfigured,
    "modelnotfound": UpstreamMisconfigured,
    "model_not_found": UpstreamMisconfigured,
    "model_not_supported": UpstreamMisconfigured,
    "workspacenotfound": UpstreamMisconfigured,
    "notfound": UpstreamMisconfigured,
    "conflict": UpstreamMisconfigured,
    "throttling": RateLimited,
    "limitrequests": RateLimited,
    "limit_requests": RateLimited,
    "limit_burst_rate": RateLimited,
    "insufficient_quota": RateLimited,  # tokens per minute, unless the message says otherwise
    "internalerror": UpstreamError,
    "internalerror.timeout": UpstreamTimeout,
    "internal_error": UpstreamError,
    "systemerror": UpstreamError,
    "modelservicefailed": UpstreamError,
    "requesttimeout": UpstreamTimeout,
    "gatewaytimeout": UpstreamTimeout,
    "modelservingerror": UpstreamUnavailable,
    "modelunavailable": UpstreamUnavailable,
    "serviceunavailable": UpstreamUnavailable,
}
# One code means both a rate limit (passes within a minute) and a quota (does not); the message tells them apart.
_QUOTA_USED_UP = re.compile(r"\b(free|hour|week|month) allocated quota exceeded|free quota", re.IGNORECASE)
# "url error": the model has another path.
_NO_MODEL = re.compile(r"model (does )?not exist|does not support (a?synchronous) calls|^url error\b", re.IGNORECASE)
# Refusals by the algorithm, which also arrive under other codes and statuses.
_WRAPPED_CODE = re.compile(r"internalerror\.algo\.(invalidparameter|datainspectionfailed)")


def parse_error(reply: WireReply) -> GatewayError | None:
    """Both modes. An error may come with HTTP 200; an empty `code` means success."""
    succeeded = 200 <= reply.status < 300
    if succeeded and b'"code"' not in reply.body:
        return None
    fields = replies.error_fields(reply)
    if succeeded and not fields.code:
        return None
    return replies.make_error(_kind(reply.status, fields), reply, fields.message)


def _kind(status: int, fields: replies.ErrorFields) -> type[GatewayError]:
    code = (fields.code or fields.type).lower()
    if match := _WRAPPED_CODE.search(f"{code} {fields.message.lower()}"):
        code = match[1]
    kind = _CODES.get(code) or _CODES.get(code.partition(".")[0]) or replies.by_status(status, fields.message)
    if kind is RateLimited and _QUOTA_USED_UP.search(fields.message):
        return QuotaExhausted
    if kind in (InvalidRequest, UpstreamAuth) and _NO_MODEL.search(fields.message):
        return UpstreamMisconfigured
    return replies.by_message(fields.message) if kind is InvalidRequest else kind


def parse_response(reply: WireReply, batch: Batch) -> Parsed:
    """The native form, for texts (`text_index`) and for contents (`index`)."""
    output_type = batch.params.output_type
    body = json_vectors.load(reply.body, len(batch.inputs), sparse=output_type != "dense")
    rows = body["output"]["embeddings"]
    return Parsed(
        [row["text_index"] if "text_index" in row else row["index"] for row in rows],
        [b""] * len(rows) if output_type == "sparse" else vectors.parse([row["embedding"] for row in rows]),
        _billed(body.get("usage")),
        None if output_type == "dense" else [row["sparse_embedding"] for row in rows],
    )


def _billed(usage: object) -> int | None:
    """The documentation disagrees on the field's name; without a total, images are counted separately."""
    total = replies.billed_tokens(usage, "total_tokens")
    parts = [replies.billed_tokens(usage, name) or 0 for name in ("input_tokens", "image_tokens")]
    return total or sum(parts) or None


_ADAPTERS = {
    "native": Adapter(build_request, parse_error, parse_response, capabilities=frozenset(CAPABILITIES)),
    # Its gateway answers long requests with numbers whatever they ask for, so we ask for numbers.
    "compatible": Adapter(openai.request_builder("/embeddings", {}, "float"), parse_error, openai.parse_response),
}


def adapter(settings: DashScopeSettings) -> Adapter:
    return _ADAPTERS[settings.mode]


# OpenAI's dialect cannot express roles, instructions or sparse vectors: every text is a document there. It does not
# serve image models at all.
_COMPATIBLE = {
    name: replace(model, roles=("document",), instruct=False, sparse=False)
    for name, model in CATALOG["dashscope"].items()
    if not model.images
}


def models(settings: DashScopeSettings) -> Mapping[str, Model]:
    return CATALOG["dashscope"] if settings.mode == "native" else _COMPATIBLE


KIND = UpstreamKind(
    name="dashscope",
    settings=DashScopeSettings,
    adapter=adapter,
    auth=auth.by_bearer(parse_error),
    models=models,
    vendor_variables=(VendorVariable("api_key", "DASHSCOPE_API_KEY"),),
)
