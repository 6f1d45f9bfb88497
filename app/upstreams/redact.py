"""Removes secrets from upstreams' messages before anyone reads them, and detects callers' texts that they quote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote, unquote_plus

from app.types import Batch, Input

_SHAPES = re.compile(
    r"(?i)\b(bearer\s+|authorization[\"']?\s*[=:]\s*[\"']?basic\s+)[^\s\"',;]+"
    r"|((?:access_token|refresh_token|client_id|client_secret|api[-_]?key|secret[-_]?key|token|password)"
    r"[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+"
    r"|\bsk-[\w*-]{6,}"
    r"|\b2[45]\.[0-9a-f]{32}\.[\w.-]+"  # an OAuth token in Baidu's format
    r"|\bbce-auth-v1/[^\s\"',]+"  # a signature, valid for half an hour
    r"|\b(https?://)[^\s\"']+"
)


_MIN_SECRET = 4
"""Minimum characters of a secret. A shorter one is a placeholder for servers that need no key, and occurs within
ordinary words and numbers: redacting it would spoil the limits that are read from a message."""
_MIN_PREFIX = 8
"""Minimum characters of an incomplete secret that count as its beginning."""
MAX_MESSAGE = 400
"""Maximum characters of a redacted message. It is cut after redacting: half a key is a secret too."""


class Redactor:
    """Replaces the given secrets, the beginning of one at the end of the text, anything shaped like a secret, and URLs
    with `***`; then truncates."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # Plain and percent-encoded. Longest first: one secret may be part of another.
        forms = {form for secret in secrets for form in (secret, quote(secret, safe="")) if len(form) >= _MIN_SECRET}
        self._secrets = sorted(forms, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        for secret in self._secrets:  # whose end may be missing if the message was cut
            ends = (n for n in range(len(secret) - 1, _MIN_PREFIX - 1, -1) if text.endswith(secret[:n]))
            if half := next(ends, 0):
                text = text[:-half] + "***"
        redacted = _SHAPES.sub(lambda match: (match[1] or match[2] or match[3] or "") + "***", text)
        return redacted if len(redacted) <= MAX_MESSAGE else redacted[: MAX_MESSAGE - 1] + "…"


_MIN_QUOTE = 8
"""Characters that identify a text by its beginning, with white space collapsed. Fewer bytes than this are a mere word,
which upstreams use themselves."""
_RUN, _STEP = 20, 12
"""Bytes, case and white space aside, that identify a text wherever they are in it: of what upstreams say, hardly any 20
bytes also occur in a megabyte of prose, but many 16 do. A run is looked for at every 12th byte of a text, so every
quotation of 31 bytes is found."""
_MIN_WHOLE = 12
"""Likewise for a text that is shorter than a run and quoted whole."""
_MAX_SEARCHED = 2**18
"""Characters of all texts that are searched for runs, divided among them: some 50 ms."""


def quotable(batch: Batch) -> Sequence[Input]:
    """Callers' texts in a call, which an upstream's message may quote: the inputs, and the instruction if there is
    one."""
    instruct = batch.params.instruct
    return batch.inputs if instruct is None else [*batch.inputs, instruct]


def quotes_input(message: str, inputs: Sequence[Input]) -> bool:
    """Whether an upstream's message quotes one of the inputs: its beginning, plain or JSON-escaped, or any part of it,
    also in other case or spacing; each also percent-encoded. White space in the message must be collapsed already."""
    texts = [each for each in inputs if type(each) is str]
    if not message or not texts:
        return False
    decoded = unquote_plus(message)
    if decoded != message:
        message = f"{message}\0{decoded}"  # both at once: going through the texts is what takes time
    return _has_beginning(message, texts) or _has_run(_squeezed(message), texts)


def _has_beginning(message: str, texts: Iterable[str]) -> bool:
    for text in texts:
        start = text[:64].lstrip()
        forms = {start, json.dumps(start)[1:-1], json.dumps(start, ensure_ascii=False)[1:-1]}
        beginnings = {" ".join(form.split())[:_MIN_QUOTE] for form in forms}
        if any(len(beginning.encode()) >= _MIN_QUOTE and beginning in message for beginning in beginnings):
            return True
    return False


def _has_run(message: bytes, texts: Sequence[str]) -> bool:
    runs = {message[i : i + _RUN] for i in range(len(message) - _RUN + 1)}
    for text in texts if len(message) >= _MIN_WHOLE else ():
        searched = _squeezed(text[: _MAX_SEARCHED // len(texts)])
        if len(searched) < _RUN:
            if len(searched) >= _MIN_WHOLE and searched in message:
                return True
        elif not runs.isdisjoint(searched[i : i + _RUN] for i in range(0, len(searched) - _RUN + 1, _STEP)):
            return True
    return False


def _squeezed(text: str) -> bytes:
    """The text without case and white space: models that know neither quote it so."""
    return "".join(text.casefold().split()).encode(errors="replace")
