"""A refusal is studied, not relayed: a limit the upstream names is learned, a bad input is singled out.

Callers share upstream calls, so one caller's bad input must not become another's error. A batch refused
for its content is halved until the guilty input stands alone; everything else is embedded.
"""

from __future__ import annotations

import re
from dataclasses import replace

from app.errors import GatewayError, InvalidRequest
from app.pipeline.deployment import Limits
from app.types import Batch, BatchEmbedder, BatchResult

# "batch size is invalid, it should not be larger than 10", "at most 100 requests can be in one batch",
# "batch size 33 > maximum allowed batch size 32"
_LIMIT = re.compile(
    r"batch.{0,40}(?:not be larger than|maximum allowed batch size|at most|maximum of)\s*:?\s*(\d+)"
    r"|at most (\d+) \w+ can be in one batch",
    re.IGNORECASE | re.DOTALL,
)


class Adapt:
    """Keeps a deployment's batches legal as it learns what is, and isolates inputs it refuses."""

    def __init__(self, inner: BatchEmbedder, limits: Limits) -> None:
        self._inner = inner
        self._limits = limits

    async def __call__(self, batch: Batch) -> BatchResult:
        # A single culprit among n is found in 2·log2(n) calls. What takes more is not one input's fault,
        # and halving on would make a hopeless batch of n cost 2n calls.
        budget = _Budget(4 * len(batch.inputs).bit_length() + 4)
        return await self._embed(batch, budget)

    async def _embed(self, batch: Batch, budget: _Budget) -> BatchResult:
        if len(batch.inputs) > self._limits.max_batch:
            return await self._embed_parts(batch, self._limits.max_batch, budget)
        try:
            return await self._inner(batch)
        except GatewayError as error:
            if isinstance(error, InvalidRequest) and self._learn(error, len(batch.inputs)):
                return _counted(await self._embed(batch, budget))
            if not error.blames_input or len(batch.inputs) == 1:
                raise
            if not budget.take(2):
                raise
            return _counted(await self._embed_parts(batch, (len(batch.inputs) + 1) // 2, budget))

    async def _embed_parts(self, batch: Batch, size: int, budget: _Budget) -> BatchResult:
        """One after the other: the batch holds one slot. A part that fails is that part's own failure."""
        whole = BatchResult([], 0)
        for start in range(0, len(batch.inputs), size):
            part = replace(batch, inputs=batch.inputs[start : start + size], keys=batch.keys[start : start + size])
            try:
                result = await self._embed(part, budget)
            except GatewayError as error:
                result = BatchResult([error] * len(part.inputs))
            whole.outcomes += result.outcomes
            whole.calls += result.calls
        return whole

    def _learn(self, error: InvalidRequest, sent: int) -> bool:
        """Takes the rows a call may have from the upstream's own words; True if that was news."""
        match = _LIMIT.search(error.message)
        limit = int(match[1] or match[2]) if match else 0
        if not 0 < limit < sent:
            return False
        self._limits.max_batch = limit
        return True


class _Budget:
    """Extra calls one batch may still cause."""

    def __init__(self, calls: int) -> None:
        self._calls = calls

    def take(self, calls: int) -> bool:
        self._calls -= calls
        return self._calls >= 0


def _counted(result: BatchResult) -> BatchResult:
    """With the call that was refused."""
    result.calls += 1
    return result
