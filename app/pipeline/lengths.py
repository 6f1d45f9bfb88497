"""How long a text is by an upstream's count, and where to cut one that is too long.

Costs are in tenths of a token (one vendor counts 1.3 for a word) and belong to characters: no text costs more than its
characters do.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from app import tokens
from app.catalog import TokenRule

_Numbers = NDArray[np.int64]
_OVERHEAD = {"bytes": 40, "han+words": 0}
"""Tenths of a token that are counted besides the text's characters: marks before and after it, and a space that some
tokenizers add."""
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
# A letter or digit at the beginning or after a space: no vocabulary in use has a token that spans two of them.
_WORD = re.compile(r"(?<![^ \t\r\n])[^\W_]")

MAX_COUNTED_CHARACTERS = 2**17
"""Maximum characters of a text whose tokens are counted exactly: 16 for each of a model's 8,192. A longer one is not
worth the time, because it will hardly fit."""


def at_most(text: str, rule: TokenRule = "bytes") -> int:
    """Upper bound on the tokens of `text` by this rule.

    `bytes`: every token has a byte of the text or of its compatibility form (NFKC). `han+words`: one for each Han
    character and 1.3 for each word; whatever else could pass for a word counts as one. `cl100k_base`: one for each
    byte, which is quickly counted.
    """
    if rule == "cl100k_base":
        return tokens.upper_bound(text)
    if rule == "bytes" and text.isascii():
        return len(text) + _OVERHEAD[rule] // 10
    return -(-(int(_costs(text, rule).sum()) + _OVERHEAD[rule]) // 10)


def at_least(text: str, rule: TokenRule = "bytes") -> int:
    """Lower bound on the tokens of `text` by this rule: its words between spaces, or the exact count."""
    if rule == "cl100k_base" and len(text) <= MAX_COUNTED_CHARACTERS:
        return len(tokens.encode(text))
    if rule != "han+words":
        return len(_WORD.findall(text))
    spaced, han = _HAN.subn(" ", text)
    return (10 * han + 13 * len(_WORD.findall(spaced))) // 10


def characters(text: str) -> int:
    """Characters as the strictest vendor counts them: an emoji is two if strings are UTF-16."""
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2


@dataclass(frozen=True)
class InputLimit:
    """The maximum length of one input. None: no limit."""

    tokens: int | None
    characters: int | None
    rule: TokenRule = "bytes"

    @property
    def unbounded(self) -> bool:
        """Whether no limit is known."""
        return self.tokens is None and self.characters is None

    @cached_property
    def safe_characters(self) -> int:
        """A text of this many characters always fits, whatever they are."""
        by_tokens = (
            sys.maxsize
            if self.tokens is None
            else (self.tokens - _OVERHEAD["bytes"] // 10) // tokens.MAX_BYTES_PER_CHARACTER
        )
        return min(by_tokens, sys.maxsize if self.characters is None else self.characters // 2)

    def surely_allows(self, text: str) -> bool:
        """Whether the text fits, however its tokens are counted; decided without counting them."""
        if len(text) <= self.safe_characters:
            return True
        if self.rule != "han+words" and self.tokens is not None and len(text) > self.tokens:
            return False  # there is no need to scan a whole body's worth of text
        return (self.characters is None or characters(text) <= self.characters) and (
            self.tokens is None or at_most(text, self.rule) <= self.tokens
        )

    def is_counted(self, text: str) -> bool:
        """Whether this text's tokens are counted rather than bounded."""
        return self.rule == "cl100k_base" and self.tokens is not None and len(text) <= MAX_COUNTED_CHARACTERS

    def allows(self, text: str) -> bool:
        """Whether a text that does not surely fit is known to fit, because its tokens can be counted."""
        return (
            self.is_counted(text)
            and self.tokens is not None
            and (self.characters is None or characters(text) <= self.characters)
            and len(tokens.encode(text)) <= self.tokens
        )

    @property
    def max_piece_characters(self) -> int:
        """Maximum characters of a piece. (If only words are counted, spaces and letters could go on for ever.)"""
        by_tokens = sys.maxsize if self.tokens is None else self.tokens * _CHARACTERS_PER_TOKEN[self.rule]
        return max(1, min(by_tokens, sys.maxsize if self.characters is None else self.characters))

    def without(self, prefix: str) -> InputLimit:
        """What remains of it with `prefix` in front of every text."""
        if not prefix:
            return self
        return InputLimit(
            None if self.tokens is None else self.tokens - at_most(prefix, self.rule),
            None if self.characters is None else self.characters - characters(prefix),
            self.rule,
        )

    def first(self, text: str) -> str:
        """The longest prefix that surely fits, cut at a good place. Raises `ValueError` if not even one character
        fits."""
        return next(self._cut(text))

    def pieces(self, text: str) -> Sequence[str]:
        """The text in pieces that surely fit, each as long as possible; joined, they are the text. Raises
        `ValueError`."""
        return list(self._cut(text))

    def _cut(self, text: str) -> Iterator[str]:
        start = 0
        while start < len(text):
            end = self._end(text, start)
            yield text[start:end]
            start = end

    def _end(self, text: str, start: int) -> int:
        window = text[start : start + self.max_piece_characters]
        fits = len(window)
        if self.characters is not None:
            fits = min(fits, _count_within(1 + (_codes(window) > 0xFFFF).astype(np.int64), self.characters))
        if self.rule == "cl100k_base" and self.tokens is not None:
            return _counted_end(text, start, fits, self.tokens)
        if self.tokens is not None:
            fits = min(fits, _count_within(_costs(window, self.rule), 10 * self.tokens - _OVERHEAD[self.rule]))
        if not fits:
            raise ValueError("there is no room for a single character")
        return _boundary(text, start, start + fits)


