"""Requests and batches for some of the inputs, and merging their results back into the whole."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from msgspec.structs import replace

from app.types import Batch, Embedding, EmbedRequest, EmbedResult

_VECTOR = attrgetter("vector")


def sub_request(request: EmbedRequest, indexes: Sequence[int]) -> EmbedRequest:
    """The request for the inputs at `indexes`, with their positions in the caller's request."""
    positions = request.positions
    return replace(
        request,
        inputs=[request.inputs[i] for i in indexes],
        keys=[request.keys[i] for i in indexes],
        positions=indexes if positions is None else [positions[i] for i in indexes],
    )


def merge_result(whole: EmbedResult, indexes: Sequence[int], result: EmbedResult) -> None:
    """Merges the result for the inputs at `indexes` into the whole."""
    for i, embedding, source in zip(indexes, result.embeddings, result.sources, strict=True):
        whole.embeddings[i], whole.sources[i] = embedding, source
    whole.calls += result.calls
    whole.deployments = tuple(dict.fromkeys((*whole.deployments, *result.deployments)))
    whole.too_long |= {indexes[i]: error for i, error in result.too_long.items()}


def mixed_lengths(embeddings: Sequence[Embedding]) -> bool:
    """Whether their vectors differ in length, ignoring empty ones. If a model's length is known, each call was checked
    against it; if not, a call could only be checked within itself."""
    return len(set(map(len, map(_VECTOR, embeddings))) - {0}) > 1


def sub_batch(batch: Batch, indexes: Sequence[int]) -> Batch:
    """The batch of the inputs at `indexes`, in that order."""
    return replace(batch, inputs=[batch.inputs[i] for i in indexes], keys=[batch.keys[i] for i in indexes])
