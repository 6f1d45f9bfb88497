"""The order of the stages. Reading these two lists is reading the system."""

from __future__ import annotations

from collections.abc import Sequence

from app.cache.tiers import Tiers
from app.catalog import Model
from app.config import ModelSettings
from app.pipeline.adapt import Adapt
from app.pipeline.batcher import Batcher
from app.pipeline.cache_fill import CacheFill
from app.pipeline.cache_read import CacheRead
from app.pipeline.call import Call
from app.pipeline.deployment import Limits
from app.pipeline.prepare import Prepare
from app.types import BatchEmbedder, Embedder


def pipeline(
    batcher: Batcher, *, cache: Tiers, space: str, models: Sequence[Model], settings: ModelSettings | None
) -> Embedder:
    """A public model, from the door to its batcher: Prepare, CacheRead, Batcher (over its Route)."""
    embed: Embedder = batcher
    embed = CacheRead(embed, cache, space)
    return Prepare(embed, models, settings)


def chain(call: Call, *, cache: Tiers, limits: Limits) -> BatchEmbedder:
    """A deployment, from a slot to the wire: CacheFill, Adapt, Call."""
    embed: BatchEmbedder = call
    embed = Adapt(embed, limits)
    return CacheFill(embed, cache)
