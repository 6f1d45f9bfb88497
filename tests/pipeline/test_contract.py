"""The contract check alone: whatever a reply's order, each input gets its own vector, or there is no answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import vectors
from app.errors import UpstreamIgnoredDimensions, UpstreamInvalidResponse
from app.pipeline import contract
from app.types import MAX_DIMENSIONS, Embedding, Parsed

BATCHES = st.integers(1, 40).flatmap(lambda count: st.tuples(st.just(count), st.permutations(range(count))))


def vector(place: int) -> bytes:
    return vectors.from_numbers([place + 1.0, 0.5])


def checked(indexes: Sequence[Any], given: Sequence[bytes] | None = None) -> list[Any]:
    found = [vector(index) for index in indexes] if given is None else given
    return contract.checked(Parsed(indexes, found), range(10, 10 + len(found)), 2)


@given(BATCHES)
def test_each_input_gets_its_own_vector_and_bill_in_whatever_order_they_came(batch: tuple[int, list[int]]) -> None:
    count, indexes = batch
    assert checked(indexes) == [Embedding(vector(place), 10 + place) for place in range(count)]


@pytest.mark.parametrize("indexes", [[0, 1, 2], range(3), [2, 1, 0], (1, 2, 0)])
def test_as_a_list_a_range_or_a_tuple(indexes: Sequence[int]) -> None:
    assert [each.vector for each in checked(indexes)] == [vector(0), vector(1), vector(2)]


@pytest.mark.parametrize(
    "indexes",
    [[0, 0, 2], [1, 2, 3], [-1, 0, 1], [0, 1], [0, 1, 2, 3], [0, True, 2], [0.0, 1, 2], ["0", "1", "2"], [0, None, 2]],
)
def test_indexes_that_are_no_permutation_are_no_answer(indexes: list[Any]) -> None:
    with pytest.raises(UpstreamInvalidResponse):
        checked(indexes, [vector(0), vector(1), vector(2)])


@pytest.mark.parametrize("output_type", ["dense", "dense&sparse"])
@pytest.mark.parametrize("given", [0, 2, 4])
def test_more_or_fewer_vectors_than_inputs_are_no_answer_whatever_the_indexes(given: int, output_type: Any) -> None:
    sparse = [[{"index": 1, "value": 0.5}]] * 3
    parsed = Parsed([0, 1, 2], [vector(place) for place in range(given)], sparse=sparse)
    with pytest.raises(UpstreamInvalidResponse):
        contract.checked(parsed, [1, 1, 1], 2, output_type)


@pytest.mark.parametrize(
    ("asked", "native", "given", "error"),
    [
        (None, 2, 2, None),
        (2, 4, 2, None),
        (None, 4, 2, UpstreamInvalidResponse),
        (1, 2, 2, UpstreamIgnoredDimensions),  # it gives its own length, whatever is requested
        (1, None, 2, UpstreamIgnoredDimensions),
        (1, 4, 2, UpstreamInvalidResponse),  # neither its own length nor the requested one
    ],
)
@pytest.mark.parametrize("beside", ["one like it", "an empty one"])
def test_a_length_that_was_not_asked_for_is_no_answer(
    beside: str, asked: int | None, native: int | None, given: int, error: type[Exception] | None
) -> None:
    vector = vectors.from_numbers([1.0] * given)
    parsed = Parsed([0, 1], [vector, b"" if beside == "an empty one" else vector])
    if error is None:
        assert len(contract.checked(parsed, [1, 1], asked, native=native)) == 2
    else:
        with pytest.raises(error) as raised:
            contract.checked(parsed, [1, 1], asked, native=native)
        assert type(raised.value) is error


@pytest.mark.parametrize(("asked", "native"), [(None, None), (None, 2), (2, None)])
@pytest.mark.parametrize("lengths", [(2, 1), (1, 2, 2), (2, 0, 1)])
def test_vectors_of_different_lengths_are_no_answer(
    lengths: Sequence[int], asked: int | None, native: int | None
) -> None:
    parsed = Parsed(range(len(lengths)), [vectors.from_numbers([1.0] * length) for length in lengths])
    with pytest.raises(UpstreamInvalidResponse, match="different lengths"):
        contract.checked(parsed, [1] * len(lengths), asked, native=native)


@pytest.mark.parametrize(("length", "fits"), [(MAX_DIMENSIONS, True), (MAX_DIMENSIONS + 1, False)])
def test_a_vector_longer_than_any_model_gives_is_none(length: int, fits: bool) -> None:
    parsed = Parsed([0], [vectors.from_numbers([1.0] * length)])
    if fits:
        assert len(contract.checked(parsed, [1], None)) == 1
    else:
        with pytest.raises(UpstreamInvalidResponse, match="65537 dimensions"):
            contract.checked(parsed, [1], None)
