"""Tokens: ids back to text, bounds and estimates, where a text may be cut, and how a batch's bill is shared.

The table is OpenAI's cl100k_base (see NOTICE), package data, loaded on first use: decoding needs no
merges and no regular expression, only the 100,256 byte strings in order.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import sys
import unicodedata
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from tiktoken import Encoding

from app.catalog import TokenRule
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
    if bound(text) > most:  # U+FFFD has three bytes, and what it stands for may have had one
        raise OverflowError
    return text


def bound(text: Input) -> int:
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


# --- how long a text is, and where to cut it -----------------------------------------------------------
#
# Costs are in tenths of a token (a word is 1.3 to one vendor) and belong to characters: no text costs more than
# its characters do.

_Numbers = NDArray[np.int64]
_AROUND = {"bytes": 40, "han+words": 0}
"""What is counted besides the text's characters: marks before and after it, and a space some tokenizers add."""
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
# A letter or digit at the beginning or after a space: no vocabulary in use has a token across two of them.
_WORD = re.compile(r"(?<![^ \t\r\n])[^\W_]")
_SAFE = 36
"""Bytes that one character becomes at most, as it is or in the compatibility form some tokenizers bring it to."""


LONGEST = 2**17
"""Characters of a text that are counted exactly: some 15 tokens' worth for each of a model's 8,192. What is longer
is not worth the time, for it will hardly fit."""
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


