"""The contract every upstream reply must keep, checked in this one place, whoever parsed it.

As many vectors as inputs, their indexes a permutation, equal lengths, the length asked for, every number finite, none
all zero; in a sparse vector each place once. A reply that breaks it is never cached and never reaches a caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from app import vectors
from app.errors import GatewayError, UpstreamInvalidResponse, UpstreamInvalidVector
from app.types import OutputType, Parsed

Vectors: TypeAlias = tuple[bytes, bytes | None]
"""One input's: the dense one, empty where none was asked for, and the sparse one, None likewise."""


def in_order(
    parsed: Parsed, count: int, dimensions: int | None, output_type: OutputType = "dense"
) -> list[Vectors | GatewayError]:
    """The vectors in the batch's order, each checked; a vector that is no vector is an error in its place.

    `dimensions` is the length that was asked for, or that the model is known to give; None accepts any,
    as long as all are equal. Raises `UpstreamInvalidResponse` where nothing in the reply can be trusted.
    """
    found = parsed.vectors
    if len(found) != count or len(parsed.indexes) != count:
        raise UpstreamInvalidResponse(f"the upstream returned {len(found)} vectors for {count} inputs")
    places: list[int | None] = [None] * count
    for place, index in enumerate(parsed.indexes):
        # bool is an int to Python, and a negative index would quietly count from the end.
        if type(index) is not int or not 0 <= index < count:
            raise UpstreamInvalidResponse("the upstream returned an index outside the batch")
        if places[index] is not None:
            raise UpstreamInvalidResponse("the upstream returned one index twice")
        places[index] = place
    order = [place for place in places if place is not None]
    whole = [found[place] for place in order]
    dense = [*whole] if output_type == "sparse" else _dense(whole, dimensions)
    if output_type == "dense":
        return [each if isinstance(each, GatewayError) else (each, None) for each in dense]
    if parsed.sparse is None or len(parsed.sparse) != count:
        raise UpstreamInvalidResponse("the upstream returned no sparse vectors")
    sparse = [_sparse(parsed.sparse[place]) for place in order]
    return [one if isinstance(one, GatewayError) else (one, other) for one, other in zip(dense, sparse, strict=True)]


def _dense(whole: list[bytes], dimensions: int | None) -> Sequence[bytes | GatewayError]:
    lengths = set(map(len, whole))
    if len(lengths) != 1:
        raise UpstreamInvalidResponse("the upstream returned vectors of different lengths")
    length = lengths.pop() // 4
    if dimensions is not None and length and length != dimensions:
        raise UpstreamInvalidResponse(f"the upstream returned vectors of {length} dimensions instead of {dimensions}")
    if len(whole) > 1 and vectors.faultless(whole):  # nearly always, and a tenth of looking at each
        return whole
    return [_checked(vector) for vector in whole]


def _checked(vector: bytes) -> bytes | GatewayError:
    fault = vectors.fault(vector)
    return vector if fault is None else UpstreamInvalidVector(f"the upstream returned a vector that {fault}")


def _sparse(given: object) -> bytes:
    """As it is kept and answered: JSON, each place once, every value finite."""
    try:
        return vectors.sparse(given)
    except (KeyError, TypeError, ValueError):
        raise UpstreamInvalidResponse("the upstream returned a sparse vector that is none") from None
