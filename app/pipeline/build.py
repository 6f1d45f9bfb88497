"""Puts the stages together, the innermost first: those of a public model, above its batcher, and those of a deployment,
below its slots. What is between them, a `Batcher` over its `Route`, is built by `Fleet`."""

from __future__ import annotations

from collections.abc import Sequence

from app.cache.tiers import Tiers
from app.catalog import Model
from app.clock import Clock
from app.config import ModelSettings
from app.pipeline.adapt import Adapt
from app.pipeline.cache_fill import CacheFill
from app.pipeline.cache_read import CacheRead
from app.pipeline.call import Call
from app.pipeline.claim import Claim
from app.pipeline.deployment import CallLimits
from app.pipeline.long_inputs import LongInputs
from app.pipeline.prefix import Prefix
from app.pipeline.prepare import Prepare
from app.pipeline.shape import Shape
from app.types import BatchEmbedder, Embedder


def pipeline(
    embed: Embedder, *, name: str, cache: Tiers, space: str, models: Sequence[Model], settings: ModelSettings | None
) -> Prepare:
    """A public model's stages, in a request's order: Prepare, LongInputs, Shape, CacheRead, Claim (if there are
    replicas to share with); then `embed`, its batcher."""
    if cache.shared:
        embed = Claim(embed, cache)
    lengths = {model.dimensions for model in models}
    embed = CacheRead(embed, cache, space, lengths.pop() if len(lengths) == 1 else None)
    embed = Shape(embed, models, settings)
    embed = LongInputs(embed, models, settings)
    return Prepare(embed, name, models, settings)


def chain(call: Call, *, name: str, cache: Tiers, limits: CallLimits, model: Model, clock: Clock) -> BatchEmbedder:
    """A deployment's stages, from a slot to the wire: Adapt, CacheFill, Prefix, Call. CacheFill sees every call: if a
    batch takes several, the embeddings of the first ones are kept whatever becomes of the rest."""
    embed: BatchEmbedder = call
    embed = Prefix(embed, model)
    embed = CacheFill(embed, cache)
    return Adapt(embed, limits, name, clock, model.max_tokens_per_input)
