"""Learns from an upstream's refusals instead of relaying them: adopts the limits they name, and isolates bad inputs.

Callers share upstream calls, so one caller's bad input must not become another's error. A batch refused for its content
is bisected until the bad input is alone; everything else is embedded.

Only limits of a call are learned: its rows, and its tokens. How long a single input may be is left to the upstream:
only its tokenizer can tell, so refusing an input before sending it would be a guess. Such an input is isolated, and the
upstream's message about it reaches the caller (or `LongInputs`, which cuts it).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from app import tokens
from app.clock import Clock
from app.errors import (
    ContextLengthExceeded,
    GatewayError,
    InvalidRequest,
    UpstreamUnavailable,
    UpstreamWrongCount,
)
from app.pipeline.deployment import BatchSpace, CallLimits
from app.pipeline.parts import sub_batch
from app.types import Batch, BatchEmbedder, BatchResult, Embedding, Input
from app.upstreams import stated
from app.upstreams.redact import quotable, quotes_input
from app.upstreams.replies import upstream_message

log = logging.getLogger(__name__)

LEARNED_FOR = 600.0
"""Seconds that a learned limit is kept, because a moment's trouble may look like one. A real one is then learned again
from the next call that exceeds it."""
MAX_FRUITLESS_CALLS = 2
"""Consecutive calls with one input to which a server returned no vector, after which the batch's other inputs are not
tried: they would hardly fare better."""


class Adapt:
    """Keeps a deployment's batches within the limits learned lately, and isolates inputs it refuses.

    `name`: the deployment's, for the log. `max_input_tokens`: maximum tokens of one input, if known.
    """

    def __init__(
        self, inner: BatchEmbedder, limits: CallLimits, name: str, clock: Clock, max_input_tokens: int | None = None
    ) -> None:
        self._inner, self._name, self._clock = inner, name, clock
        self._limits, self._max_input_tokens = limits, max_input_tokens
        self._configured = limits.max_batch, limits.max_tokens_per_batch
        self._learned_until: float | None = None
        """When the configured limits are in force again; None while they are."""

    async def __call__(self, batch: Batch) -> BatchResult:
        if self._learned_until is not None and self._clock.monotonic() >= self._learned_until:
            self._learned_until = None
            self._limits.max_batch, self._limits.max_tokens_per_batch = self._configured
        # Bisection finds a single bad input among n in 2·log2(n) calls. If it takes more, no single input is at fault,
        # and going on would cost a hopeless batch of n 2n calls.
        budget = _Budget(4 * len(batch.inputs).bit_length() + 4)
        result = await self._embed(batch, budget)
        if budget.undecided:
            _settle(batch, result.outcomes, budget.undecided)
        return result

    async def _embed(self, batch: Batch, budget: _Budget) -> BatchResult:
        parts = _split(batch.inputs, self._limits)
        if len(parts) > 1:
            return await self._embed_parts(batch, parts, budget)
        if budget.calls_made:
            batch.on_further_call()
        budget.calls_made += 1
        try:
            result = await self._inner(batch)
            budget.fruitless_calls = 0
            return result
        except GatewayError as error:
            refusal = error.without_traceback()
        result = await self._recover(refusal, batch, budget)
        result.calls += 1
        return result

    async def _recover(self, error: GatewayError, batch: Batch, budget: _Budget) -> BatchResult:
        """Handles the error of a call with the whole batch: tries again in a way that may succeed, or fails the
        batch."""
        if isinstance(error, InvalidRequest) and self._learn(error, batch):
            return await self._embed(batch, budget)
        if isinstance(error, UpstreamWrongCount):
            return await self._retry_with_fewer(error, batch, budget)
        if error.blames_input and len(batch.inputs) > 1:
            if budget.take(2):
                return await self._embed_halves(batch, budget, by_length=isinstance(error, ContextLengthExceeded))
            budget.undecided.append(error)
        return BatchResult([error] * len(batch.inputs), calls=0)

    async def _retry_with_fewer(self, error: UpstreamWrongCount, batch: Batch, budget: _Budget) -> BatchResult:
        """Tries fewer inputs per call, which the server may handle better. If it fails even with one,
        `MAX_FRUITLESS_CALLS` soon ends this, so it takes nothing from the budget."""
        count = len(batch.inputs)
        if count == 1:
            budget.fruitless_calls += 1
            return BatchResult([error], calls=0)
        result = await self._embed_halves(batch, budget, by_length=False)
        if count > 3 and result.calls == 2 * count - 2 and budget.fruitless_calls == 0:
            # Every call with several failed, and none with one.
            self._narrow(1, self._limits.max_tokens_per_batch, error)
        return result

    async def _embed_halves(self, batch: Batch, budget: _Budget, *, by_length: bool) -> BatchResult:
        """`by_length`: the shorter inputs first, which may all be good however many of the longer ones are not."""
        inputs, indexes = batch.inputs, list(range(len(batch.inputs)))
        if by_length:
            indexes.sort(key=lambda i: tokens.estimate(inputs[i]))
        middle = (len(indexes) + 1) // 2
        return await self._embed_parts(batch, [indexes[:middle], indexes[middle:]], budget)

    async def _embed_parts(self, batch: Batch, parts: Sequence[Sequence[int]], budget: _Budget) -> BatchResult:
        """`parts`: the indexes of each part's inputs. They are sent one after another, because the batch holds a single
        slot. A part's error is its own, unless the other parts would meet it too (`stops_batch`): then these are not
        sent and get the same error, and the route decides whether and where to retry them. Once nobody waits for any of
        the batch, no further part is sent either."""
        if batch.completed is None:
            batch.completed = {}  # shared with its parts, and theirs
        outcomes: dict[int, Embedding | GatewayError] = {}
        calls = 0
        trouble: GatewayError | None = None
        for indexes in parts:
            if trouble is None and not batch.still_wanted():
                trouble = InvalidRequest("nobody waits for it any more")  # nobody reads it, nor is blamed
            if trouble is not None:
                outcomes.update(dict.fromkeys(indexes, trouble))
                continue
            part = sub_batch(batch, indexes)
            result = await self._embed(part, budget)
            pairs = zip(part.keys, result.outcomes, strict=True)
            batch.completed.update((key, each) for key, each in pairs if isinstance(each, Embedding))
            outcomes.update(zip(indexes, result.outcomes, strict=True))
            calls += result.calls
            errors = (each for each in result.outcomes if isinstance(each, GatewayError))
            trouble = next((error for error in errors if _stops(error, budget)), None)
        return BatchResult([outcomes[i] for i in range(len(batch.inputs))], calls)

    def _learn(self, error: InvalidRequest, batch: Batch) -> bool:
        """Adopts the limit on a call's rows or tokens that the upstream's message names. Returns whether it is a new
        one. A message that quotes a caller's text is ignored, or that could set a limit for everybody."""
        limits, inputs = self._limits, batch.inputs
        message = error.message.partition("input_value=")[0]  # where pydantic quotes both ends of what it refuses
        max_tokens, max_rows = stated.call_tokens(message), stated.call_inputs(message, len(inputs))
        if (max_tokens or max_rows) and quotes_input(upstream_message(error), quotable(batch)):
            return False
        if (
            max_tokens
            and len(inputs) > 1
            and max_tokens < sum(map(tokens.upper_bound, inputs))
            and not self._may_be_per_input(max_tokens, inputs)
        ):
            self._narrow(limits.max_batch, min(max_tokens, limits.max_tokens_per_batch or max_tokens), error)
            return True
        if 0 < max_rows < len(inputs):
            self._narrow(min(max_rows, limits.max_batch), limits.max_tokens_per_batch, error)
            return True
        return False

    def _narrow(self, max_batch: int, max_tokens: int | None, error: GatewayError) -> None:
        """Adopts these limits for a while. `error`: what they were learned from."""
        limits = self._limits
        if (max_batch, max_tokens) == (limits.max_batch, limits.max_tokens_per_batch):
            return  # learned from another call meanwhile
        limits.max_batch, limits.max_tokens_per_batch = max_batch, max_tokens
        self._learned_until = self._clock.monotonic() + LEARNED_FOR
        learned = f"max_batch {max_batch}" + (f", max_tokens_per_batch {max_tokens}" if max_tokens else "")
        log.info(
            "deployment %s: for the next %g minutes its limits are %s, because of its reply: %s",
            self._name,
            LEARNED_FOR / 60,
            learned,
            error.message,
        )

    def _may_be_per_input(self, max_tokens: int, inputs: Sequence[Input]) -> bool:
        """Whether a limit of `max_tokens` tokens may be that of a single input, whatever the message says: it is no
        more than the model takes in one input, and one of these may be longer."""
        return (
            self._max_input_tokens is not None
            and max_tokens <= self._max_input_tokens
            and any(tokens.upper_bound(each) > max_tokens for each in inputs)
        )


