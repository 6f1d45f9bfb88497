"""Baidu's embeddings: V1 (Wenxin Workshop: a path per model, errors with HTTP 200) and V2 (Qianfan).

Knows which replies mean a stale token, but not how tokens are kept or requests signed: `access_token` and `signature`
do. Facts: cloud.baidu.com/doc (WENXINWORKSHOP, qianfan-api) and the qianfan SDK 0.4.12.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, Self
from urllib.parse import quote

import orjson
from pydantic import SecretStr, model_validator

from app.catalog import CATALOG, Model
from app.clock import Clock
from app.config import UpstreamKind, UpstreamSettings, VendorVariable
from app.errors import (
    ContextLengthExceeded,
    GatewayError,
    InvalidRequest,
    QuotaExhausted,
    RateLimited,
    UpstreamAuth,
    UpstreamError,
    UpstreamMisconfigured,
    UpstreamUnavailable,
)
from app.types import Adapter, Auth, Batch, Target, TokenStore, WireReply, WireRequest
from app.upstreams import auth, openai, replies, wire
from app.upstreams.access_token import AccessToken
from app.upstreams.sealed import SealedTokens
from app.upstreams.signature import BceSignature

_PATH = "/rpc/2.0/ai_custom/v1/wenxinworkshop/embeddings/"
_TOKEN_PATH = "/oauth/2.0/token"  # noqa: S105  # a path
_DOCUMENTED_NAME = "Embedding-V1"
"""The name of embedding-v1 as its documentation page writes it."""
# The last segment of V1's path; for a custom service it is the service's own name.
_ENDPOINTS = {
    _DOCUMENTED_NAME: "embedding-v1",
    "bge-large-zh": "bge_large_zh",
    "bge-large-en": "bge_large_en",
    "tao-8k": "tao_8k",
}


class BaiduSettings(UpstreamSettings):
    type: Literal["baidu"] = "baidu"
    mode: Literal["v1", "v2"] = "v1"
    base_urls: ClassVar = {"v1": "https://aip.baidubce.com", "v2": "https://qianfan.baidubce.com/v2"}
    auth: Literal["access_token", "iam"] = "access_token"
    """How V1 authenticates. V2 always sends its key as a bearer token."""
    secret_key: SecretStr | None = None
    access_key: SecretStr | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mode == "v2":
            self.need_key("QIANFAN_API_KEY")
        elif self.auth == "iam":
            _require(self.access_key, "access_key", "auth: iam signs with access_key and secret_key")
            _require(self.secret_key, "secret_key", "auth: iam signs with access_key and secret_key")
            if any(name.lower() == "authorization" for name in self.headers):
                raise ValueError("headers: Authorization would replace the signature; leave it out")
        elif self.api_keys:
            raise ValueError("api_keys: an access token is made from one api_key and its secret_key")
        else:
            also = "" if self.secret_key else ", and secret_key"
            _require(self.api_key, "api_key", f'set it here, for instance to "${{BAIDU_API_KEY}}"{also}')
            _require(self.secret_key, "secret_key", 'set it here, for instance to "${BAIDU_SECRET_KEY}"')
        return self

    @property
    def key_header(self) -> str:
        return "authorization" if self.mode == "v2" else ""


def _require(value: SecretStr | None, name: str, how: str) -> None:
    if value is None:
        raise ValueError(f"{name}: needed; {how}")


# --- V1 ---------------------------------------------------------------------------------------------


def build_request(batch: Batch, target: Target) -> WireRequest:
    name = target.model.name
    endpoint = _ENDPOINTS.get(name) or quote(name, safe="")
    return wire.post(target.base_url + _PATH + endpoint, {"input": batch.inputs})


_STALE = frozenset({100, 110, 111})  # invalid or missing, no longer valid, expired
_REFUSED_SIGNATURE = 14

_CODES: Mapping[int, type[GatewayError]] = {
    1: UpstreamError,
    2: UpstreamUnavailable,
    3: UpstreamMisconfigured,
    4: RateLimited,  # the cluster's limit, not ours
    6: UpstreamAuth,
    13: UpstreamAuth,
    14: UpstreamAuth,
    15: UpstreamUnavailable,  # "app not exists or create failed": the vendor's page says to retry
    17: QuotaExhausted,
    18: RateLimited,
    19: QuotaExhausted,
    100: UpstreamAuth,
    110: UpstreamAuth,
    111: UpstreamAuth,
    336000: UpstreamError,
    336001: InvalidRequest,
    336002: InvalidRequest,
    336003: InvalidRequest,
    336004: UpstreamAuth,
    336005: UpstreamMisconfigured,
    336006: ContextLengthExceeded,
    336007: ContextLengthExceeded,
    336008: ContextLengthExceeded,
    336100: UpstreamUnavailable,
    336101: UpstreamMisconfigured,
    336102: InvalidRequest,
    336103: ContextLengthExceeded,
    336104: InvalidRequest,
    336105: InvalidRequest,
    336200: UpstreamError,
    336303: InvalidRequest,
    336501: RateLimited,
    336502: RateLimited,
    337006: InvalidRequest,
}


def error_code(reply: WireReply) -> int:
    """V1's `error_code`, or 0. (`error_msg` proves nothing: it may be present and empty.)"""
    if b'"error_code"' not in reply.body:
        return 0
    try:
        body = orjson.loads(reply.body)
        return int(body["error_code"]) if isinstance(body, dict) else 0
    except (KeyError, TypeError, ValueError):
        return 0