_CHARACTERS_PER_TOKEN: Mapping[TokenRule, int] = {"bytes": 1, "han+words": 8, "cl100k_base": 16}
"""Characters per token, in the longest piece."""
_LOOKAHEAD = 16
"""Tokens encoded beyond a piece: if the encoded text ends within a word, its last tokens are not those of the whole
text."""


def _counted_end(text: str, start: int, fits: int, maximum: int) -> int:
    """The end of a piece of at most `maximum` tokens, among the next `fits` characters. Cutting may break up a
    token, so the piece is counted again, and shortened if need be."""
    # About a piece's worth is encoded, not all of the rest for every piece.
    window = 2 * max(maximum, _LOOKAHEAD)
    while True:
        ids = tokens.encode(text[start : start + min(window, fits)])
        if len(ids) > maximum + _LOOKAHEAD or window >= fits:
            break
        window *= 4
    if len(ids) > maximum:
        # Without a character of which the last token holds only the first bytes.
        fits = len(tokens.decode_prefix(ids[:maximum]))
    while fits > 0:
        end = _boundary(text, start, start + fits)
        if len(tokens.encode(text[start:end])) <= maximum:
            return end
        fits = end - start - 1
    raise ValueError("there is no room for a single character")


def _count_within(costs: _Numbers, maximum: int) -> int:
    """How many characters from the start cost at most `maximum` together."""
    return int(np.searchsorted(np.cumsum(costs), maximum, side="right"))


def _boundary(text: str, start: int, end: int) -> int:
    """The last good place to cut at or before `end`: the end of the text; or after a space, if there is one in the last
    quarter; or else between two user-perceived characters; or else `end`."""
    if end == len(text):
        return end
    space = max(text.rfind(mark, end - (end - start) // 4, end) for mark in " \n\t\u3000")
    if space >= start:
        return space + 1
    for place in range(end, max(start, end - 64), -1):
        if not _same_character(text[place - 1], text[place]):
            return place
    return end


def _same_character(before: str, after: str) -> bool:
    """Whether two code points are parts of one user-perceived character: marks, emoji sequences, Hangul, CR LF.

    Less than Unicode's grapheme clusters (UAX 29), which would need a table, and enough to keep what occurs in texts
    whole.
    """
    if before.isascii() and after.isascii():
        return before == "\r" and after == "\n"
    return (
        unicodedata.category(after)[0] == "M"
        or "\u200d" in (before, after)
        or "\U0001f3fb" <= after <= "\U0001f3ff"  # skin tones
        or "\U000e0020" <= after <= "\U000e007f"  # tags, which make up some flags
        or "\u1160" <= after <= "\u11ff"  # Hangul vowels and finals, written as single letters
        or ("\U0001f1e6" <= before <= "\U0001f1ff" and "\U0001f1e6" <= after <= "\U0001f1ff")  # flags
    )


def _costs(text: str, rule: TokenRule) -> _Numbers:
    """The maximum cost of each character, in tenths of a token."""
    codes = _codes(text)
    distinct, places = np.unique(codes, return_inverse=True)
    cost = _byte_cost if rule == "bytes" else _word_cost
    costs = np.array([cost(chr(code)) for code in distinct], np.int64)[places]
    if rule == "han+words":
        # A word costs once, where it begins; negative costs mark the characters of a word.
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
    # Scripts that put no spaces between words may be counted by the character, like symbols.
    spaced = character.isalnum() and unicodedata.east_asian_width(character) not in "WFH"
    return -13 if spaced else 13


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