def _stops(error: GatewayError, budget: _Budget) -> bool:
    """Whether a part's error is a reason not to send the batch's other parts."""
    return budget.fruitless_calls >= MAX_FRUITLESS_CALLS if isinstance(error, UpstreamWrongCount) else error.stops_batch


def _settle(batch: Batch, outcomes: list[Embedding | GatewayError], undecided: Sequence[GatewayError]) -> None:
    """Decides the outcome of inputs that were refused together and never tried alone. If others of the batch were
    embedded, or are other callers', these may be good, so they get an error that says to ask again; except an input at
    least as long as one that was too long by itself, which surely is too long as well."""
    inputs = batch.inputs
    if not (batch.shared() or any(isinstance(each, Embedding) for each in outcomes)):
        return
    ask_again = UpstreamUnavailable("too many inputs of one upstream call were refused to tell which ones; try again")
    too_long = min(
        (
            tokens.estimate(each)
            for each, outcome in zip(inputs, outcomes, strict=True)
            if isinstance(outcome, ContextLengthExceeded) and outcome not in undecided
        ),
        default=math.inf,
    )
    for i, outcome in enumerate(outcomes):
        surely = isinstance(outcome, ContextLengthExceeded) and tokens.estimate(inputs[i]) >= too_long
        if isinstance(outcome, InvalidRequest) and outcome in undecided and not surely:
            outcomes[i] = ask_again


def _split(inputs: Sequence[Input], limits: CallLimits) -> Sequence[Sequence[int]]:
    """The indexes of each call's inputs, in order. The batch was within the limits when `Queue.take` filled it; since
    then limits may have been learned, or it goes to another deployment. An input over the token limit goes alone."""
    if limits.surely_allow(inputs):
        return [range(len(inputs))]
    parts: list[list[int]] = []
    space = BatchSpace(limits)
    for i, each in enumerate(inputs):
        if not parts or len(parts[-1]) == limits.max_batch or not space.take(each):
            parts.append([])
            space = BatchSpace(limits)
            space.take(each)
        parts[-1].append(i)
    return parts


class _Budget:
    """The extra calls that one batch may still cause; the refusals left undecided when there were none left; the
    number of calls made; and that of consecutive calls with a single input that returned no vector."""

    def __init__(self, calls: int) -> None:
        self._calls = calls
        self.calls_made = 0
        self.undecided: list[GatewayError] = []
        self.fruitless_calls = 0

    def take(self, calls: int) -> bool:
        self._calls -= calls
        return self._calls >= 0
