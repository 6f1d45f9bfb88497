"""Ollama's own API, `/api/embed`: unlike its OpenAI-style route, it can refuse long texts instead of cutting them.

Does not know where a server is, only how to read `OLLAMA_HOST`. Facts: ollama/ollama v0.33.0-rc2,
server/routes.go, api/types.go and envconfig.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import orjson
from pydantic import AfterValidator

from app import vectors
from app.catalog import ANY, Model, family
from app.config import UpstreamKind, UpstreamSettings, VendorVariable
from app.config.values import DURATIONS, Count, parse_duration
from app.errors import (
    ContextLengthExceeded,
    GatewayError,
    UpstreamError,
    UpstreamInvalidResponse,
    UpstreamInvalidVector,
    UpstreamMisconfigured,
)
from app.types import Adapter, Batch, Parsed, Send, Target, WireReply, WireRequest
from app.upstreams import auth, json_vectors, replies, wire

PORT = 11434
MAX_BATCH = 16
"""The server has no limit, but one bad input fails the whole call, and a batch is no faster than its inputs one by
one."""


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


def parse_response(reply: WireReply, _batch: Batch) -> Parsed:
    """No indexes: vectors come in input order. The server omits a count of 0."""
    body = json_vectors.load(reply.body)
    found = vectors.parse(body["embeddings"])
    return Parsed(range(len(found)), found, replies.billed_tokens(body, "prompt_eval_count"))


def adapter(settings: OllamaSettings) -> Adapter:
    return Adapter(partial(build_request, settings), parse_error, parse_response)


def unlisted_model(name: str) -> Model:
    known = family(name) or Model(name)
    return replace(
        known,
        name=name,
        same_as=name.removesuffix(":latest"),  # what a name without a tag means
        # The server says how long an input may be, and shortens any model's vectors itself.
        dimension_choices=ANY,
        matryoshka_dimensions=None,
        max_batch=MAX_BATCH,
        max_tokens_per_input=None,
    )


async def discover(settings: OllamaSettings, send: Send) -> Sequence[Model]:
    """The pulled models that can embed; those tagged `latest` also under their name without the tag."""
    try:
        tags = await _request_json(send, wire.get(settings.base_url + "/api/tags"))
    except UpstreamMisconfigured as error:
        # The upstream's message comes last: the redactor detects a key that was cut off only at the end.
        raise UpstreamMisconfigured(f"(its base_url does not end in /api or /v1) {error.message}") from error
    found: list[Model] = []
    unreadable: UpstreamError | None = None
    for tag in _dicts(tags.get("models")):
        name = str(tag.get("name") or tag.get("model") or "")
        try:
            metadata = await _metadata(send, settings.base_url, name, tag)
        except UpstreamMisconfigured:  # removed meanwhile, or the server has no such route
            continue
        except UpstreamError as error:
            if type(error) is not UpstreamError:
                raise
            unreadable = error  # an unreadable file costs that model only
            continue
        if name and _embeds(metadata):
            digest = str(tag.get("digest") or "").removeprefix("sha256:")[:12]
            found += _models(name, metadata, digest, truncates=settings.truncate)
    if unreadable and not found:
        raise unreadable
    return found


async def _metadata(send: Send, base_url: str, name: str, tag: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's entry in the list if it is complete, else what an older server reports per model. Raises if that fails
    and the entry gives no dimensions."""
    dimensions, longest = _model_length(tag, "embedding"), _model_length(tag, "context")
    if _embeds(tag) is False or (_embeds(tag) and None not in (dimensions, longest)):
        return tag
    try:
        return await _request_json(send, wire.post(base_url + "/api/show", {"model": name}))
    except GatewayError:
        if dimensions is None:
            raise
        return tag


def _models(name: str, metadata: Mapping[str, Any], digest: str, *, truncates: bool) -> list[Model]:
    """The server's facts, completed from the catalogue."""
    longest = None if truncates else _model_length(metadata, "context")
    return [
        replace(
            known := unlisted_model(each),
            dimensions=_model_length(metadata, "embedding"),
            max_tokens_per_input=longest,
            revision=digest,
            source=", ".join(filter(None, ("the server's list", known.source))),
        )
        for each in dict.fromkeys((name, name.removesuffix(":latest")))
    ]


def _embeds(metadata: Mapping[str, Any]) -> bool | None:
    """Whether a model embeds, by its capabilities or its layers; None if the server states neither."""
    capabilities = metadata.get("capabilities")
    if isinstance(capabilities, list):
        return "embedding" in capabilities
    info = metadata.get("model_info")
    if not isinstance(info, dict):
        return None
    pools = any(str(key).endswith(".pooling_type") for key in info)
    return pools or "bert" in str(info.get("general.architecture"))


def _model_length(metadata: Mapping[str, Any], kind: str) -> int | None:
    """The `embedding` or `context` length, from a tag's `details` or a model's `model_info`."""
    for part in ("details", "model_info"):
        facts = metadata.get(part)
        for key, value in facts.items() if isinstance(facts, dict) else ():
            if f".{key}".endswith(f".{kind}_length") and type(value) is int and value > 0:
                return value
    return None


async def _request_json(send: Send, request: WireRequest) -> dict[str, Any]:
    reply = await send(request)
    error = parse_error(reply)
    if error is not None:
        raise error
    try:
        return dict(orjson.loads(reply.body))
    except (TypeError, ValueError) as fault:
        raise UpstreamInvalidResponse("the upstream's list of models cannot be read") from fault


def _dicts(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


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
    unlisted_model=unlisted_model,
    discover=discover,
    vendor_variables=(VendorVariable("base_url", "OLLAMA_HOST", read=_base_url),),
    default_address=("127.0.0.1", PORT),
)
