"""The contract every upstream reply must keep, checked in this one place, whoever parsed it.

As many vectors as inputs, their indexes a permutation, equal lengths, the length asked for, every number
finite, none all zero. A reply that breaks it is never cached and never reaches a caller.
"""

from __future__ import annotations

from app import vectors
from app.errors import GatewayError, UpstreamInvalidResponse, UpstreamInvalidVector
from app.types import Parsed


def in_order(parsed: Parsed, count: int, dimensions: int | None) -> list[bytes | GatewayError]:
    """The vectors in the batch's order, each checked; a vector that is no vector is an error in its place.

    `dimensions` is the length that was asked for, or that the model is known to give; None accepts any,
    as long as all are equal. Raises `UpstreamInvalidResponse` where nothing in the reply can be trusted.
    """
    found = parsed.vectors
    if len(found) != count or len(parsed.indexes) != count:
        raise UpstreamInvalidResponse(f"the upstream returned {len(found)} vectors for {count} inputs")
    ordered: list[bytes | None] = [None] * count
    for index, vector in zip(parsed.indexes, found, strict=True):
        # bool is an int to Python, and a negative index would quietly count from the end.
        if type(index) is not int or not 0 <= index < count:
            raise UpstreamInvalidResponse("the upstream returned an index outside the batch")
        if ordered[index] is not None:
            raise UpstreamInvalidResponse("the upstream returned one index twice")
        ordered[index] = vector
    lengths = {len(vector) for vector in found}
    if len(lengths) != 1:
        raise UpstreamInvalidResponse("the upstream returned vectors of different lengths")
    length = lengths.pop() // 4
    if dimensions is not None and length and length != dimensions:
        raise UpstreamInvalidResponse(f"the upstream returned vectors of {length} dimensions instead of {dimensions}")
    whole = [vector for vector in ordered if vector is not None]
    if count > 1 and vectors.faultless(whole):  # nearly always, and a tenth of looking at each
        return [*whole]
    return [_checked(vector) for vector in whole]


def _checked(vector: bytes) -> bytes | GatewayError:
    fault = vectors.fault(vector)
    return vector if fault is None else UpstreamInvalidVector(f"the upstream returned a vector that {fault}")
