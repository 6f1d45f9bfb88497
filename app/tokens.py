"""Tokens: ids back to text, bounds and estimates, and how a batch's bill is shared among its inputs.

The table is OpenAI's cl100k_base (see NOTICE), package data, loaded on first use: decoding needs no
merges and no regular expression, only the 100,256 byte strings in order.
"""

from __future__ import annotations

import hashlib
import lzma
from base64 import b64decode
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files

TABLE_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"


@lru_cache(maxsize=1)
def _table() -> tuple[bytes, ...]:
    """id -> bytes, from the packed rank file; a copy that is not the published one is refused."""
    packed = files("app.data").joinpath("cl100k_base.tiktoken.xz").read_bytes()
    text = lzma.decompress(packed)
    if hashlib.sha256(text).hexdigest() != TABLE_SHA256:
        raise RuntimeError("app/data/cl100k_base.tiktoken.xz is damaged: its sha256 is not the published one")
    # One line an id: base64 of its bytes, a space, the id. The ids are 0, 1, 2 … in this order.
    return tuple(b64decode(line.split(b" ", 1)[0]) for line in text.splitlines())


def decode(ids: Sequence[int]) -> str:
    """cl100k_base ids to text. Raises `IndexError` holding the position of an id that is none.

    A character cut in two by whoever tokenised becomes U+FFFD, as in tiktoken.
    """
    table = _table()
    size = len(table)
    for position, token in enumerate(ids):
        if not 0 <= token < size:
            raise IndexError(position)
    return b"".join(map(table.__getitem__, ids)).decode("utf-8", errors="replace")


def bound(text: str) -> int:
    """No byte-level tokenizer makes more tokens of `text` than this: it has at least one byte a token."""
    return len(text) if text.isascii() else len(text.encode())


def estimate(text: str) -> int:
    """About how many tokens `text` is: four bytes of ASCII each, one character of anything else."""
    if text.isascii():
        return max(1, (len(text) + 3) // 4)
    wide = sum(character > "\x7f" for character in text)
    return max(1, wide + (len(text) - wide + 3) // 4)


def share(total: int, weights: Sequence[int]) -> list[int]:
    """`total` tokens shared out in proportion to `weights`; the parts add up to `total` exactly.

    Largest remainder; equal weights that do not divide evenly differ by one, the first getting more.
    """
    if not weights:
        return []
    whole = sum(weights)
    if whole <= 0:
        weights, whole = [1] * len(weights), len(weights)
    parts = [total * weight // whole for weight in weights]
    short = total - sum(parts)
    if short:
        by_remainder = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
        for i in by_remainder[:short]:
            parts[i] += 1
    return parts
