"""Tokens: ids to text and back, cheap bounds and estimates of their number, and each input's share of a batch's usage.

The table is OpenAI's cl100k_base (see NOTICE), package data, loaded on first use: decoding needs no merges and no
regular expression, only the 100,256 byte strings in order.
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
_MAX_TOKEN_BYTES = 128
"""Maximum bytes of a token in the table."""


@lru_cache(maxsize=1)
def _table() -> tuple[bytes, ...]:
    """id -> bytes, from the packed rank file. Raises `RuntimeError` if the file is not the published one."""
    packed = files("app.data").joinpath("cl100k_base.tiktoken.xz").read_bytes()
    text = lzma.decompress(packed)
    if hashlib.sha256(text).hexdigest() != TABLE_SHA256:
        raise RuntimeError("app/data/cl100k_base.tiktoken.xz is damaged: its sha256 is not the published one")
    # One line per id: base64 of its bytes, a space, the id. The ids are 0, 1, 2 … in this order.
    return tuple(b64decode(line.split(b" ", 1)[0]) for line in text.splitlines())


def decode(ids: Sequence[int], maximum: int = sys.maxsize) -> str:
    """Decodes cl100k_base ids to text. Raises `IndexError` with the position of an id that does not exist, and
    `OverflowError` for more than `maximum` bytes of text.

    A character that the client's tokenisation cut in two becomes U+FFFD, as in tiktoken.
    """
    table = _table()
    try:
        if min(ids, default=0) < 0:  # a negative id would index from the end
            raise IndexError
        if len(ids) * _MAX_TOKEN_BYTES > maximum and sum(map(len, map(table.__getitem__, ids))) > maximum:
            raise OverflowError  # before the text is built
        text = b"".join(map(table.__getitem__, ids)).decode("utf-8", errors="replace")
    except IndexError:
        raise IndexError(next(place for place, token in enumerate(ids) if not 0 <= token < len(table))) from None
    if upper_bound(text) > maximum:  # U+FFFD is three bytes, and may replace a single one
        raise OverflowError
    return text


_SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
"""How cl100k_base splits a text before it looks anything up, as published with it."""


@lru_cache(maxsize=1)
def _encoding() -> Encoding:
    """Built when a text is first counted, which takes a tenth of a second. <|endoftext|> and the like are plain text
    here."""
    ranks = {piece: rank for rank, piece in enumerate(_table())}
    return Encoding("cl100k_base", pat_str=_SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def encode(text: str) -> list[int]:
    """Encodes text to cl100k_base ids, as OpenAI counts them."""
    return _encoding().encode_ordinary(text)


def decode_prefix(ids: Sequence[int]) -> str:
    """Decodes the first ids of a text, without a final character of which they hold only the first bytes."""
    return _encoding().decode_bytes(ids).decode("utf-8", "ignore")


def upper_bound(text: Input) -> int:
    """Upper bound on the tokens of `text` under any byte-level tokenizer: a token has at least one byte. 0 for images
    and videos, which are not counted in tokens."""
    if type(text) is not str:
        return 0
    return len(text) if text.isascii() else len(text.encode())


def surely_within(maximum: int, inputs: Sequence[Input]) -> bool:
    """Whether texts surely have at most `maximum` tokens together: a quick check, as a character has at most four
    bytes. False is inconclusive."""
    try:
        return 4 * sum(map(len, inputs)) <= maximum  # type: ignore[arg-type]  # media has no length
    except TypeError:
        return False


def estimate(text: Input) -> int:
    """Estimates the tokens of `text`: one per four ASCII characters, one per any other character. 1 for an image or a
    video, whose tokens cannot be known in advance."""
    if type(text) is not str:
        return 1
    ascii_bytes = len(text.encode("ascii", "ignore"))  # 60 times as fast as a loop over the characters
    return max(1, len(text) - ascii_bytes + (ascii_bytes + 3) // 4)


def estimates(inputs: Iterable[Input]) -> list[int]:
    """`estimate` of each input, with a short cut for plain ASCII."""
    return [(len(text) + 3) // 4 or 1 if type(text) is str and text.isascii() else estimate(text) for text in inputs]


MAX_BYTES_PER_CHARACTER = 36
"""Maximum bytes of one character, as it is or in the compatibility form to which some tokenizers normalise it."""
_MAX_EXTRA_TOKENS = 2**13
"""Tokens that a server may count besides a text's own: an instruction, or the padding of a short text."""
_MAX_MEDIA_TOKENS = 2**20
"""Maximum tokens of an image or a video, by any vendor's count."""


def credible(total: int, inputs: Sequence[Input], weights: Sequence[int]) -> bool:
    """Whether a call's inputs can amount to `total` tokens; an unsigned -1, for example, is not credible. `weights` are
    their estimates: a text has at most four characters for each unit."""
    maximum = 4 * MAX_BYTES_PER_CHARACTER * sum(weights) + _MAX_EXTRA_TOKENS * len(weights)
    return total <= maximum or total <= maximum + _MAX_MEDIA_TOKENS * sum(isinstance(each, Media) for each in inputs)


def bills(total: int, inputs: Sequence[Input], weights: list[int]) -> list[int]:
    """Each input's share of a call's `total` tokens. `weights` are their estimates. Nobody can tell what an image or a
    video amounts to, so these share what the estimates of the texts leave."""
    if Media not in set(map(type, inputs)):
        return apportion(total, weights)
    text_weights = [0 if isinstance(each, Media) else weight for each, weight in zip(inputs, weights, strict=True)]
    media_weights = [int(isinstance(each, Media)) for each in inputs]
    text_total = min(total, sum(text_weights))
    parts = zip(apportion(text_total, text_weights), apportion(total - text_total, media_weights), strict=True)
    return [text + media for text, media in parts]


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Divides `total` tokens in proportion to `weights`; the parts add up to `total` exactly.

    Largest remainder; equal weights that do not divide evenly differ by one, the first ones getting more.
    """
    total_weight = sum(weights)
    if total_weight <= 0:
        weights, total_weight = [1] * len(weights), len(weights)
    parts = [total * weight // total_weight for weight in weights]
    shortfall = total - sum(parts)
    if shortfall:
        remainders = [total * weight % total_weight for weight in weights]
        # A reverse sort keeps equal remainders in input order.
        for i in sorted(range(len(weights)), key=remainders.__getitem__, reverse=True)[:shortfall]:
            parts[i] += 1
    return parts