def at_most(text: str, rule: TokenRule = "bytes") -> int:
    """No count of `text`'s tokens by this rule is above this.

    `bytes`: every token has a byte of the text or of its compatibility form (NFKC). `han+words`: characters
    written in Han, and 1.3 for each word; whatever else could pass for a word counts as one. `cl100k_base`: a byte
    each, which is quickly told.
    """
    if rule == "cl100k_base":
        return bound(text)
    if rule == "bytes" and text.isascii():
        return len(text) + _AROUND[rule] // 10
    return -(-(int(_costs(text, rule).sum()) + _AROUND[rule]) // 10)


def at_least(text: str, rule: TokenRule = "bytes") -> int:
    """No count of `text`'s tokens by this rule is below this: its words between spaces, or the count itself."""
    if rule == "cl100k_base" and len(text) <= LONGEST:
        return len(encode(text))
    if rule != "han+words":
        return len(_WORD.findall(text))
    spaced, han = _HAN.subn(" ", text)
    return (10 * han + 13 * len(_WORD.findall(spaced))) // 10


def characters(text: str) -> int:
    """The most that anyone counts: an emoji is two where a string is UTF-16."""
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2


@dataclass(frozen=True)
class Room:
    """How much text may be in one input. None is no limit."""

    tokens: int | None
    characters: int | None
    rule: TokenRule = "bytes"

    @property
    def unbounded(self) -> bool:
        """Whether nobody knows of a limit."""
        return self.tokens is None and self.characters is None

    @cached_property
    def any_text(self) -> int:
        """A text of so many characters fits, whatever they are."""
        by_tokens = sys.maxsize if self.tokens is None else (self.tokens - _AROUND["bytes"] // 10) // _SAFE
        return min(by_tokens, sys.maxsize if self.characters is None else self.characters // 2)

    def surely_holds(self, text: str) -> bool:
        """Whether the text fits, however its tokens are counted; told without counting any."""
        if len(text) <= self.any_text:
            return True
        if self.rule != "han+words" and self.tokens is not None and len(text) > self.tokens:
            return False  # a body's worth of text is not looked at for nothing
        return (self.characters is None or characters(text) <= self.characters) and (
            self.tokens is None or at_most(text, self.rule) <= self.tokens
        )

    def counts(self, text: str) -> bool:
        """Whether this text's tokens are counted, and not bounded."""
        return self.rule == "cl100k_base" and self.tokens is not None and len(text) <= LONGEST

    def holds(self, text: str) -> bool:
        """Whether a text that does not surely fit is known to, because its tokens can be counted."""
        return (
            self.counts(text)
            and self.tokens is not None
            and (self.characters is None or characters(text) <= self.characters)
            and len(encode(text)) <= self.tokens
        )

    @property
    def most_characters(self) -> int:
        """No piece is cut longer than this. (Where only words are counted, spaces and letters could go on.)"""
        by_tokens = sys.maxsize if self.tokens is None else self.tokens * _LENGTHS[self.rule]
        return max(1, min(by_tokens, sys.maxsize if self.characters is None else self.characters))

    def without(self, before: str) -> Room:
        """What is left of it when this stands before every text."""
        if not before:
            return self
        return Room(
            None if self.tokens is None else self.tokens - at_most(before, self.rule),
            None if self.characters is None else self.characters - characters(before),
            self.rule,
        )

    def first(self, text: str) -> str:
        """The longest beginning that surely fits, up to a good border. Raises `ValueError` where not even one
        character does."""
        return next(iter(_Cutter(text, self)))

    def pieces(self, text: str) -> Sequence[str]:
        """The text in pieces that surely fit, each as long as can be; joined they are the text. Raises `ValueError`."""
        return list(_Cutter(text, self))


_LENGTHS: Mapping[TokenRule, int] = {"bytes": 1, "han+words": 8, "cl100k_base": 16}
"""Characters a token, in the longest piece."""
_SPARE = 16
"""Tokens looked at beyond a piece: where what is looked at ends within a word, its last tokens are not the text's
own."""


class _Cutter:
    """Goes through a text and cuts it where a room ends."""

    def __init__(self, text: str, room: Room) -> None:
        self._text, self._room, self._window = text, room, room.most_characters

    def __iter__(self) -> Iterator[str]:
        start = 0
        while start < len(self._text):
            end = self._end(start)
            yield self._text[start:end]
            start = end

    def _end(self, start: int) -> int:
        room, window = self._room, self._text[start : start + self._window]
        fits = len(window)
        if room.characters is not None:
            fits = min(fits, _reach(1 + (_codes(window) > 0xFFFF).astype(np.int64), room.characters))
        if room.rule == "cl100k_base" and room.tokens is not None:
            return self._counted_end(start, fits, room.tokens)
        if room.tokens is not None:
            fits = min(fits, _reach(_costs(window, room.rule), 10 * room.tokens - _AROUND[room.rule]))
        if not fits:
            raise ValueError("there is no room for a single character")
        return _border(self._text, start, start + fits)

    def _counted_end(self, start: int, fits: int, most: int) -> int:
        """As far as so many tokens go, of the next `fits` characters. What was cut off may have been part of a token:
        then a little less."""
        # Looked at is about what a piece takes, and not all that is left, once for each piece.
        looked_at = 2 * max(most, _SPARE)
        while True:
            ids = encode(self._text[start : start + min(looked_at, fits)])
            if len(ids) > most + _SPARE or looked_at >= fits:
                break
            looked_at *= 4
        if len(ids) > most:
            # A character that the last token holds the first bytes of only is not in it.
            fits = len(_encoding().decode_bytes(ids[:most]).decode("utf-8", "ignore"))
        while fits > 0:
            end = _border(self._text, start, start + fits)
            if len(encode(self._text[start:end])) <= most:
                return end
            fits = end - start - 1
        raise ValueError("there is no room for a single character")


def _reach(costs: _Numbers, most: int) -> int:
    """How many characters from the first cost no more than this together."""
    return int(np.searchsorted(np.cumsum(costs), most, side="right"))


def _border(text: str, start: int, end: int) -> int:
    """The last good place to cut at or before `end`: after a space, if there is one in the last quarter;
    else between two characters as a reader sees them; else, for want of one, `end`. Where the text ends is one."""
    if end == len(text):
        return end
    space = max(text.rfind(mark, end - (end - start) // 4, end) for mark in " \n\t\u3000")
    if space >= start:
        return space + 1
    for place in range(end, max(start, end - 64), -1):
        if not _joined(text[place - 1], text[place]):
            return place
    return end


def _joined(before: str, after: str) -> bool:
    """Whether two code points are parts of one character to a reader: marks, emoji sequences, Hangul, CR LF.

    Less than Unicode's grapheme clusters (UAX 29), for which a table would be needed, and enough to keep what
    occurs in texts whole.
    """
    if before.isascii() and after.isascii():
        return before == "\r" and after == "\n"
    return (
        unicodedata.category(after)[0] == "M"
        or "\u200d" in (before, after)
        or "\U0001f3fb" <= after <= "\U0001f3ff"  # tones of skin
        or "\U000e0020" <= after <= "\U000e007f"  # tags, of which some flags are made
        or "\u1160" <= after <= "\u11ff"  # vowels and finals of Hangul in letters
        or ("\U0001f1e6" <= before <= "\U0001f1ff" and "\U0001f1e6" <= after <= "\U0001f1ff")  # flags
    )


def _costs(text: str, rule: TokenRule) -> _Numbers:
    """What each character costs at the most, in tenths of a token."""
    codes = _codes(text)
    distinct, places = np.unique(codes, return_inverse=True)
    cost = _byte_cost if rule == "bytes" else _word_cost
    costs = np.array([cost(chr(code)) for code in distinct], np.int64)[places]
    if rule == "han+words":
        # A word costs once, where it begins; negative costs mark what a word is made of.
        inside = costs < 0
        inside[1:] &= inside[:-1]
        inside[:1] = False
        costs = np.where(inside, 0, np.abs(costs))
    return costs


@lru_cache(maxsize=4096)
def _byte_cost(character: str) -> int:
    raw = character.encode("utf-8", "surrogatepass")
    return 10 * max(len(raw), len(unicodedata.normalize("NFKC", character).encode("utf-8", "surrogatepass")))


@lru_cache(maxsize=4096)
def _word_cost(character: str) -> int:
    if _HAN.match(character):
        return 10
    if character.isspace():
        return 0
    # Scripts that do not space their words may be counted by the character, like symbols.
    spaced = character.isalnum() and unicodedata.east_asian_width(character) not in "WFH"
    return -13 if spaced else 13


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


_BESIDES = 2**13
"""Tokens that a server may count beside a text's own: an instruction, or what a short one is padded with."""
_OF_MEDIA = 2**20
"""Tokens that an image or a video comes to at most, by any vendor's count."""


def credible(total: int, inputs: Sequence[Input], weights: Sequence[int]) -> bool:
    """Whether a call's inputs can have come to `total` tokens; to an unsigned -1, for example, they cannot. `weights`
    are their estimates: for each unit of it a text has four characters at most."""
    most = 4 * _SAFE * sum(weights) + _BESIDES * len(weights)
    return total <= most or total <= most + _OF_MEDIA * sum(isinstance(each, Media) for each in inputs)


def bills(total: int, inputs: Sequence[Input], weights: list[int]) -> list[int]:
    """Each input's part of a call's `total`. `weights` are their estimates. Nobody can tell what an image or a video
    comes to, so these share what the texts beside them leave."""
    if Media not in set(map(type, inputs)):
        return share(total, weights)
    of_texts = [0 if isinstance(each, Media) else weight for each, weight in zip(inputs, weights, strict=True)]
    of_media = [int(isinstance(each, Media)) for each in inputs]
    texts = min(total, sum(of_texts))
    parts = zip(share(texts, of_texts), share(total - texts, of_media), strict=True)
    return [text + media for text, media in parts]


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
        remainders = [total * weight % whole for weight in weights]
        # Sorting backwards keeps the order of equals.
        for i in sorted(range(len(weights)), key=remainders.__getitem__, reverse=True)[:short]:
            parts[i] += 1
    return parts
