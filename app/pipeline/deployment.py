"""A deployment is one model on one upstream; an upstream's slots bound the calls it gets at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from app import tokens
from app.catalog import Model, Role
from app.pipeline.health import Health
from app.pipeline.pace import Pace
from app.types import BatchEmbedder, Input, Lane, Media, OutputType, Params


@dataclass(slots=True)
class CallLimits:
    """What one call to a deployment may carry; narrowed when the upstream says so."""

    max_batch: int
    max_tokens_per_batch: int | None = None
    images: int = 0
    videos: int = 0

    def surely_allow(self, inputs: Sequence[Input]) -> bool:
        """Whether one call may carry these. False may also mean that it does not show at a glance; for texts it nearly
        always does."""
        most = self.max_tokens_per_batch
        return (
            len(inputs) <= self.max_batch
            and Media not in set(map(type, inputs))
            and (most is None or tokens.surely_within(most, inputs))
        )


class BatchSpace:
    """What room a call has left while it is filled."""

    __slots__ = ("_empty", "_media", "_portion", "_tokens")

    def __init__(self, limits: CallLimits, tokens_per_call: float | None = None) -> None:
        """`tokens_per_call`: tokens, by estimate, that it may carry besides, where there is a pace."""
        self._tokens, self._portion = limits.max_tokens_per_batch, tokens_per_call
        self._media = {"image": limits.images, "video": limits.videos}
        self._empty = True

    def take(self, given: Input) -> bool:
        """Takes the input, if there is room for it, and says whether. The first text always has room."""
        kind = given.kind if type(given) is Media else None
        if kind and not self._media[kind]:
            return False
        upper_bound = 0 if self._tokens is None else tokens.upper_bound(given)
        estimate = 0 if self._portion is None else tokens.estimate(given)
        if not self._empty and (upper_bound > (self._tokens or 0) or estimate > (self._portion or 0)):
            return False
        if kind:
            self._media[kind] -= 1
        if self._tokens is not None:
            self._tokens -= upper_bound
        if self._portion is not None:
            self._portion -= estimate
        self._empty = False
        return True


class Slots:
    """How many calls an upstream takes at once and at which pace, shared by all its models. Of those that wait, the one
    that was served longest ago comes first.

    A rate limit halves both, and successes give them back. Bulk work leaves a quarter of the slots to queries.
    """

    def __init__(self, count: int, pace: Pace | None = None) -> None:
        self._most = count
        self._allowed = float(count)
        self.busy = 0
        """Calls under way."""
        self.pace = pace
        """Counts calls and their tokens, where the upstream has rate limits."""
        self._waiting: dict[Callable[[], None], float] = {}
        if pace:
            pace.on_ready = self.notify

    def take(self, lane: Lane, *, ahead: bool = False) -> bool:
        """Takes a slot if one is free for this lane and the pace allows a call. `ahead` does not wait for the
        pace, which is paid back by those who come later."""
        if not self._free(lane):
            return False
        if self.pace:
            if not ahead and self.pace.wait():
                return False
            self.pace.charge(1, 0)
        self.busy += 1
        return True

    def has_spare(self, lane: Lane) -> bool:
        """Whether calls cost nothing here: another one could start at once, and no pace counts them."""
        return self.pace is None and self._free(lane)

    def _free(self, lane: Lane) -> bool:
        allowed = int(self._allowed)
        return self.busy < allowed - (allowed // 4 if lane == "bulk" else 0)

    def give_back(self) -> None:
        """Frees a slot and tells those who wait."""
        self.busy -= 1
        self.notify()

    def notify(self) -> None:
        """Calls back all that wait, in their order: each takes a slot or waits anew."""
        waiting, self._waiting = self._waiting, {}
        for callback in sorted(waiting, key=waiting.__getitem__):
            callback()

    def when_free(self, callback: Callable[[], None], since: float) -> None:
        """Calls back once, when a slot may have come free. Callbacks with an earlier `since` go first."""
        self._waiting[callback] = since

    def forget(self, callback: Callable[[], None]) -> None:
        """Does not call back any more."""
        self._waiting.pop(callback, None)

    def wait(self) -> float:
        """Seconds until the pace allows a call, whether a slot is free or not."""
        return self.pace.wait() if self.pace else 0.0

    def time_for(self, calls: float, tokens: float) -> float:
        """Seconds that so much would take at this pace."""
        return self.pace.time_for(calls, tokens) if self.pace else 0.0

    def shrink(self) -> None:
        """A rate limit was reached: half as many calls at once, one at least, and half the pace."""
        self._allowed = max(1.0, self._allowed / 2)
        if self.pace:
            self.pace.slow_down()

    def grow(self) -> None:
        """A call succeeded. As many of these as calls are allowed at once allow one more; and the pace regains a
        little."""
        self._allowed = min(float(self._most), self._allowed + 1 / self._allowed)
        if self.pace:
            self.pace.recover()


@dataclass(slots=True, unsafe_hash=True)
class Deployment:
    """One model on one upstream, with the chain that embeds a batch there, and the weight and priority that it has
    under a name. Names whose deployments are equal share calls."""

    upstream: str
    model: Model
    space: str
    slots: Slots
    limits: CallLimits = field(compare=False)
    health: Health
    embed: BatchEmbedder = field(compare=False)
    """Never raises `GatewayError`: what fails is an input's outcome."""
    weight: float = 1
    priority: int = 1

    @property
    def name(self) -> str:
        return f"{self.upstream}/{self.model.name}"

    def supports(self, params: Params) -> bool:
        """Whether it honours these parameters."""
        return honours(self.model, params)


Kind: TypeAlias = tuple[Role | None, OutputType, bool]
"""Of parameters: role, form, and whether there is no instruction."""


def kind(params: Params) -> Kind:
    """All that `honours` looks at: the same deployments serve all parameters of one kind."""
    return params.input_type, params.output_type, params.instruct is None


def honours(model: Model, params: Params) -> bool:
    """Whether a model honours these parameters. In a dialect that has no word for them they would be left out, and the
    vector be that of another request."""
    return (
        (params.input_type is None or params.input_type in model.roles)
        and (params.instruct is None or model.instruct)
        and (params.output_type == "dense" or model.sparse)
    )
