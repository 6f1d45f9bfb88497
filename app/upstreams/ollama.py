"""Ollama's own API, `/api/embed`: what its OpenAI-style route lacks is not silently cutting long texts.

Must not know where a server is: only how `OLLAMA_HOST` says it. Facts: ollama/ollama v0.33.0-rc2,
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
from app.clock import Clock
from app.config import UpstreamKind, UpstreamSettings
from app.config.values import DURATIONS, Count, parse_duration
from app.errors import (
    ContextLengthExceeded,
    GatewayError,
    UpstreamError,
    UpstreamInvalidResponse,
    UpstreamInvalidVector,
    UpstreamMisconfigured,
)
from app.types import Adapter, Auth, Batch, Parsed, Send, Target, TokenStore, WireReply, WireRequest
from app.upstreams import auth, json_vectors, openai, replies

PORT = 11434
MAX_BATCH = 16
"""It has no limit, but one input that fails fails its call, and a batch is no faster than its inputs."""


def stay_text(value: str | int) -> str | int:
    """As Ollama reads it: seconds, below 0 for ever, or a duration of Go's, which has no days and always a unit."""
    if isinstance(value, int):
        return value
    if re.fullmatch(r"-?[0-9]{1,10}", value):  # from the environment, where everything is text
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
    keep_alive: Annotated[str | int, AfterValidator(stay_text)] | None = None
    truncate: bool = False
    """Ollama's own default is true: a long text is cut and nobody is told."""


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
    return openai.post(target.base_url + "/api/embed", body)


# Any failure after scheduling is a 400, so the text decides. In this order: the first that matches.
_TEXTS: Sequence[tuple[re.Pattern[str], type[GatewayError]]] = (
    (re.compile(r"\bNaN\b|\bInf\b"), UpstreamInvalidVector),
    (re.compile(r"context length|too large to process"), ContextLengthExceeded),
    (re.compile(r"model .*not found|invalid model name|model is required"), UpstreamMisconfigured),
    # What only we can be to blame for: asking again would not help.
    (re.compile(r"invalid input type|unmarshal|request body|invalid character"), UpstreamMisconfigured),
)


def parse_error(reply: WireReply) -> GatewayError | None:
    if 200 <= reply.status < 300:
        return None
    message = replies.error_fields(reply).message
    kind = next((kind for pattern, kind in _TEXTS if pattern.search(message)), None)
    if kind is None:
        # A 400 that none of these texts explains is a runner that crashed, never the caller's fault.
        kind = UpstreamError if reply.status == 400 else replies.by_status(reply.status, message)
    return replies.make_error(kind, reply, message)


def parse_response(reply: WireReply, _batch: Batch) -> Parsed:
    """No index: vectors come in the order of the inputs. A count of 0 is left out by the server."""
    body = json_vectors.load(reply.body)
    found = vectors.parse(body["embeddings"])
    return Parsed(range(len(found)), found, replies.billed_tokens(body, "prompt_eval_count"))


def adapter(settings: OllamaSettings) -> Adapter:
    return Adapter(partial(build_request, settings), parse_error, parse_response)


def credentials(settings: OllamaSettings, clock: Clock, _tokens: TokenStore | None = None) -> Auth:
    """A server asks for no key; a proxy before one may."""
    return auth.bearer(auth.keys(settings), parse_error, clock)


def models(_settings: OllamaSettings) -> Mapping[str, Model]:
    """None beforehand: they are what has been pulled."""
    return {}


def unlisted_model(name: str) -> Model:
    known = family(name) or Model(name)
    return replace(
        known,
        name=name,
        same_as=name.removesuffix(":latest"),  # what no tag means
        # How long an input may be is the server's to say, and shorter vectors it makes itself, of any model.
        dimension_choices=ANY,
        matryoshka_dimensions=None,
        max_batch=MAX_BATCH,
        max_tokens_per_input=None,
    )


