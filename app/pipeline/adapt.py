"""A refusal is studied, not relayed: a limit the upstream names is learned, a bad input is singled out.

Callers share upstream calls, so one caller's bad input must not become another's error. A batch refused
for its content is halved until the guilty input stands alone; everything else is embedded.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import accumulate

from app import tokens
from app.errors import GatewayError, InvalidRequest
from app.pipeline.deployment import Limits
from app.types import Batch, BatchEmbedder, BatchResult

# Rows of one call: "batch size is invalid, it should not be larger than 10", "at most 100 requests can be in one
# batch", "batch size 33 > maximum allowed batch size 32"
_ROWS = re.compile(
    r"batch.{0,40}(?:not be larger than|maximum allowed batch size|at most|maximum of)\s*:?\s*(\d+)"
    r"|at most (\d+) \w+ can be in one batch",
    re.IGNORECASE | re.DOTALL,
)
# Tokens of one call: "Requested 312000 tokens, max 300000 tokens per request", "at most 20000 tokens in one batch".
# What one input may have is no limit of calls: it stays the caller's to know.
_TOKENS = re.compile(
    r"(?:max(?:imum)?(?: of)?|at most|limit(?: is| of)?|exceeds?|larger than)\D{0,20}?(\d+) (?:input )?tokens?"
    r"\s+(?:(?:summed|in total|total)\s+)?(?:per|in|for|across)\s+(?:a |an |one |each |all )?"
    r"(?:request|batch|call|inputs)"
    r"|tokens? per (?:request|batch|call)\D{0,40}?(\d+)",
    re.IGNORECASE,
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
        legal = self._legal(batch)
        if legal < len(batch.inputs):
            return await self._embed_parts(batch, legal, budget)
        try:
            return await self._inner(batch)
        except GatewayError as error:
            if isinstance(error, InvalidRequest) and self._learn(error, batch):
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

    def _legal(self, batch: Batch) -> int:
        """How many inputs a call may have so that any so many of these in a row are within the limits."""
        most, room = self._limits.max_batch, self._limits.max_tokens_per_batch
        if room is None or len(batch.inputs) == 1:
            return most
        bounds = [tokens.bound(text) for text in batch.inputs]
        if sum(bounds) > room:
            bounds.sort(reverse=True)
            most = min(most, next(i for i, total in enumerate(accumulate(bounds)) if total > room))
        return max(1, most)

    def _learn(self, error: InvalidRequest, batch: Batch) -> bool:
        """Takes what a call may carry from the upstream's own words; True if that was news.

        Tokens are kept by their upper bound, a byte each, as everywhere where a call is filled: a call may go out
        emptier than it could, and never comes back.
        """
        rows, room = _stated(_ROWS, error.message), _stated(_TOKENS, error.message)
        if rows and rows < len(batch.inputs):
            self._limits.max_batch = min(rows, self._limits.max_batch)
            return True
        known = self._limits.max_tokens_per_batch
        if room and (known is None or room < known) and room < sum(map(tokens.bound, batch.inputs)):
            self._limits.max_tokens_per_batch = room
            return len(batch.inputs) > 1
        return False


def _stated(words: re.Pattern[str], message: str) -> int:
    """The limit that these words state, or 0."""
    match = words.search(message)
    return int(next(filter(None, match.groups()))) if match else 0


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
