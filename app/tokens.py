"""Tokens: ids to text and back, bounds and estimates that show at a glance, and how a batch's bill is shared.

The table is OpenAI's cl100k_base (see NOTICE), package data, loaded on first use: decoding needs no
merges and no regular expression, only the 100,256 byte strings in order.
"""

from __future__ import annotations

import hashlib
import lzma
import sys
from base64 import b64decode
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.resources import files

from tiktoken import Encoding

from app.types import Input, Media

TABLE_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
_LONGEST_TOKEN = 128
"""Bytes of a token in it, at the most."""


@lru_cache(maxsize=1)
def _table() -> tuple[bytes, ...]:
    """id -> bytes, from the packed rank file; a copy that is not the published one is refused."""
    packed = files("app.data").joinpath("cl100k_base.tiktoken.xz").read_bytes()
    text = lzma.decompress(packed)
    if hashlib.sha256(text).hexdigest() != TABLE_SHA256:
        raise RuntimeError("app/data/cl100k_base.tiktoken.xz is damaged: its sha256 is not the published one")
    # One line an id: base64 of its bytes, a space, the id. The ids are 0, 1, 2 … in this order.
    return tuple(b64decode(line.split(b" ", 1)[0]) for line in text.splitlines())


def decode(ids: Sequence[int], most: int = sys.maxsize) -> str:
    """cl100k_base ids to text. Raises `IndexError` holding the position of an id that is none, and `OverflowError`
    for more than `most` bytes of text.

    A character cut in two by whoever tokenised becomes U+FFFD, as in tiktoken.
    """
    table = _table()
    try:
        if min(ids, default=0) < 0:  # which would count from the end
            raise IndexError
        if len(ids) * _LONGEST_TOKEN > most and sum(map(len, map(table.__getitem__, ids))) > most:
            raise OverflowError  # before it is made
        text = b"".join(map(table.__getitem__, ids)).decode("utf-8", errors="replace")
    except IndexError:
        raise IndexError(next(place for place, token in enumerate(ids) if not 0 <= token < len(table))) from None
    if upper_bound(text) > most:  # U+FFFD has three bytes, and what it stands for may have had one
        raise OverflowError
    return text


_WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
"""How cl100k_base splits a text before it looks anything up, as published with it."""


@lru_cache(maxsize=1)
def _encoding() -> Encoding:
    """Loaded when a text is first to be counted: a tenth of a second. <|endoftext|> and its like are text here."""
    ranks = {piece: rank for rank, piece in enumerate(_table())}
    return Encoding("cl100k_base", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={})


def encode(text: str) -> list[int]:
    """Text to cl100k_base ids, as OpenAI counts them."""
    return _encoding().encode_ordinary(text)


def decode_prefix(ids: Sequence[int]) -> str:
    """The text of the first ids of one, without a character that the last of them holds only the first bytes of."""
    return _encoding().decode_bytes(ids).decode("utf-8", "ignore")


def upper_bound(text: Input) -> int:
    """No byte-level tokenizer makes more tokens of `text` than this: it has at least one byte a token. Images and
    videos are not counted in tokens."""
    if type(text) is not str:
        return 0
    return len(text) if text.isascii() else len(text.encode())


def surely_within(most: int, inputs: Sequence[Input]) -> bool:
    """Whether texts have no more than `most` tokens together, as far as that shows at a glance: a character has four
    bytes at the most."""
    try:
        return 4 * sum(map(len, inputs)) <= most  # type: ignore[arg-type]  # what is no text has no length
    except TypeError:
        return False


def estimate(text: Input) -> int:
    """About how many tokens `text` is: four bytes of ASCII each, one character of anything else. Nobody says what an
    image will come to: one."""
    if type(text) is not str:
        return 1
    narrow = len(text.encode("ascii", "ignore"))  # 60 times as fast as looking at each character
    return max(1, len(text) - narrow + (narrow + 3) // 4)


def estimates(inputs: Iterable[Input]) -> list[int]:
    """`estimate` of each; one of plain ASCII shows at a glance."""
    return [(len(text) + 3) // 4 or 1 if type(text) is str and text.isascii() else estimate(text) for text in inputs]


MAX_BYTES_PER_CHARACTER = 36
"""Bytes that one character becomes at most, as it is or in the compatibility form some tokenizers bring it to."""
_BESIDES = 2**13
"""Tokens that a server may count beside a text's own: an instruction, or what a short one is padded with."""
_OF_MEDIA = 2**20
"""Tokens that an image or a video comes to at most, by any vendor's count."""


def credible(total: int, inputs: Sequence[Input], weights: Sequence[int]) -> bool:
    """Whether a call's inputs can have come to `total` tokens; to an unsigned -1, for example, they cannot. `weights`
    are their estimates: for each unit of it a text has four characters at most."""
    most = 4 * MAX_BYTES_PER_CHARACTER * sum(weights) + _BESIDES * len(weights)
    return total <= most or total <= most + _OF_MEDIA * sum(isinstance(each, Media) for each in inputs)


def bills(total: int, inputs: Sequence[Input], weights: list[int]) -> list[int]:
    """Each input's part of a call's `total`. `weights` are their estimates. Nobody can tell what an image or a video
    comes to, so these share what the texts beside them leave."""
    if Media not in set(map(type, inputs)):
        return apportion(total, weights)
    of_texts = [0 if isinstance(each, Media) else weight for each, weight in zip(inputs, weights, strict=True)]
    of_media = [int(isinstance(each, Media)) for each in inputs]
    texts = min(total, sum(of_texts))
    parts = zip(apportion(texts, of_texts), apportion(total - texts, of_media), strict=True)
    return [text + media for text, media in parts]


def apportion(total: int, weights: Sequence[int]) -> list[int]:
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
        remainders = [total * weight % whole for weight in weights]
        # Sorting backwards keeps the order of equals.
        for i in sorted(range(len(weights)), key=remainders.__getitem__, reverse=True)[:short]:
            parts[i] += 1
    return parts
