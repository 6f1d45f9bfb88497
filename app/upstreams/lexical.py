"""An upstream inside this process: hashes words and character n-grams into a vector. For trying out, tests and offline
work; it sees spelling and never meaning, so it is no use for real search.

Uses the client, OpenAI's dialect and the contract check like any upstream. The same text gives the same bytes on every
machine: the hashes are our own, and all sums are of whole numbers.
"""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

import httpx
import numpy as np
import orjson
from numpy.typing import NDArray

from app import vectors
from app.catalog import CATALOG
from app.config import UpstreamKind, UpstreamSettings
from app.types import Adapter
from app.upstreams import openai
from app.upstreams.auth import NoAuth

_Numbers = NDArray[np.uint64]
_Flags = NDArray[np.bool_]
_Features = tuple[NDArray[np.int64], _Numbers, NDArray[np.float64]]

_BASE = np.uint64(0x100000001B3)
_SPACE = np.uint64(ord(" "))
_THREAD_THRESHOLD = 20_000
"""Characters beyond which hashing would block the event loop for more than a few milliseconds."""
_MAX_LETTERS_PER_PASS = 100_000
"""Letters collected before they are hashed, at 150 bytes of memory each. The catalogue limits one text's characters;
most become one letter, a few rare ones up to 18."""

# Scripts without spaces between words: kana, Han, Hangul.
_WIDE = np.array([0x3040, 0x3100, 0x3400, 0xA000, 0xAC00, 0xD7B0, 0xF900, 0xFB00, 0x20000, 0x40000], np.uint64)
_SEPARATORS = re.compile(r"[\W_]+")


def embed(texts: Sequence[str], dimensions: int) -> list[bytes]:
    """One vector per text: unit length, float32, never zero, and independent of the other texts."""
    found: list[bytes] = []
    words: list[str] = []
    letters = 0
    for text in texts:
        words.append(_words(text))
        letters += len(words[-1])
        if letters > _MAX_LETTERS_PER_PASS:
            found += _embed_words(words, dimensions)
            words, letters = [], 0
    return found + _embed_words(words, dimensions) if words else found


def _embed_words(words: Sequence[str], dimensions: int) -> list[bytes]:
    letters = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    owners = np.repeat(np.arange(len(words), dtype=np.int64), [len(each) for each in words])
    places, hashes, weights = _features(letters)
    cells = owners[places] * dimensions + (hashes % np.uint64(dimensions)).astype(np.int64)
    signs = 1.0 - 2.0 * (hashes >> np.uint64(63)).astype(np.float64)
    sums = np.bincount(cells, signs * weights, minlength=len(words) * dimensions).reshape(-1, dimensions)
    squares = (sums * sums).sum(axis=1)
    # When there are few features, they may cancel each other out.
    sums[squares == 0, 0] = 1.0
    squares[squares == 0] = 1.0
    return [row.tobytes() for row in (sums / np.sqrt(squares)[:, None]).astype("<f4")]


def count_tokens(text: str) -> int:
    """Counts words, and the characters of scripts that do not space words."""
    letters = np.frombuffer(_words(text).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    wide = _is_wide(letters)
    return int(wide.sum()) + int(_starts(wide | (letters == _SPACE)).sum())


def _words(text: str) -> str:
    """The words, each with a space before and after it. A text without words has its symbols spelled out."""
    words = _SEPARATORS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return f" {words or ' '.join(f'u{ord(symbol):x}' for symbol in text) or 'nothing'} "


def _features(letters: _Numbers) -> _Features:
    """Where each feature begins, its hash and its weight."""
    space, wide = letters == _SPACE, _is_wide(letters)
    blocked = space | wide
    found = [_whole_words(letters, blocked)]
    inside = np.concatenate(([0], np.cumsum(blocked)))
    grams = letters
    for size in range(1, 6):
        if size > 1:
            grams = grams[:-1] * _BASE + letters[size - 1 :]
        count = len(grams)
        if size <= 2:  # Chinese: characters and pairs; a pair is roughly a word
            whole = wide[:count] & wide[size - 1 :]
            weight = 2.0 * size
        else:  # parts of a word, including the space at its beginning or end but none within
            within = inside[size - 1 : size - 1 + count] - inside[1 : 1 + count]
            whole = (within == 0) & ~wide[:count] & ~wide[size - 1 :]
            weight = 1.0
        places = np.flatnonzero(whole)
        found.append((places, _mix(grams[places] + np.uint64(size)), np.full(len(places), weight)))
    return (
        np.concatenate([places for places, _, _ in found]),
        np.concatenate([hashes for _, hashes, _ in found]),
        np.concatenate([weights for _, _, weights in found]),
    )


def _whole_words(letters: _Numbers, blocked: _Flags) -> _Features:
    """Longer words weigh more, up to eight letters: in most languages short words mean least."""
    places = np.flatnonzero(_starts(blocked))
    inner = np.flatnonzero(~blocked)
    if not len(inner):
        return places, np.empty(0, np.uint64), np.empty(0)
    first = np.searchsorted(inner, places)
    lengths = np.diff(np.append(first, len(inner)))
    position = (np.arange(len(inner)) - np.repeat(first, lengths)).astype(np.uint64)
    hashes = np.add.reduceat(_mix(letters[inner] + position * _BASE), first)
    return places, _mix(hashes), np.minimum(lengths, 8).astype(np.float64)


def _starts(blocked: _Flags) -> _Flags:
    """Where a run of letters begins. (Every text begins with a space.)"""
    starts = ~blocked
    starts[1:] &= blocked[:-1]
    return starts


def _is_wide(letters: _Numbers) -> _Flags:
    return (np.searchsorted(_WIDE, letters, side="right") & 1).astype(np.bool_)


def _mix(numbers: _Numbers) -> _Numbers:
    """SplitMix64's finaliser: every bit of the input reaches every bit of the result."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class LexicalTransport(httpx.AsyncBaseTransport):
    """Answers `POST …/embeddings` in OpenAI's shape, always in base64."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            body = orjson.loads(await request.aread())
            texts, model = body["input"], CATALOG["lexical"][body["model"]]
            dimensions = body.get("dimensions", model.dimensions)
        except (KeyError, TypeError, ValueError):
            return _reply(404, {"error": {"message": "no such model", "code": "model_not_found"}})
        if sum(map(len, texts)) > _THREAD_THRESHOLD:
            return _reply(200, await asyncio.to_thread(_answer, texts, dimensions))
        return _reply(200, _answer(texts, dimensions))


def _answer(texts: list[str], dimensions: int) -> dict[str, object]:
    rows = [
        {"index": index, "embedding": vectors.to_base64(vector).decode()}
        for index, vector in enumerate(embed(texts, dimensions))
    ]
    tokens = sum(map(count_tokens, texts))
    return {"object": "list", "data": rows, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def _reply(status: int, body: object) -> httpx.Response:
    return httpx.Response(status, headers={"content-type": "application/json"}, content=orjson.dumps(body))


class LexicalSettings(UpstreamSettings):
    type: Literal["lexical"] = "lexical"
    base_url: str = "http://lexical.invalid"


def adapter(_settings: LexicalSettings) -> Adapter:
    build_request = openai.request_builder("/embeddings", {}, "base64")
    return Adapter(build_request, openai.parse_error, openai.parse_response)


KIND = UpstreamKind(
    name="lexical",
    settings=LexicalSettings,
    adapter=adapter,
    auth=lambda _settings, _clock, _tokens: NoAuth(),
    transport=lambda _settings: LexicalTransport(),
    built_in=True,
)