def is_stale(reply: WireReply) -> bool:
    return error_code(reply) in _STALE


def parse_error(reply: WireReply) -> GatewayError | None:
    code = error_code(reply)
    if not code and 200 <= reply.status < 300:
        return None
    message = replies.error_fields(reply).message or reply.headers.get("x-bce-error-message", "")
    kind = _CODES.get(code, UpstreamError) if code else replies.by_status(reply.status, message)
    if kind is InvalidRequest:
        kind = replies.by_message(message)
    if code == _REFUSED_SIGNATURE:
        message += " (the key or the gateway's clock is wrong)"
    return replies.make_error(kind, reply, message)


# --- V2 ---------------------------------------------------------------------------------------------

_V2_CODES: Mapping[str, type[GatewayError]] = {
    "invalid_model": UpstreamMisconfigured,  # HTTP 401, but the key is good
    "model_offline": UpstreamMisconfigured,
    "account_overdue": QuotaExhausted,
    "characters_too_long": ContextLengthExceeded,
    "tokens_too_long": ContextLengthExceeded,
    "unsafe_request": InvalidRequest,  # a type; sent with a 403 as well
}


def parse_error_v2(reply: WireReply) -> GatewayError | None:
    if 200 <= reply.status < 300:
        return None
    fields = replies.error_fields(reply)
    kind = replies.by_code(_V2_CODES, fields) or replies.by_status(reply.status, fields.message)
    return replies.make_error(kind, reply, fields.message)


_ADAPTERS = {
    "v1": Adapter(build_request, parse_error, openai.parse_response),
    "v2": Adapter(openai.request_builder("/embeddings", {}, "float"), parse_error_v2, openai.parse_response),
}


def adapter(settings: BaiduSettings) -> Adapter:
    return _ADAPTERS[settings.mode]


def credentials(settings: BaiduSettings, clock: Clock, tokens: TokenStore | None) -> Auth:
    if settings.mode == "v2":
        return auth.bearer(auth.keys(settings), parse_error_v2, clock)
    secret = settings.secret_key.get_secret_value() if settings.secret_key else ""
    if settings.auth == "iam":
        return BceSignature(settings.access_key.get_secret_value() if settings.access_key else "", secret, clock)
    key, server = auth.keys(settings)[0], settings.base_url + _TOKEN_PATH
    # The parameters go in the query although it is a POST; `query` keeps them out of any URL that we store.
    token_request = WireRequest(
        "POST",
        server,
        {"content-type": "application/json", "accept": "application/json"},
        query={
            "grant_type": "client_credentials",
            "client_id": key,
            "client_secret": secret,
        },
    )
    shared = SealedTokens(tokens, server, key, secret) if tokens else None
    return AccessToken(token_request, is_stale, clock, shared)


def unlisted_model(name: str) -> Model:
    """Neither API takes a number of dimensions."""
    if name == _DOCUMENTED_NAME:
        return replace(CATALOG["baidu"]["embedding-v1"], name=name, same_as="embedding-v1")
    return Model(name, max_batch=16)


KIND = UpstreamKind(
    name="baidu",
    settings=BaiduSettings,
    adapter=adapter,
    auth=credentials,
    unlisted_model=unlisted_model,
    vendor_variables=(
        VendorVariable("api_key", "BAIDU_API_KEY"),
        VendorVariable("secret_key", "BAIDU_SECRET_KEY"),
    ),
)
