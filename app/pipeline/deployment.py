"""A deployment is one model on one upstream; an upstream's slots bound its concurrent calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from app import tokens
from app.catalog import Model, Role
from app.errors import GatewayError
from app.pipeline.health import Health
from app.pipeline.pace import Pace
from app.pipeline.standing import Standing
from app.types import Batch, BatchEmbedder, Embedding, Input, Lane, Media, OutputType, Params


@dataclass(slots=True)
class CallLimits:
    """What one call to a deployment may carry. Narrowed for a while when the upstream says so."""

    max_batch: int
    max_tokens_per_batch: int | None = None
    images: int = 0
    videos: int = 0

    def surely_allow(self, inputs: Sequence[Input]) -> bool:
        """Whether one call may carry these, decided at a glance. False may also mean that a closer look is needed;
        for texts that is rare."""
        max_tokens = self.max_tokens_per_batch
        return (
            len(inputs) <= self.max_batch
            and Media not in set(map(type, inputs))
            and (max_tokens is None or tokens.surely_within(max_tokens, inputs))
        )


class BatchSpace:
    """The space left in a call while it is filled."""

    __slots__ = ("_empty", "_media", "_paced_tokens", "_tokens")

    def __init__(self, limits: CallLimits, tokens_per_call: float | None = None) -> None:
        """`tokens_per_call`: a second limit, on estimated tokens, if there is a pace."""
        self._tokens, self._paced_tokens = limits.max_tokens_per_batch, tokens_per_call
        self._media = {"image": limits.images, "video": limits.videos}
        self._empty = True

    def take(self, given: Input) -> bool:
        """Takes the input if it fits, and returns whether it does. The first text always fits."""
        kind = given.kind if type(given) is Media else None
        if kind and not self._media[kind]:
            return False
        upper_bound = 0 if self._tokens is None else tokens.upper_bound(given)
        estimate = 0 if self._paced_tokens is None else tokens.estimate(given)
        if not self._empty and (upper_bound > (self._tokens or 0) or estimate > (self._paced_tokens or 0)):
            return False
        if kind:
            self._media[kind] -= 1
        if self._tokens is not None:
            self._tokens -= upper_bound
        if self._paced_tokens is not None:
            self._paced_tokens -= estimate
        self._empty = False
        return True


class Slots:
    """How many concurrent calls an upstream takes and at which pace, shared by all its models. Of those that wait, the
    least recently served goes first.

    A rate limit halves both, and successes restore them. Bulk work leaves a quarter of the slots to queries.
    """

    def __init__(self, count: int, pace: Pace | None = None) -> None:
        self._max = count
        self._allowed = float(count)
        self.busy = 0
        """Calls in flight."""
        self.pace = pace
        """Counts calls and their tokens, if the upstream has rate limits."""
        self._waiting: dict[Callable[[], None], float] = {}
        if pace:
            pace.on_ready = self.notify

    def take(self, lane: Lane, *, ahead: bool = False) -> bool:
        """Takes a slot if one is free for this lane and the pace allows a call. `ahead`: does not wait for the
        pace; later calls pay that back."""
        if not self._free(lane):
            return False
        if self.pace:
            if not ahead and self.pace.wait():
                return False
            self.pace.charge(1, 0)
        self.busy += 1
        return True

    def has_spare(self, lane: Lane) -> bool:
        """Whether a call costs nothing here: it could start at once, and no pace counts it."""
        return self.pace is None and self._free(lane)

    def _free(self, lane: Lane) -> bool:
        allowed = int(self._allowed)
        return self.busy < allowed - (allowed // 4 if lane == "bulk" else 0)

    def give_back(self) -> None:
        """Frees a slot and calls back those who wait."""
        self.busy -= 1
        self.notify()

    def notify(self) -> None:
        """Calls back all that wait, in order: each takes a slot or waits again."""
        waiting, self._waiting = self._waiting, {}
        for callback in sorted(waiting, key=waiting.__getitem__):
            callback()

    def when_free(self, callback: Callable[[], None], since: float) -> None:
        """Calls back once, when a slot may have come free. Callbacks with an earlier `since` go first."""
        self._waiting[callback] = since

    def forget(self, callback: Callable[[], None]) -> None:
        """Cancels `when_free`."""
        self._waiting.pop(callback, None)

    def wait(self) -> float:
        """Seconds until the pace allows a call, whether or not a slot is free."""
        return self.pace.wait() if self.pace else 0.0

    def time_for(self, calls: float, tokens: float) -> float:
        """Seconds until the pace allows a call after this much."""
        return self.pace.time_for(calls, tokens) if self.pace else 0.0

    def shrink(self) -> None:
        """A rate limit was reached: halves the concurrent calls, down to one, and the pace."""
        self._allowed = max(1.0, self._allowed / 2)
        if self.pace:
            self.pace.slow_down()

    def grow(self) -> None:
        """A call succeeded. As many successes as calls are allowed at once allow one more; the pace recovers a
        little."""
        self._allowed = min(float(self._max), self._allowed + 1 / self._allowed)
        if self.pace:
            self.pace.recover()


@dataclass(slots=True, unsafe_hash=True)
class Deployment:
    """One model on one upstream, with the chain that embeds a batch there, and its weight and priority under a public
    name. Names whose deployments are equal share calls."""

    upstream: str
    model: Model
    space: str
    slots: Slots
    limits: CallLimits = field(compare=False)
    health: Health
    embed: BatchEmbedder = field(compare=False)
    """Never raises `GatewayError`: a failure is an input's outcome."""
    weight: float = 1
    priority: int = 1
    standing: Standing = field(init=False, compare=False)
    """Its health's."""

    def __post_init__(self) -> None:
        self.standing = self.health.standing

    @property
    def name(self) -> str:
        return f"{self.upstream}/{self.model.name}"

    async def ask(self, text: str, seconds: float) -> Embedding | GatewayError | None:
        """Embeds one text here, past every queue and cache; None if there is no answer in time."""
        deadline = asyncio.get_running_loop().time() + seconds
        batch = Batch(self.model.name, [text], [b""], Params(), store=False, deadline=deadline)
        try:
            async with asyncio.timeout_at(deadline):
                (outcome,) = (await self.embed(batch)).outcomes
        except TimeoutError:
            return None
        return outcome


Requirements: TypeAlias = tuple[Role | None, OutputType, bool]
"""What parameters require of a model: a role, an output type, and whether they carry no instruction."""


def requirements(params: Params) -> Requirements:
    """All that `honours` looks at: the same deployments serve all parameters with equal requirements."""
    return params.input_type, params.output_type, params.instruct is None


def honours(model: Model, params: Params) -> bool:
    """Whether a model honours these parameters. A dialect without a word for them would leave them out, and the vector
    would be that of another request."""
    return (
        (params.input_type is None or params.input_type in model.roles)
        and (params.instruct is None or _takes_instruction(model, params.input_type))
        and (params.output_type == "dense" or model.sparse)
    )


def _takes_instruction(model: Model, role: Role | None) -> bool:
    """Whether it takes an instruction with a text in this role: if it is told within the text, the prefix has to have
    a place for it."""
    if not model.prefixes:
        return model.instruct
    return model.instruct and role is not None and "{instruct}" in model.prefixes[model.roles.index(role)]
