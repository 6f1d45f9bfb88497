"""Tells a model a text's role within the text, where that is how it is told: `search_query: …`.

Below the cache and the batcher, which know the role and the caller's own words.
"""

from __future__ import annotations

from msgspec.structs import replace

from app.catalog import Model, Role
from app.types import Batch, BatchEmbedder, BatchResult


def prefix_of(model: Model, role: Role | None, instruct: str | None = None) -> str:
    """What stands before a text of this role."""
    if role is None or not model.prefixes:
        return ""
    prefix = model.prefixes[model.roles.index(role)]
    # An operator's own prefix has no instruction in it, whatever it looks like.
    return prefix.replace("{instruct}", instruct or model.instruction) if model.instruction else prefix


class Prefix:
    """Puts the role's prefix before every input of a batch; then the role is told, and no parameter any more."""

    def __init__(self, inner: BatchEmbedder, model: Model) -> None:
        self._inner = inner
        self._model = model

    async def __call__(self, batch: Batch) -> BatchResult:
        params = batch.params
        if not self._model.prefixes or params.input_type is None:
            return await self._inner(batch)
        prefix = prefix_of(self._model, params.input_type, params.instruct)
        inputs = [prefix + each if isinstance(each, str) else each for each in batch.inputs]
        told = replace(params, input_type=None, instruct=None)
        return await self._inner(replace(batch, inputs=inputs, params=told))
