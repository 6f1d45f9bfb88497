"""The token counts that upstreams report, and which of them are possible."""

from __future__ import annotations

from app import tokens
from app.types import Media


def test_an_image_may_be_many_tokens_and_a_word_may_not() -> None:
    image = Media("image", "data:image/png;base64,AAAA")
    assert tokens.credible(1_000_000, ["word", image], [1, 1])
    assert not tokens.credible(1_000_000, ["word", "word"], [1, 1])
