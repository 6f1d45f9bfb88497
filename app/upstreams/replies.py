"""What an upstream says when it does not embed: error bodies in their many shapes, Retry-After, statuses.

Shared by the dialects for what they have in common; knows no vendor's codes. Pure: messages are cut to
size here and freed of secrets by whoever knows the secrets (`app.upstreams.redact`).
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, cast

import orjson

from app.errors import (
    ContextLengthExceeded,
    ExceedsTokensPerMinute,
    GatewayError,
    InvalidRequest,
    Overloaded,
    QuotaExhausted,
    RateLimited,
    UnreadableMedia,
    UnsupportedDimensions,
    UpstreamAuth,
    UpstreamError,
    UpstreamInvalidVector,
    UpstreamMisconfigured,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from app.types import WireReply

LONGEST = 8192
"""Characters of an upstream's own words that are looked at; the redactor, which must see a key whole, cuts further."""
LARGEST = 2**20
"""Bytes of an error body that are read. Of a larger one only the beginning is looked at: no vendor sends one, but
FastAPI may, which quotes what it was sent."""

_WORDS: Mapping[type[GatewayError], str] = {
    InvalidRequest: "the upstream refused the input",
    ContextLengthExceeded: "an input is longer than the model takes",
    UnreadableMedia: "the upstream could not fetch or read an image or video",
    UnsupportedDimensions: "the model cannot give this many dimensions",
    RateLimited: "the upstream's rate limit is reached",
    QuotaExhausted: "the quota with the upstream is used up",
    UpstreamError: "the upstream failed",
    UpstreamAuth: "the upstream refused the gateway's credentials",
    UpstreamMisconfigured: "the upstream does not know the model, path or form it was asked for",
    UpstreamInvalidVector: "the upstream computed a vector that holds NaN or infinity",
    UpstreamTimeout: "the upstream took too long",
    Overloaded: "the upstream has no room",
}
"""Our words for a class and those derived from it."""

_STATUSES: Mapping[int, type[GatewayError]] = {
    401: UpstreamAuth,
    402: QuotaExhausted,
    403: UpstreamAuth,
    404: UpstreamMisconfigured,
    405: UpstreamMisconfigured,
    406: UpstreamMisconfigured,
    407: UpstreamAuth,
    408: UpstreamTimeout,
    409: UpstreamError,
    410: UpstreamMisconfigured,
    415: UpstreamMisconfigured,
    424: UpstreamError,  # TEI: the model's backend failed
    425: UpstreamError,
    429: RateLimited,
    499: UpstreamError,  # nginx, Ollama: the upstream took us for gone
    501: UpstreamMisconfigured,
    503: UpstreamUnavailable,
    504: UpstreamTimeout,
    524: UpstreamTimeout,  # Cloudflare: the origin did not answer in time
    529: UpstreamUnavailable,
}
# A redirect is never followed: it would carry our key to wherever it points.
_CLASSES: Mapping[int, type[GatewayError]] = {3: UpstreamMisconfigured, 4: InvalidRequest}

_DIMENSIONS = re.compile(r"\bdimensions?\b|matryoshka", re.IGNORECASE)
# Not "array too long": that is too many inputs.
_TOO_LONG = re.compile(
    r"context.?(length|size)|context window|input length|(?<!array )\btoo long|too large to process"
    r"|maximum.{0,30}\btokens|less than \d+ tokens|at most \d+ characters|max input (characters|tokens)"
    r"|\bmax tokens\b",
    re.IGNORECASE,
)
# How llama-server's 500 tells of an input that is too long; fewer words may be those of a text that is quoted.
_TOO_LARGE = "is too large to process. increase the physical batch size"
# How OpenAI's 429 begins for a call that has more tokens than a minute may: to wait does not help, to split does,
# unless a minute may have none.
_MORE_THAN_A_MINUTE = "Request too large for "
_NONE = "(TPM): Limit 0, "
# How 400s begin that are about what is configured, and about no input. A model's name: LiteLLM, infinity; Xinference,
# SiliconFlow, OpenRouter; OpenRouter, BigModel. A model that is none of embeddings, or not loaded: LM Studio,
# llama-server. An address that should be https: nginx, Go. What a caller sent may stand further on, and within quotes
# at the beginning, as in JSON Schema's "'…' is too short".
_NOT_THE_INPUT = re.compile(
    r"(/\S+: )?Invalid model( name passed in model=|: )"
    r"|(\[address=\S+ pid=\d+\] )?Model (\S+ )?(not found|does not exist)\b"
    r"|[\w./:@~-]+ is not a valid model ID|模型不存在"
    r"|No models loaded|model is not loaded|Pooling type 'none'"
    r"|\s*400 The plain HTTP request was sent to HTTPS port|Client sent an HTTP request to an HTTPS server"
)
# What is said of money that is used up with the status of a rate or of a key: BigModel, SiliconFlow; Gemini.
_USED_UP = re.compile(
    r"insufficient (account )?balance|balance is insufficient|余额不足|欠费"
    r"|credits are depleted|monthly spending cap",
    re.IGNORECASE,
)


