import struct
from typing import Any, cast
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cache.values import MAX_TOKENS, decode, encode
from app.types import MAX_DIMENSIONS, Embedding
from tests.cache.support import embedding, key

numbers = st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=20).filter(any)
VALUE = encode(key(1), embedding(1))


@given(numbers, st.integers(0, MAX_TOKENS), st.binary(min_size=32, max_size=32))
def test_what_is_written_is_read_bit_for_bit(vector: list[float], tokens: int, name: bytes) -> None:
    given = Embedding(struct.pack(f"<{len(vector)}f", *vector), tokens)
    assert decode(name, encode(name, given)) == given


@given(st.binary(max_size=400))
def test_garbage_is_a_miss(raw: bytes) -> None:
    assert decode(key(1), raw) is None


@given(st.binary(max_size=80))
def test_garbage_behind_a_true_beginning_is_a_miss(raw: bytes) -> None:
    assert decode(key(1), VALUE[:24] + raw) is None


@given(st.integers(0, len(VALUE) - 1))
def test_a_value_cut_short_is_a_miss(length: int) -> None:
    assert decode(key(1), VALUE[:length]) is None


@given(st.integers(0, len(VALUE) * 8 - 1))
def test_one_flipped_bit_anywhere_is_a_miss(bit: int) -> None:
    broken = bytearray(VALUE)
    broken[bit // 8] ^= 1 << bit % 8
    assert decode(key(1), bytes(broken)) is None


def test_a_value_with_something_after_it_is_a_miss() -> None:
    assert decode(key(1), VALUE + b"\0\0\0\0") is None


def test_another_keys_value_is_a_miss() -> None:
    assert decode(key(2), VALUE) is None


def test_another_version_of_the_format_is_a_miss() -> None:
    assert decode(key(1), VALUE[:3] + b"\0" + VALUE[4:]) is None


def test_nor_is_another_version_of_a_sparse_vectors_value_read() -> None:
    value = encode(key(1), Embedding(embedding(1).vector, 5, b"[]"))
    assert decode(key(1), value) is not None
    assert decode(key(1), value[:3] + b"\3" + value[4:]) is None


@pytest.mark.parametrize("raw", [None, "text", 7, 1.5, [], bytearray(VALUE), OSError()])
def test_what_is_no_bytes_is_a_miss(raw: object) -> None:
    assert decode(key(1), raw) is None


def sealed(vector: bytes, tokens: int = 5) -> bytes:
    body = struct.pack("<16sQI", key(1)[:16], tokens, len(vector)) + vector
    return struct.pack("<4sI", b"EGV\x01", crc32(body)) + body


@pytest.mark.parametrize(
    "vector",
    [
        b"",
        b"\0\0\0",
        struct.pack("<2f", 0, 0),
        struct.pack("<2f", 1, float("nan")),
        struct.pack("<2f", 1, float("inf")),
        struct.pack("<f", 1) * (MAX_DIMENSIONS + 1),
    ],
    ids=["empty", "not whole", "zero", "nan", "infinity", "too long"],
)
def test_a_sound_value_that_is_no_embedding_is_a_miss(vector: bytes) -> None:
    assert decode(key(1), sealed(vector)) is None


@pytest.mark.parametrize("tokens", [MAX_TOKENS + 1, 2**64 - 1])
def test_a_sound_value_that_costs_more_than_any_input_is_a_miss(tokens: int) -> None:
    assert decode(key(1), sealed(struct.pack("<2f", 1, 2), tokens)) is None


def test_the_layout_is_the_one_documented() -> None:
    assert decode(key(1), sealed(struct.pack("<2f", 1, 2))) == Embedding(struct.pack("<2f", 1, 2), 5)


def test_a_token_count_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(struct.error):
        encode(key(1), Embedding(b"\0\0\0\0", cast("Any", -1)))
