"""What an Ollama server says of the models that have been pulled, and what is assumed of others.

Knows neither how they embed nor how the server words its errors. Facts: ollama/ollama v0.33.0-rc2, server/routes.go
and api/types.go.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import orjson

from app.catalog import ANY, Model, family
from app.errors import GatewayError, UpstreamError, UpstreamInvalidResponse, UpstreamMisconfigured
from app.types import Send, WireRequest
from app.upstreams import replies, wire
from app.upstreams.auth import ParseError

_Ask: TypeAlias = Callable[[WireRequest], Awaitable[dict[str, Any]]]
"""One exchange; the reply's JSON. Raises `GatewayError`."""

MAX_BATCH = 16
"""The server has no limit, but one bad input fails the whole call, and a batch is no faster than its inputs one by
one."""


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


async def pulled(send: Send, parse_error: ParseError, base_url: str, *, truncates: bool) -> list[Model]:
    """The pulled models that can embed; those tagged `latest` also under their name without the tag. `truncates`: long
    inputs are cut, hence never too long. Raises `GatewayError`."""
    ask = partial(_ask, send, parse_error)
    try:
        tags = await ask(wire.get(base_url + "/api/tags"))
    except UpstreamMisconfigured as error:
        # The upstream's message comes last: the redactor detects a key that was cut off only at the end.
        raise UpstreamMisconfigured(f"(its base_url does not end in /api or /v1) {error.message}") from error
    replies.check_count(tags.get("models"))
    found: list[Model] = []
    unreadable: UpstreamError | None = None
    for tag in _dicts(tags.get("models")):
        name = str(tag.get("name") or tag.get("model") or "")
        try:
            metadata = await _metadata(ask, base_url, name, tag)
        except UpstreamMisconfigured:  # removed meanwhile, or the server has no such route
            continue
        except UpstreamError as error:
            if type(error) is not UpstreamError:
                raise
            unreadable = error  # an unreadable file costs that model only
            continue
        if name and _embeds(metadata):
            digest = str(tag.get("digest") or "").removeprefix("sha256:")[:12]
            found += _models(name, metadata, digest, truncates=truncates)
    if unreadable and not found:
        raise unreadable
    return found


async def _metadata(ask: _Ask, base_url: str, name: str, tag: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's entry in the list if it is complete, else what an older server reports per model. Raises if that fails
    and the entry gives no dimensions."""
    dimensions, longest = _model_length(tag, "embedding"), _model_length(tag, "context")
    if _embeds(tag) is False or (_embeds(tag) and None not in (dimensions, longest)):
        return tag
    try:
        return await ask(wire.post(base_url + "/api/show", {"model": name}))
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


async def _ask(send: Send, parse_error: ParseError, request: WireRequest) -> dict[str, Any]:
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
