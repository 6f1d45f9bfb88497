"""Operations on vectors: shortening, averaging, scaling to unit length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from app import vectors
from tests.fakes import cut, unit, vector

NUMBERS = st.floats(-100, 100, width=32)


def raw(*numbers: float) -> bytes:
    return np.array(numbers, "<f4").tobytes()


@given(arrays.arrays("<f4", st.tuples(st.integers(1, 6), st.integers(1, 40)), elements=NUMBERS), st.data())
def test_a_mean_is_the_weighted_sum_at_unit_length(rows: np.ndarray, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 10_000), min_size=len(rows), max_size=len(rows)))
    total = np.array(weights, np.float64) @ rows.astype(np.float64)
    if not np.linalg.norm(total):
        return
    found = np.frombuffer(vectors.mean([row.tobytes() for row in rows], weights), "<f4")
    assert np.linalg.norm(found.astype(np.float64)) == pytest.approx(1, abs=1e-6)
    scale = np.abs(np.array(weights, np.float64)[:, None] * rows).sum()
    if np.linalg.norm(total) > 1e-6 * scale:  # otherwise rounding makes the two sums differ
        assert found @ (total / np.linalg.norm(total)) == pytest.approx(1, abs=1e-6)


def test_the_mean_of_one_direction_is_that_direction() -> None:
    assert vectors.mean([raw(3, 4)], [7]) == raw(0.6, 0.8)
    assert vectors.mean([raw(3, 4), raw(6, 8)], [1, 5]) == raw(0.6, 0.8)


def test_vectors_that_cancel_each_other_out_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no direction"):
        vectors.mean([raw(1, 0), raw(-1, 0)], [2, 2])


def test_a_shorter_vector_is_the_beginning_at_unit_length() -> None:
    full = vector("m", "text", 1024)
    assert vectors.shorten(full.tobytes(), 256) == cut(full, 256).tobytes()
    assert vectors.shorten(raw(3, 4, 5), 2) == raw(0.6, 0.8)


def test_a_vector_of_the_length_asked_for_stays_bit_for_bit() -> None:
    odd = unit(np.arange(1.0, 8.0)) * np.float32(1.5)
    assert vectors.shorten(odd.tobytes(), 7) == odd.tobytes()


@pytest.mark.parametrize(("numbers", "length"), [((1, 2), 3), ((0, 0, 1), 2)])
def test_what_cannot_be_shortened_says_so(numbers: tuple[float, ...], length: int) -> None:
    with pytest.raises(ValueError, match=r"dimensions|direction"):
        vectors.shorten(raw(*numbers), length)


def test_vectors_of_different_lengths_are_in_no_angle() -> None:
    assert vectors.cosine(raw(1, 0), raw(1, 0)) == 1
    assert vectors.cosine(raw(1, 0), raw(1, 0, 0)) == 0
