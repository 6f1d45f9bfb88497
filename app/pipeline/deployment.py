"""A deployment is one model on one upstream; an upstream's slots bound the calls it gets at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from app.catalog import Model
from app.pipeline.health import Health
from app.types import BatchEmbedder, Lane, Params


@dataclass(slots=True)
class Limits:
    """What one call to a deployment may carry; narrowed when the upstream says so."""

    max_batch: int
    max_tokens_per_batch: int | None = None


class Slots:
    """How many calls an upstream takes at once, shared by all its models; first come, first served.

    A rate limit halves what is used of them, and every round of successes gives one back. Bulk work
    leaves a quarter to queries.
    """

    def __init__(self, count: int) -> None:
        self._most = count
        self._allowed = float(count)
        self._busy = 0
        self._waiting: deque[Callable[[], None]] = deque()

    @property
    def busy(self) -> int:
        return self._busy

    def take(self, lane: Lane) -> bool:
        """Takes a slot if one is free for this lane."""
        allowed = int(self._allowed)
        if self._busy >= allowed - (allowed // 4 if lane == "bulk" else 0):
            return False
        self._busy += 1
        return True

    def give_back(self) -> None:
        """Frees a slot and tells those who wait, in the order they came; each takes one or waits anew."""
        self._busy -= 1
        waiting, self._waiting = self._waiting, deque()
        for callback in waiting:
            callback()

    def when_free(self, callback: Callable[[], None]) -> None:
        """Calls back once, when a slot has come free."""
        if callback not in self._waiting:
            self._waiting.append(callback)

    def shrink(self) -> None:
        self._allowed = max(1.0, self._allowed / 2)

    def grow(self) -> None:
        self._allowed = min(float(self._most), self._allowed + 1 / self._allowed)


@dataclass(slots=True, eq=False)
class Deployment:
    """One model on one upstream, with the chain that embeds a batch there."""

    upstream: str
    model: Model
    space: str
    slots: Slots
    limits: Limits
    health: Health
    embed: BatchEmbedder
    weight: float = 1
    priority: int = 0

    @property
    def name(self) -> str:
        return f"{self.upstream}/{self.model.name}"

    def can(self, params: Params) -> bool:
        """Whether it honours these parameters, and does not just ignore them: one model may be reached in
        a dialect that lacks a word for them."""
        model = self.model
        return (params.input_type is None or params.input_type in model.roles) and (
            params.instruct is None or model.instruct
        )
