"""Bounds on lengths, and where texts are cut: never beyond the limit, never within a character."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app import tokens
from app.catalog import TokenRule
from app.pipeline import lengths
from app.pipeline.lengths import InputLimit
from tests.fakes import baidu_tokens

FAMILY = "👨‍👩‍👧‍👦"
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
ALIKE = st.lists(
    st.sampled_from(
        ["word", " ", "风急天高", "é́", FAMILY, "🇩🇪", "\r\n", "각", "ﷺ", "don't", "3.14", "カタカナ", "\t", "。"]
    ),
    max_size=60,
).map("".join)
TEXTS = ANYTHING | ALIKE
ROOMS = st.builds(
    InputLimit,
    st.none() | st.integers(50, 120),
    st.none() | st.integers(12, 80),
    st.sampled_from(["bytes", "han+words"]),
)


def fits(text: str, room: InputLimit) -> bool:
    return (room.tokens is None or lengths.at_most(text, room.rule) <= room.tokens) and (
        room.characters is None or len(text.encode("utf-16-le")) // 2 <= room.characters
    )


@given(TEXTS, ROOMS)
@example("a" * 500, InputLimit(50, None))
@example("风" * 500, InputLimit(384, None, "han+words"))
def test_the_pieces_of_a_text_fit_and_joined_are_the_text(text: str, room: InputLimit) -> None:
    pieces = room.pieces(text)
    assert "".join(pieces) == text
    assert all(fits(piece, room) and room.surely_allows(piece) for piece in pieces)
    assert all(pieces)
    if text:
        assert room.first(text) == pieces[0]


@given(TEXTS, ROOMS)
def test_what_surely_fits_is_one_piece(text: str, room: InputLimit) -> None:
    assert room.surely_allows(text) == fits(text, room)
    if text and fits(text, room):
        assert room.pieces(text) == [text]


# Each of these takes less than half of any limit below.
WHOLE = ["a", "é", "e\u0301", "风", FAMILY, "👍🏽", "🇩🇪", "\r\n", "\u1100\u1161\u11a8", "é́", "1️⃣"]


@given(st.lists(st.sampled_from(WHOLE), max_size=80), st.integers(60, 120))
def test_a_cut_never_falls_within_a_character_as_a_reader_sees_it(characters: list[str], limit: int) -> None:
    # Adjacent flags may count as one character, so something else follows each character.
    characters = [each for pair in zip(characters, ["x"] * len(characters), strict=True) for each in pair]
    borders, place = {0}, 0
    for character in characters:
        place += len(character)
        borders.add(place)
    place = 0
    for piece in InputLimit(limit, None).pieces("".join(characters)):
        assert place in borders
        place += len(piece)


@pytest.mark.parametrize("character", WHOLE, ids=ascii)
def test_wherever_in_it_the_limit_is(character: str) -> None:
    pair = len(character) + 1
    for limit in range(60, 60 + len(f"{character}x".encode())):
        first = InputLimit(limit, None).first(f"{character}x" * 40)
        assert len(first) % pair in (0, pair - 1)


def test_a_cut_is_made_after_a_space_where_there_is_one_nearby() -> None:
    assert InputLimit(20, None).pieces("one two three four five") == ["one two three ", "four five"]
    assert InputLimit(None, 9).pieces("abcdefghijk") == ["abcdefghi", "jk"]


def test_a_cut_by_counted_tokens_is_a_good_one_also_where_characters_are_what_ends_it() -> None:
    room = InputLimit(8192, 20, "cl100k_base")
    assert room.pieces("one two three four five six") == ["one two three four ", "five six"]
    assert room.pieces(f"{FAMILY}x" * 3) == [f"{FAMILY}x", f"{FAMILY}x", f"{FAMILY}x"]  # each has twelve UTF-16 units
    row = "|cell".ljust(80) + "|"  # 16 or more characters per token
    first, second = InputLimit(8192, None, "cl100k_base").pieces("a table ..." + row * 3_000)
    assert first.endswith(" ")
    assert second.startswith("||cell")


@pytest.mark.parametrize(
    "text", ["今天天气很好我们去公园散步。", "The quick brown fox jumps over the lazy dog. ", "a", "👩‍👩‍👧‍👦"]
)
def test_to_cut_a_text_by_counted_tokens_takes_time_in_proportion_to_its_length(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = 0

    def counting(text: str) -> list[int]:
        nonlocal counted
        counted += len(text)
        return encode(text)

    encode = tokens.encode
    monkeypatch.setattr(tokens, "encode", counting)
    whole = (text * 20_000)[:20_000]
    assert "".join(InputLimit(100, None, "cl100k_base").pieces(whole)) == whole
    assert counted < 8 * len(whole)


def test_a_cut_by_counted_tokens_is_the_texts_and_not_that_of_what_is_looked_at() -> None:
    words = " gateway gateway embedding"
    assert InputLimit(3, None, "cl100k_base").pieces(words * 2) == [words, words]


def test_a_text_without_any_good_border_is_cut_all_the_same() -> None:
    marks = "e" + "\u0301" * 300
    pieces = InputLimit(104, None).pieces(marks)
    assert "".join(pieces) == marks
    assert len(pieces) == 7  # 104 bytes hold 50 of them and their surroundings


@pytest.mark.parametrize(
    "room",
    [
        InputLimit(3, None),
        InputLimit(None, 0),
        InputLimit(-5, 100),
        InputLimit(0, None, "han+words"),
        InputLimit(0, None, "cl100k_base"),
    ],
)
def test_a_room_too_small_for_any_character_says_so(room: InputLimit) -> None:
    with pytest.raises(ValueError, match="single character"):
        room.pieces("风")


@given(TEXTS.filter(bool), st.sampled_from(["bytes", "han+words"]))
def test_the_bounds_hold_each_other(text: str, rule: TokenRule) -> None:
    assert lengths.at_least(text, rule) <= lengths.at_most(text, rule)


@given(TEXTS.filter(bool))
def test_bytes_bound_every_byte_level_count_of_the_text_and_of_its_compatibility_form(text: str) -> None:
    most = lengths.at_most(text)
    assert most >= len(text.encode())
    assert most >= len(unicodedata.normalize("NFKC", text).encode())


@given(st.lists(TEXTS, min_size=1, max_size=4))
@example(["\ufdfa" * 1000])
def test_no_count_that_a_tokenizer_may_come_to_is_taken_for_a_mistake(texts: list[str]) -> None:
    assert tokens.credible(sum(map(lengths.at_most, texts)), texts, tokens.estimates(texts))


@given(ALIKE.filter(str.strip))
@example("推荐一些美食")
@example("hello, world 你好")
def test_baidus_own_rule_lies_within_our_bounds_for_it(text: str) -> None:
    counted = baidu_tokens(text)
    # The vendor's rule counts an empty text as one token.
    assert min(lengths.at_least(text, "han+words"), counted) <= counted
    assert counted <= max(1, lengths.at_most(text, "han+words"))


def test_words_between_spaces_are_the_fewest_tokens_there_can_be() -> None:
    assert lengths.at_least("three little words, and-one.") == 4
    assert lengths.at_least("没有空格的文字") == 1
    assert lengths.at_least("没有空格的文字 two words", "han+words") == 9
    assert lengths.at_least(" \u0301 ... \x1c ") == 0, "what a tokenizer may drop is no token"


def test_an_emoji_counts_as_two_characters_where_strings_are_utf_16() -> None:
    assert lengths.characters("a🙂") == 3
    assert InputLimit(None, 4).pieces("🙂🙂🙂") == ["🙂🙂", "🙂"]


def test_a_prefix_takes_its_part_of_the_room() -> None:
    room = InputLimit(512, 1000).without("query: ")
    assert (room.tokens, room.characters) == (512 - 7 - 4, 1000 - 7)
    assert InputLimit(512, None).without("") == InputLimit(512, None)
