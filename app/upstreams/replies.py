"""Reads error replies: bodies in their many shapes, Retry-After, statuses.

What the dialects have in common; knows no vendor's codes. Pure: messages are truncated here, and redacted by the code
that knows the secrets (`app.upstreams.redact`).
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
    UpstreamInvalidResponse,
    UpstreamInvalidVector,
    UpstreamMisconfigured,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from app.types import WireReply

MAX_MESSAGE_READ = 8192
"""Characters kept of an upstream's message. The redactor must see keys whole, and truncates further afterwards."""
MAX_ERROR_BODY = 2**20
"""Maximum bytes of an error body that is parsed. Only the beginning of a larger one is read: no vendor sends one, but
FastAPI may, which quotes the request."""
MAX_MODELS = 5_000
"""Models in a list, at most, for every dialect: nothing else is done while they are built, up to 0.3 ms each.
OpenRouter lists some hundreds."""

_DESCRIPTIONS: Mapping[type[GatewayError], str] = {
    InvalidRequest: "the upstream refused the input",
    ContextLengthExceeded: "an input is longer than the model takes",
    UnreadableMedia: "the upstream could not fetch or read an image or video",
    UnsupportedDimensions: "the model cannot give this many dimensions",
    RateLimited: "the upstream's rate limit is reached",
    QuotaExhausted: "the quota with the upstream is used up",
    UpstreamError: "the upstream failed",
    UpstreamAuth: "the upstream refused the gateway's credentials",
    UpstreamMisconfigured: "the upstream does not know the requested model, path or format",
    UpstreamInvalidVector: "the upstream computed a vector that holds NaN or infinity",
    UpstreamTimeout: "the upstream took too long",
    Overloaded: "the upstream has no room",
}
"""Our description of a class and its subclasses."""

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
    411: UpstreamMisconfigured,
    415: UpstreamMisconfigured,
    417: UpstreamMisconfigured,
    421: UpstreamMisconfigured,
    426: UpstreamMisconfigured,
    431: UpstreamMisconfigured,
    451: UpstreamMisconfigured,
    424: UpstreamError,  # TEI: the model's backend failed
    425: UpstreamError,
    429: RateLimited,
    499: UpstreamError,  # nginx, Ollama: it believes that we disconnected
    501: UpstreamMisconfigured,
    503: UpstreamUnavailable,
    504: UpstreamTimeout,
    524: UpstreamTimeout,  # Cloudflare: the origin did not answer in time
    529: UpstreamUnavailable,
}
# Redirects are never followed: they would send our key to wherever they point.
_STATUS_CLASSES: Mapping[int, type[GatewayError]] = {3: UpstreamMisconfigured, 4: InvalidRequest}

_DIMENSIONS = re.compile(r"\bdimensions?\b|matryoshka", re.IGNORECASE)
# Not "array too long", which means too many inputs.
_TOO_LONG = re.compile(
    r"context.?(length|size)|context window|input length|(?<!array )\btoo long|too large to process"
    r"|maximum.{0,30}\btokens|less than \d+ tokens|at most \d+ characters|max input (characters|tokens)"
    r"|\bmax tokens\b",
    re.IGNORECASE,
)
# llama-server's 500 for an input that is too long. A shorter pattern might match a quoted input.
_BATCH_TOO_LARGE = "is too large to process. increase the physical batch size"
# How OpenAI's 429 begins for a call with more tokens than a minute allows: waiting does not help but splitting does,
# unless the limit is zero.
_REQUEST_TOO_LARGE = "Request too large for "
_LIMIT_ZERO = "(TPM): Limit 0, "
# How 400s begin that concern the configuration and no input. The model's name: LiteLLM, infinity; Xinference,
# SiliconFlow, OpenRouter; OpenRouter, BigModel. A model that is not loaded or not for embeddings: LM Studio,
# llama-server. An address that should be https: nginx, Go. Only the beginning counts, because a message may quote the
# caller further on; at the beginning it does so in quotes, as in JSON Schema's "'…' is too short".
_MISCONFIGURED = re.compile(
    r"(/\S+: )?Invalid model( name passed in model=|: )"
    r"|(\[address=\S+ pid=\d+\] )?Model (\S+ )?(not found|does not exist)\b"
    r"|[\w./:@~-]+ is not a valid model ID|模型不存在"
    r"|No models loaded|model is not loaded|Pooling type 'none'"
    r"|\s*400 The plain HTTP request was sent to HTTPS port|Client sent an HTTP request to an HTTPS server"
)
# Exhausted credit that comes with the status of a rate limit or a bad key: BigModel, SiliconFlow; Gemini.
_USED_UP = re.compile(
    r"insufficient (account )?balance|balance is insufficient|余额不足|欠费"
    r"|credits are depleted|monthly spending cap",
    re.IGNORECASE,
)


_MESSAGE = re.compile(r'"(?:message|msg|error_msg|detail|error)"\s*:\s*"((?:[^"\\]|\\.)*+)"')
"""A message in truncated JSON."""


class ErrorFields(NamedTuple):
    """The fields of an error body; empty if missing."""

    code: str
    type: str
    message: str
    param: str = ""


