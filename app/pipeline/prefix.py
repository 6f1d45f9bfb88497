"""Puts a text's role before the text (`search_query: …`), for models that are told it that way.

Below the cache and the batcher, which work with the role and the caller's own text.
"""

from __future__ import annotations

from msgspec.structs import replace

from app.catalog import Model, Role
from app.types import Batch, BatchEmbedder, BatchResult


def prefix_of(model: Model, role: Role | None, instruct: str | None) -> str:
    """The prefix of a text in this role."""
    if role is None or not model.prefixes:
        return ""
    prefix = model.prefixes[model.roles.index(role)]
    # In an operator's own prefix, `{instruct}` is plain text.
    return prefix.replace("{instruct}", instruct or model.instruction) if model.instruction else prefix


class Prefix:
    """Puts the role's prefix before every text of a batch, and clears the parameters that it expresses."""

    def __init__(self, inner: BatchEmbedder, model: Model) -> None:
        self._inner = inner
        self._model = model

    async def __call__(self, batch: Batch) -> BatchResult:
        params = batch.params
        if not self._model.prefixes or params.input_type is None:
            return await self._inner(batch)
        prefix = prefix_of(self._model, params.input_type, params.instruct)
        inputs = [prefix + each if isinstance(each, str) else each for each in batch.inputs]
        cleared = replace(params, input_type=None, instruct=None)
        return await self._inner(replace(batch, inputs=inputs, params=cleared))