async def discover(settings: OllamaSettings, send: Send) -> Sequence[Model]:
    """The pulled models that can embed; one tagged `latest` also under its name without the tag."""
    base_url = settings.base_url.rstrip("/")
    try:
        tags = await _ask(send, WireRequest("GET", base_url + "/api/tags", {"accept": "application/json"}))
    except UpstreamMisconfigured as error:
        # Its own words last: half a key, where they are cut, is known by being there.
        raise UpstreamMisconfigured(f"(its base_url has no /api or /v1 at its end) {error.message}") from error
    found: list[Model] = []
    unread: UpstreamError | None = None
    for tag in _objects(tags.get("models")):
        name = str(tag.get("name") or tag.get("model") or "")
        try:
            told = await _told(send, base_url, name, tag)
        except UpstreamMisconfigured:  # removed since, or it has no such route
            continue
        except UpstreamError as error:
            if type(error) is not UpstreamError:
                raise
            unread = error  # a file that it cannot read costs that model, and none of the others
            continue
        if name and _embeds(told):
            digest = str(tag.get("digest") or "").removeprefix("sha256:")[:12]
            found += _models(name, told, digest, matryoshka_dimensions=settings.truncate)
    if unread and not found:
        raise unread
    return found


async def _told(send: Send, base_url: str, name: str, tag: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of a model: its entry in the list, or what an older server tells model by model. Raises what
    keeps that from us where the list is not enough."""
    dimensions, longest = _length(tag, "embedding"), _length(tag, "context")
    if _embeds(tag) is False or (_embeds(tag) and None not in (dimensions, longest)):
        return tag
    try:
        return await _ask(send, openai.post(base_url + "/api/show", {"model": name}))
    except GatewayError:
        if dimensions is None:
            raise
        return tag


def _models(name: str, told: Mapping[str, Any], digest: str, *, matryoshka_dimensions: bool) -> list[Model]:
    """What the server tells, and beside it what is known of the model."""
    longest = None if matryoshka_dimensions else _length(told, "context")
    return [
        replace(
            known := unlisted_model(each),
            dimensions=_length(told, "embedding"),
            max_tokens_per_input=longest,
            revision=digest,
            source=", ".join(filter(None, ("the server's list", known.source))),
        )
        for each in dict.fromkeys((name, name.removesuffix(":latest")))
    ]


def _embeds(told: Mapping[str, Any]) -> bool | None:
    """Whether a model is for embedding: by its capabilities or its layers; None where neither is told."""
    capabilities = told.get("capabilities")
    if isinstance(capabilities, list):
        return "embedding" in capabilities
    info = told.get("model_info")
    if not isinstance(info, dict):
        return None
    pools = any(str(key).endswith(".pooling_type") for key in info)
    return pools or "bert" in str(info.get("general.architecture"))


def _length(told: Mapping[str, Any], what: str) -> int | None:
    """`embedding` or `context` length: among a tag's `details`, or in a model's `model_info`."""
    for part in ("details", "model_info"):
        facts = told.get(part)
        for key, value in facts.items() if isinstance(facts, dict) else ():
            if f".{key}".endswith(f".{what}_length") and type(value) is int and value > 0:
                return value
    return None


async def _ask(send: Send, request: WireRequest) -> dict[str, Any]:
    reply = await send(request)
    error = parse_error(reply)
    if error is not None:
        raise error
    try:
        return dict(orjson.loads(reply.body))
    except (TypeError, ValueError) as fault:
        raise UpstreamInvalidResponse("the upstream's list of models is none") from fault


def _objects(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def environment(environ: Mapping[str, str]) -> dict[str, Any] | None:
    host = environ.get("OLLAMA_HOST", "").strip().strip("\"'")
    return {"type": "ollama", "base_url": _base_url(host)} if host else None


def _base_url(host: str) -> str:
    """`OLLAMA_HOST` as Ollama reads it: scheme, host, port and path may each be missing.

    The server's own "listen everywhere" is no address to connect to; from here that is loopback.
    """
    scheme, separator, rest = host.rpartition("://")
    default = {"http": 80, "https": 443}.get(scheme, PORT) if separator else PORT
    if re.fullmatch(r"[0-9a-fA-F]*:[0-9a-fA-F]*:[0-9a-fA-F:]*", rest):  # IPv6 without its brackets
        rest = f"[{rest}]"
    try:
        url = urlsplit(f"{scheme or 'http'}://{rest}")
    except ValueError:
        return host  # no address; the settings say so, readably
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
    auth=credentials,
    models=models,
    unlisted_model=unlisted_model,
    discover=discover,
    environment=environment,
    switched_on_by="OLLAMA_HOST",
    default_address=("127.0.0.1", PORT),
)