_SAYS = re.compile(r'"(?:message|msg|error_msg|detail|error)"\s*:\s*"((?:[^"\\]|\\.)*+)"')
"""A message, in JSON that is not read to its end."""


class ErrorFields(NamedTuple):
    """An error body's own words; each is empty where there is none."""

    code: str
    type: str
    message: str
    param: str = ""


def error_fields(reply: WireReply) -> ErrorFields:
    """Reads an error body: nested under `error`, flat, `error` or `detail` as text, in a list, or no JSON."""
    if len(reply.body) > LARGEST:
        return ErrorFields("", "", "; ".join(_SAYS.findall(_beginning(reply.body))) or _plain(reply.body))
    try:
        body = orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        return ErrorFields("", "", _plain(reply.body))
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    if not isinstance(body, dict):
        return ErrorFields("", "", _text(body)[:LONGEST])
    inner = body.get("error")
    source = cast("dict[str, Any]", inner) if isinstance(inner, dict) else body
    fields = ("message", "msg", "error_msg", "error_description", "detail", "error", "errors")
    message = next((text for field in fields if (text := _text(source.get(field)))), "")
    code, kind, param = (_word(source.get(name)) for name in ("code", "type", "param"))
    return ErrorFields(code, kind, message[:LONGEST], param)


def make_error(kind: type[GatewayError], reply: WireReply, message: str = "") -> GatewayError:
    """An error of this class, in our words and the upstream's."""
    ours = next(_WORDS[each] for each in kind.__mro__ if each in _WORDS)
    words = " ".join(message.split())[:LONGEST]
    text = f"{ours}: {words}" if words else f"{ours} (HTTP {reply.status})"
    param = "dimensions" if kind is UnsupportedDimensions else None
    return kind(text, param=param, retry_after=retry_after(reply.headers))


def upstream_message(error: GatewayError) -> str:
    """The upstream's words in an error that `make_error` made, without ours before them; empty if it had none."""
    return error.message.partition(": ")[2]


def by_status(status: int, message: str) -> type[GatewayError]:
    """What a status of 300 or more means where the vendor's code does not say it better."""
    if status == 500 and _TOO_LARGE in message:
        return ContextLengthExceeded
    if status == 429 and message.startswith(_MORE_THAN_A_MINUTE):
        return QuotaExhausted if _NONE in message else ExceedsTokensPerMinute
    kind = _STATUSES.get(status) or _CLASSES.get(status // 100, UpstreamError)
    if kind in (RateLimited, UpstreamAuth) and _USED_UP.search(message):
        return QuotaExhausted
    if kind is InvalidRequest:
        return UpstreamMisconfigured if _NOT_THE_INPUT.match(message) else by_message(message)
    return kind


def by_message(message: str) -> type[InvalidRequest]:
    """Which fault of the caller's an upstream's 400 is about, by its words."""
    if _DIMENSIONS.search(message):
        return UnsupportedDimensions
    return ContextLengthExceeded if _TOO_LONG.search(message) else InvalidRequest


def html_text(reply: WireReply) -> str:
    """The words of a page (HTML) that came in place of a reply; empty for what is no page."""
    return " ".join(_plain(reply.body).split()) if _beginning(reply.body).lstrip().startswith("<") else ""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms` or `retry-after` (seconds, or a date: RFC 9110 10.2.3), or None.

    A date is read against the reply's own `date`, so that no clock of ours is needed.
    """
    milliseconds = _seconds(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _seconds(text)
    if seconds is not None or not text:
        return seconds
    try:
        then, now = parsedate_to_datetime(text), parsedate_to_datetime(headers["date"])
        return max(0.0, (then - now).total_seconds())
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def billed_tokens(usage: object, *names: str) -> int | None:
    """The first of these counts that is stated. Zero is no bill: servers print it for "not counted"."""
    if not isinstance(usage, dict):
        return None
    for name in names:
        count = usage.get(name)
        if type(count) is int and count > 0:
            return count
    return None


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def _word(value: object) -> str:
    """A code or type; vLLM prints its code as a number."""
    return str(value) if isinstance(value, str | int) else ""


def _text(value: object) -> str:
    """A message: text, an object that has one (DeepInfra's `detail`), or a list of these (FastAPI's, Cloudflare's
    `errors`)."""
    texts = map(_one_text, value[:5] if isinstance(value, list) else [value])
    return "; ".join(filter(None, texts))


def _one_text(value: object) -> str:
    if isinstance(value, dict):
        value = next((value[name] for name in ("msg", "message", "error") if name in value), "")
    return value if isinstance(value, str) else ""


def _plain(body: bytes | bytearray) -> str:
    """What a page that is no JSON says, without its markup: a text that it quotes is then as it was sent."""
    return html.unescape(re.sub(r"(?is)<(script|style)\b.*?(</\1>|$)|<[^>]*>", " ", _beginning(body)))


def _beginning(body: bytes | bytearray) -> str:
    return body[:4096].decode("utf-8", "replace")
