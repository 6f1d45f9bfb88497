"""Takes secrets out of what upstreams say, before anybody reads it, and finds the texts that they quote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from urllib.parse import quote

from app.types import Input

_SHAPES = re.compile(
    r"(?i)\b(bearer\s+|authorization[\"']?\s*[=:]\s*[\"']?basic\s+)[^\s\"',;]+"
    r"|((?:access_token|refresh_token|client_id|client_secret|api[-_]?key|secret[-_]?key|token|password)"
    r"[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+"
    r"|\bsk-[\w*-]{6,}"
    r"|\b2[45]\.[0-9a-f]{32}\.[\w.-]+"  # an OAuth token, as its server writes it
    r"|\bbce-auth-v1/[^\s\"',]+"  # a signature, good for half an hour
    r"|\b(https?://)[^\s\"']+"
)


_LEAST = 4
"""Characters of a secret. What has fewer stands in for a key where a server wants none, and is in many a word: limits
that an upstream states would be read from what is left of its own words."""
_HALF = 8
"""Characters of a secret that are taken for its beginning, where it is not whole."""
LONGEST = 400
"""Characters of a message that go on. Cut after redacting: half a key is a secret too."""


class Redactor:
    """Replaces the secrets it was told of, the first half of one at the end, anything shaped like one, and URLs, by
    `***`; and cuts to size."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # As they are, and as they stand in a URL. The longest first: one secret may be a part of another.
        forms = {form for secret in secrets for form in (secret, quote(secret, safe="")) if len(form) >= _LEAST}
        self._secrets = sorted(forms, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        for secret in self._secrets:  # of which the end may be missing, where what was said was long
            ends = (n for n in range(len(secret) - 1, _HALF - 1, -1) if text.endswith(secret[:n]))
            if half := next(ends, 0):
                text = text[:-half] + "***"
        shown = _SHAPES.sub(lambda match: (match[1] or match[2] or match[3] or "") + "***", text)
        return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


_BEGINNING = 8
"""Characters by which a text is known, white space counted as one. What has fewer bytes is a word, which upstreams use
as well."""


def quotes_input(words: str, inputs: Iterable[Input]) -> bool:
    """Whether an upstream's words, their white space made single spaces, hold the beginning of one of these texts: as
    it is, or as JSON has it."""
    for text in inputs if words else ():
        if type(text) is not str:
            continue
        start = text[:64].lstrip()
        forms = {start, json.dumps(start)[1:-1], json.dumps(start, ensure_ascii=False)[1:-1]}
        beginnings = {" ".join(form.split())[:_BEGINNING] for form in forms}
        if any(len(beginning.encode()) >= _BEGINNING and beginning in words for beginning in beginnings):
            return True
    return False
