"""How long a text is, as an upstream may count it, and where one that is too long is cut.

Costs are in tenths of a token (a word is 1.3 to one vendor) and belong to characters: no text costs more than its
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
_AROUND = {"bytes": 40, "han+words": 0}
"""What is counted besides the text's characters: marks before and after it, and a space some tokenizers add."""
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
# A letter or digit at the beginning or after a space: no vocabulary in use has a token across two of them.
_WORD = re.compile(r"(?<![^ \t\r\n])[^\W_]")

LONGEST = 2**17
"""Characters of a text that are counted exactly: some 15 tokens' worth for each of a model's 8,192. What is longer
is not worth the time, for it will hardly fit."""


def at_most(text: str, rule: TokenRule = "bytes") -> int:
    """No count of `text`'s tokens by this rule is above this.

    `bytes`: every token has a byte of the text or of its compatibility form (NFKC). `han+words`: characters
    written in Han, and 1.3 for each word; whatever else could pass for a word counts as one. `cl100k_base`: a byte
    each, which is quickly told.
    """
    if rule == "cl100k_base":
        return tokens.upper_bound(text)
    if rule == "bytes" and text.isascii():
        return len(text) + _AROUND[rule] // 10
    return -(-(int(_costs(text, rule).sum()) + _AROUND[rule]) // 10)


def at_least(text: str, rule: TokenRule = "bytes") -> int:
    """No count of `text`'s tokens by this rule is below this: its words between spaces, or the count itself."""
    if rule == "cl100k_base" and len(text) <= LONGEST:
        return len(tokens.encode(text))
    if rule != "han+words":
        return len(_WORD.findall(text))
    spaced, han = _HAN.subn(" ", text)
    return (10 * han + 13 * len(_WORD.findall(spaced))) // 10


def characters(text: str) -> int:
    """The most that anyone counts: an emoji is two where a string is UTF-16."""
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2


@dataclass(frozen=True)
class InputLimit:
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
        by_tokens = (
            sys.maxsize
            if self.tokens is None
            else (self.tokens - _AROUND["bytes"] // 10) // tokens.MAX_BYTES_PER_CHARACTER
        )
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
            and len(tokens.encode(text)) <= self.tokens
        )

    @property
    def most_characters(self) -> int:
        """No piece is cut longer than this. (Where only words are counted, spaces and letters could go on.)"""
        by_tokens = sys.maxsize if self.tokens is None else self.tokens * _LENGTHS[self.rule]
        return max(1, min(by_tokens, sys.maxsize if self.characters is None else self.characters))

    def without(self, before: str) -> InputLimit:
        """What is left of it when this stands before every text."""
        if not before:
            return self
        return InputLimit(
            None if self.tokens is None else self.tokens - at_most(before, self.rule),
            None if self.characters is None else self.characters - characters(before),
            self.rule,
        )

    def first(self, text: str) -> str:
        """The longest beginning that surely fits, up to a good border. Raises `ValueError` where not even one
        character does."""
        return next(self._cut(text))

    def pieces(self, text: str) -> Sequence[str]:
        """The text in pieces that surely fit, each as long as can be; joined they are the text. Raises `ValueError`."""
        return list(self._cut(text))

    def _cut(self, text: str) -> Iterator[str]:
        start = 0
        while start < len(text):
            end = self._end(text, start)
            yield text[start:end]
            start = end

    def _end(self, text: str, start: int) -> int:
        window = text[start : start + self.most_characters]
        fits = len(window)
        if self.characters is not None:
            fits = min(fits, _reach(1 + (_codes(window) > 0xFFFF).astype(np.int64), self.characters))
        if self.rule == "cl100k_base" and self.tokens is not None:
            return _counted_end(text, start, fits, self.tokens)
        if self.tokens is not None:
            fits = min(fits, _reach(_costs(window, self.rule), 10 * self.tokens - _AROUND[self.rule]))
        if not fits:
            raise ValueError("there is no room for a single character")
        return _border(text, start, start + fits)


_LENGTHS: Mapping[TokenRule, int] = {"bytes": 1, "han+words": 8, "cl100k_base": 16}
"""Characters a token, in the longest piece."""
_SPARE = 16
"""Tokens looked at beyond a piece: where what is looked at ends within a word, its last tokens are not the text's
own."""


def _counted_end(text: str, start: int, fits: int, most: int) -> int:
    """As far as so many tokens go, of the next `fits` characters. What was cut off may have been part of a token:
    then a little less."""
    # Looked at is about what a piece takes, and not all that is left, once for each piece.
    looked_at = 2 * max(most, _SPARE)
    while True:
        ids = tokens.encode(text[start : start + min(looked_at, fits)])
        if len(ids) > most + _SPARE or looked_at >= fits:
            break
        looked_at *= 4
    if len(ids) > most:
        # A character that the last token holds the first bytes of only is not in it.
        fits = len(tokens.decode_prefix(ids[:most]))
    while fits > 0:
        end = _border(text, start, start + fits)
        if len(tokens.encode(text[start:end])) <= most:
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
