"""Ollama's own API, `/api/embed`: unlike its OpenAI-style route, it can refuse long texts instead of cutting them.

Does not know where a server is, only how to read `OLLAMA_HOST`. Facts: ollama/ollama v0.33.0-rc2,
server/routes.go, api/types.go and envconfig.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator

from app import vectors
from app.catalog import Model
from app.config import UpstreamKind, UpstreamSettings, VendorVariable
from app.config.values import DURATIONS, Count, parse_duration
from app.errors import (
    ContextLengthExceeded,
    GatewayError,
    UpstreamError,
    UpstreamInvalidVector,
    UpstreamMisconfigured,
)
from app.types import Adapter, Batch, Parsed, Send, Target, WireReply, WireRequest
from app.upstreams import auth, json_vectors, ollama_models, replies, wire

PORT = 11434


def parse_keep_alive(value: str | int) -> str | int:
    """As Ollama reads it: seconds, with a negative number meaning forever, or a Go duration, which has no days and
    always a unit."""
    if isinstance(value, int):
        return value
    if re.fullmatch(r"-?[0-9]{1,10}", value):  # from the environment, where all values are text
        return int(value)
    if re.fullmatch(r"-?([0-9]+(\.[0-9]+)?(ms|s|m|h))+", value):
        return value
    if value.endswith("d"):
        return int(parse_duration(value))
    raise ValueError(f"must be a duration: {DURATIONS}; -1 is for ever")


class OllamaSettings(UpstreamSettings):
    type: Literal["ollama"] = "ollama"
    base_url: str = f"http://localhost:{PORT}"
    max_concurrency: Count = 2
    keep_alive: Annotated[str | int, AfterValidator(parse_keep_alive)] | None = None
    truncate: bool = False
    """Ollama's own default is true, which cuts long texts silently."""


def build_request(settings: OllamaSettings, batch: Batch, target: Target) -> WireRequest:
    body: dict[str, object] = {
        "model": target.model.name,
        "input": batch.inputs,
        "truncate": settings.truncate,
    }
    if batch.params.dimensions is not None:
        body["dimensions"] = batch.params.dimensions
    if settings.keep_alive is not None:
        body["keep_alive"] = settings.keep_alive
    return wire.post(target.base_url + "/api/embed", body)


# Any failure after scheduling is a 400, so the message decides; the first match counts.
_MESSAGES: Sequence[tuple[re.Pattern[str], type[GatewayError]]] = (
    (re.compile(r"\bNaN\b|\bInf\b"), UpstreamInvalidVector),
    (re.compile(r"context length|too large to process"), ContextLengthExceeded),
    (re.compile(r"model .*not found|invalid model name|model is required"), UpstreamMisconfigured),
    # Only the gateway can have caused these: a retry would not help.
    (re.compile(r"invalid input type|unmarshal|request body|invalid character"), UpstreamMisconfigured),
)


def parse_error(reply: WireReply) -> GatewayError | None:
    if 200 <= reply.status < 300:
        return None
    message = replies.error_fields(reply).message
    kind = next((kind for pattern, kind in _MESSAGES if pattern.search(message)), None)
    if kind is None:
        # A 400 that matches none of these is a crashed runner, never the caller's fault.
        kind = UpstreamError if reply.status == 400 else replies.by_status(reply.status, message)
    return replies.make_error(kind, reply, message)


def parse_response(reply: WireReply, batch: Batch) -> Parsed:
    """No indexes: vectors come in input order. The server omits a count of 0."""
    body = json_vectors.load(reply.body, len(batch.inputs))
    found = vectors.parse(body["embeddings"])
    return Parsed(range(len(found)), found, replies.billed_tokens(body, "prompt_eval_count"))


def adapter(settings: OllamaSettings) -> Adapter:
    return Adapter(partial(build_request, settings), parse_error, parse_response)


async def discover(settings: OllamaSettings, send: Send) -> Sequence[Model]:
    return await ollama_models.pulled(send, parse_error, settings.base_url, truncates=settings.truncate)


def _base_url(text: str) -> str:
    """`OLLAMA_HOST` as Ollama reads it: scheme, host, port and path may each be missing. Empty if it is.

    A server's "listen everywhere" is no address to connect to and becomes loopback.
    """
    host = text.strip().strip("\"'")
    if not host:
        return ""
    scheme, separator, rest = host.rpartition("://")
    default = {"http": 80, "https": 443}.get(scheme, PORT) if separator else PORT
    if re.fullmatch(r"[0-9a-fA-F]*:[0-9a-fA-F]*:[0-9a-fA-F:]*", rest):  # IPv6 without brackets
        rest = f"[{rest}]"
    try:
        url = urlsplit(f"{scheme or 'http'}://{rest}")
    except ValueError:
        return host  # not an address: the settings report it readably
    try:
        port = url.port or default
    except ValueError:
        port = default
    name = {None: "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(url.hostname, url.hostname) or ""  # noqa: S104
    return f"{url.scheme}://{f'[{name}]' if ':' in name else name}:{port}{url.path.rstrip('/')}"


KIND = UpstreamKind(
    name="ollama",
    settings=OllamaSettings,
    adapter=adapter,
    auth=auth.by_bearer(parse_error),  # the server needs no key, but a proxy in front of it may
    unlisted_model=ollama_models.unlisted_model,
    discover=discover,
    vendor_variables=(VendorVariable("base_url", "OLLAMA_HOST", read=_base_url),),
    default_address=("127.0.0.1", PORT),
)