def error_fields(reply: WireReply) -> ErrorFields:
    """Reads an error body: nested under `error`, flat, `error` or `detail` as text, in a list, or not JSON."""
    if len(reply.body) > MAX_ERROR_BODY:
        return ErrorFields("", "", "; ".join(_MESSAGE.findall(_start(reply.body))) or _strip_markup(reply.body))
    try:
        body = orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        return ErrorFields("", "", _strip_markup(reply.body))
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    if not isinstance(body, dict):
        return ErrorFields("", "", _text(body)[:MAX_MESSAGE_READ])
    nested = body.get("error")
    source = cast("dict[str, Any]", nested) if isinstance(nested, dict) else body
    fields = ("message", "msg", "error_msg", "error_description", "detail", "error", "errors")
    message = next((text for field in fields if (text := _text(source.get(field)))), "")
    code, kind, param = (_identifier(source.get(name)) for name in ("code", "type", "param"))
    return ErrorFields(code, kind, message[:MAX_MESSAGE_READ], param)


def make_error(kind: type[GatewayError], reply: WireReply, message: str = "") -> GatewayError:
    """An error of this class, with our description and the upstream's message."""
    description = next(_DESCRIPTIONS[each] for each in kind.__mro__ if each in _DESCRIPTIONS)
    detail = " ".join(message.split())[:MAX_MESSAGE_READ]
    text = f"{description}: {detail}" if detail else f"{description} (HTTP {reply.status})"
    param = "dimensions" if kind is UnsupportedDimensions else None
    return kind(text, param=param, retry_after=retry_after(reply.headers))


def upstream_message(error: GatewayError) -> str:
    """The upstream's message in an error from `make_error`, without our description; empty if there was none."""
    return error.message.partition(": ")[2]


def by_code(codes: Mapping[str, type[GatewayError]], fields: ErrorFields) -> type[GatewayError] | None:
    """The class that a vendor's table, in lower case, has for the code or else for the type."""
    return codes.get(fields.code.lower()) or codes.get(fields.type.lower())


def by_status(status: int, message: str) -> type[GatewayError]:
    """The class of an error with a status of 300 or more whose vendor's code says nothing more specific."""
    if status == 500 and _BATCH_TOO_LARGE in message:
        return ContextLengthExceeded
    if status == 429 and message.startswith(_REQUEST_TOO_LARGE):
        return QuotaExhausted if _LIMIT_ZERO in message else ExceedsTokensPerMinute
    kind = _STATUSES.get(status) or _STATUS_CLASSES.get(status // 100, UpstreamError)
    if kind in (RateLimited, UpstreamAuth) and _USED_UP.search(message):
        return QuotaExhausted
    if kind is InvalidRequest:
        return UpstreamMisconfigured if _MISCONFIGURED.match(message) else by_message(message)
    return kind


def by_message(message: str) -> type[InvalidRequest]:
    """The class of a 400 that is the caller's fault, by the upstream's message."""
    if _DIMENSIONS.search(message):
        return UnsupportedDimensions
    return ContextLengthExceeded if _TOO_LONG.search(message) else InvalidRequest


def may_mention_dimensions(text: str) -> bool:
    """Whether `by_message` may find a word about dimensions in it. For texts of any size, in which it would search for
    half a second per MiB."""
    folded = text.casefold()
    return "dimension" in folded or "matryoshka" in folded


def html_text(reply: WireReply) -> str:
    """The text of an HTML page that came in place of a reply; empty if it is not HTML."""
    return " ".join(_strip_markup(reply.body).split()) if _start(reply.body).lstrip().startswith("<") else ""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms` or `retry-after` (seconds, or a date: RFC 9110 10.2.3), or None.

    A date is compared with the reply's own `date`, so that no clock of ours is needed.
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
    """The first of the named counts that is present and not 0, which servers print for "not counted"."""
    if not isinstance(usage, dict):
        return None
    for name in names:
        count = usage.get(name)
        if type(count) is int and count > 0:
            return count
    return None


def check_count(rows: object) -> None:
    """Refuses a list of too many models before any is built."""
    if isinstance(rows, list) and len(rows) > MAX_MODELS:
        raise UpstreamInvalidResponse(f"the upstream lists {len(rows)} models, and at most {MAX_MODELS} can be served")


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float((text or "").partition(",")[0])  # lines are joined: a gateway may add its own to the upstream's
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def _identifier(value: object) -> str:
    """A code or type as text; vLLM's code is a number."""
    return str(value) if isinstance(value, str | int) else ""


def _text(value: object) -> str:
    """A message: text, an object that contains one (DeepInfra's `detail`), or a list of either (FastAPI, Cloudflare's
    `errors`)."""
    texts = map(_item_text, value[:5] if isinstance(value, list) else [value])
    return "; ".join(filter(None, texts))


def _item_text(value: object) -> str:
    if isinstance(value, dict):
        value = next((value[name] for name in ("msg", "message", "error") if name in value), "")
    return value if isinstance(value, str) else ""


def _strip_markup(body: bytes | bytearray) -> str:
    """The text of a body that is not JSON, without markup, so that what it quotes reads as it was sent."""
    return html.unescape(re.sub(r"(?is)<(script|style)\b.*?(</\1>|$)|<[^>]*>", " ", _start(body)))


def _start(body: bytes | bytearray) -> str:
    return body[:4096].decode("utf-8", "replace")
