"""The contract every upstream reply must keep, checked in this one place, whichever adapter parsed it.

As many vectors as inputs, their indexes a permutation, equal lengths, the length requested, every number finite, none
all zero; in a sparse vector no index repeated. A reply that breaks it is never cached and never reaches a caller.
"""

from __future__ import annotations

from collections.abc import Sequence

from app import vectors
from app.errors import (
    GatewayError,
    UpstreamIgnoredDimensions,
    UpstreamInvalidResponse,
    UpstreamInvalidVector,
    UpstreamMisconfigured,
    UpstreamWrongCount,
)
from app.types import MAX_DIMENSIONS, Embedding, OutputType, Parsed


def checked(
    parsed: Parsed,
    bills: Sequence[int],
    dimensions: int | None,
    output_type: OutputType = "dense",
    *,
    native: int | None = None,
) -> list[Embedding | GatewayError]:
    """The embeddings in batch order, each checked; an invalid vector is an error in its place.

    `bills`: tokens of each input. `dimensions` is the length requested, `native` the model's known default; None
    accepts any, as long as all are equal. Raises `UpstreamInvalidResponse` if nothing in the reply can be trusted, and
    `UpstreamIgnoredDimensions` if the model returns its default length whatever is requested.
    """
    returned, count = parsed.vectors, len(bills)
    if len(returned) != count or len(parsed.indexes) != count:
        raise UpstreamWrongCount(f"the upstream returned {len(returned)} vectors for {count} inputs")
    order = _order(parsed.indexes)
    ordered = returned if order is None else [returned[place] for place in order]
    faults = {} if output_type == "sparse" else _faults(ordered, dimensions, native)
    embeddings: list[Embedding | GatewayError]
    if output_type == "dense":
        embeddings = list(map(Embedding, ordered, bills))
    else:
        if parsed.sparse is None or len(parsed.sparse) != count:
            raise UpstreamInvalidResponse("the upstream returned no sparse vectors")
        embeddings = list(
            map(Embedding, ordered, bills, [_sparse(parsed.sparse[place]) for place in order or range(count)])
        )
    for i, fault in faults.items():
        embeddings[i] = UpstreamInvalidVector(f"the upstream returned a vector that {fault}")
    return embeddings


def same_model(named: object, name: str) -> None:
    """Raises if a reply names another model than the one requested: some servers have one model, and give its vectors
    whatever is requested. A prefix or a version is no other name: OpenAI calls ada-002 `text-embedding-ada-002-v2`."""
    if named is not None and not (isinstance(named, str) and name in named):
        other = f"'{named}'" if isinstance(named, str) and len(named) <= 256 else "another"  # whole, to be redacted
        raise UpstreamMisconfigured(
            f"the upstream's reply is of the model {other} instead of '{name}'. It has no list of models: "
            "what it has must be named in `models` of the configuration"
        )


def _order(indexes: Sequence[int]) -> Sequence[int] | None:
    """For each input, the index of its vector in the reply; None if they are in order."""
    places = list(range(len(indexes)))
    integral = set(map(type, indexes)) <= {int}  # bool is an int to Python, and 1.0 equals 1
    if integral and [*indexes] == places:  # nearly always
        return None
    if not integral or min(indexes) < 0 or max(indexes) >= len(indexes):
        raise UpstreamInvalidResponse("the upstream returned an index outside the batch")
    if sorted(indexes) != places:
        raise UpstreamInvalidResponse("the upstream returned one index twice")
    order = [0] * len(indexes)
    for place, index in enumerate(indexes):
        order[index] = place
    return order


def _faults(ordered: Sequence[bytes], dimensions: int | None, native: int | None) -> dict[int, str]:
    """By index, what is wrong with each vector that is not an embedding."""
    lengths = set(map(len, ordered))
    if len(lengths - {0}) > 1:
        raise UpstreamInvalidResponse("the upstream returned vectors of different lengths")
    length, expected = max(lengths) // 4, dimensions or native
    if length > MAX_DIMENSIONS:
        raise UpstreamInvalidResponse(f"the upstream returned vectors of {length} dimensions, which no model has")
    if expected is not None and length and length != expected:
        if dimensions is not None and native in (None, length):
            raise UpstreamIgnoredDimensions(
                f"the upstream returned its own {length} dimensions, not the {dimensions} requested"
            )
        raise UpstreamInvalidResponse(f"the upstream returned vectors of {length} dimensions instead of {expected}")
    # Nearly always, and a tenth of the time of checking each.
    if len(ordered) > 1 and len(lengths) == 1 and vectors.faultless(ordered):
        return {}
    return {i: fault for i, vector in enumerate(ordered) if (fault := vectors.fault(vector)) is not None}


def _sparse(given: object) -> bytes:
    """A sparse vector as it is cached and answered: JSON, no index repeated, every value finite."""
    try:
        return vectors.sparse(given)
    except (KeyError, TypeError, ValueError):
        raise UpstreamInvalidResponse("the upstream returned an invalid sparse vector") from None
