"""Turns the upstream's vector into the one that the caller wants: shorter, or of unit length.

Above the cache, which keeps the upstream's own: one entry serves every length, and vectors made with different settings
cannot mix.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from app import vectors
from app.catalog import Model, combined
from app.config import ModelSettings
from app.errors import UnsupportedDimensions
from app.types import Embedder, Embedding, EmbedRequest, EmbedResult


class Shape:
    """Shortens vectors if that is up to the gateway and not the upstream (`Model.matryoshka_dimensions`); normalises
    them if configured."""

    def __init__(self, inner: Embedder, models: Sequence[Model], settings: ModelSettings | None) -> None:
        self._inner = inner
        self._cuts = combined(models).matryoshka_dimensions is not None
        self._normalises = settings is not None and settings.normalize

    async def __call__(self, request: EmbedRequest) -> EmbedResult:
        dimensions = request.params.dimensions if self._cuts else None
        if dimensions is not None:
            request = replace(request, params=replace(request.params, dimensions=None))
        result = await self._inner(request)
        if dimensions is not None:
            positions = request.positions or range(len(result.embeddings))
            try:
                pairs = zip(positions, result.embeddings, strict=True)
                result.embeddings = [_shortened(i, each, dimensions) for i, each in pairs]
            except UnsupportedDimensions as error:
                error.calls = result.calls
                raise
        if self._normalises:
            result.embeddings = [_normalised(each) for each in result.embeddings]
        return result


# Both return new objects: the cache's own are shared.


def _shortened(i: int, embedding: Embedding, dimensions: int) -> Embedding:
    """Raises `UnsupportedDimensions`, which names `input[i]` if only this one's vector cannot be shortened."""
    if not embedding.vector:
        return embedding
    try:
        return Embedding(vectors.shorten(embedding.vector, dimensions), embedding.tokens, embedding.sparse)
    except ValueError as fault:
        if vectors.dimensions(embedding.vector) < dimensions:
            raise UnsupportedDimensions(f"this model's vector {fault}", param="dimensions") from None
        message = f"input[{i}] has no vector of {dimensions} dimensions: the first {dimensions} numbers are all zero"
        raise UnsupportedDimensions(message, param=f"input[{i}]") from None


def _normalised(embedding: Embedding) -> Embedding:
    if not embedding.vector:
        return embedding
    return Embedding(vectors.normalise(embedding.vector), embedding.tokens, embedding.sparse)
