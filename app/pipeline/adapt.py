"""A refusal is studied, not relayed: a limit the upstream names is learned, a bad input is singled out.

Callers share upstream calls, so one caller's bad input must not become another's error. A batch refused
for its content is halved until the guilty input stands alone; everything else is embedded.

Learned are limits of a call: its rows, and its tokens. How long one input may be is left to the upstream:
only its tokenizer can tell, so a refusal before sending would have to guess. Such an input is singled out,
and the upstream's words about it reach the caller (or `LongInputs`, which cuts it).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from app import tokens
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
from app.upstreams.redact import quotes_input
from app.upstreams.replies import upstream_message

# "batch size is invalid, it should not be larger than 10", "at most 100 requests can be in one batch",
# "batch size 33 > maximum allowed batch size 32", "Too many inputs. The max number of inputs is 16.", "batchSize must
# be 1 but the entered value was 56".
_ROWS = re.compile(
    r"batch.{0,40}(?:not be larger than|maximum allowed batch size|at most|maximum of)\s*:?\s*(\d++)(?! tokens?\b)"
    r"|at most (\d+) (?!tokens?\b)\w+ can be in one batch"
    r"|max(?:imum)? number of inputs is (\d+)"
    r"|batchSize must be (\d+) but",
    re.IGNORECASE | re.DOTALL,
)
# "Requested 300001 tokens, max 300000 tokens per request", "at most 8192 tokens can be in one batch", "the limit is
# 8192 tokens summed across all inputs", "the max allowed tokens per submitted batch is 120000", "batch … not be larger
# than 8192 tokens", "tokens per min (TPM): Limit 40000, Requested 75000" (where some are "Used", that is what is in the
# way). Not "maximum context length is 8192 tokens", which is one input's.
_CALL = r"(?:per|in|for|across)\s+(?:an? |one |each |all |the )?(?:single |submitted )?(?:batch|request|call|inputs)\b"
_TOKENS = re.compile(
    r"(?:\bmax(?:imum)?(?: of)?|at most|limit(?: is| of)?|exceeds?|larger than)\D{0,20}?"
    rf"(\d[\d,]*) (?:input )?tokens?\s+(?:summed |in total |total |can be |allowed )?{_CALL}"
    rf"|\btokens? {_CALL}\D{{0,40}}?(\d[\d,]*)"
    r"|\bbatch[^.\d]{0,40}(?:at most|maximum of|larger than)\s*:?\s*(\d[\d,]*) tokens?\b"
    r"|\btokens per min \(TPM\): Limit (\d[\d,]*), Requested\b",
    re.IGNORECASE,
)

IN_VAIN = 2
"""Calls for one input each, one after another, to which a server gave no vector, after which the batch's other inputs
are not tried: they would hardly fare better."""


class Adapt:
    """Keeps a deployment's batches legal as it learns what is, and isolates inputs it refuses.

    `longest`: tokens that one input may have, if that is known.
    """

    def __init__(self, inner: BatchEmbedder, limits: CallLimits, longest: int | None = None) -> None:
        self._inner = inner
        self._limits, self._longest = limits, longest

    async def __call__(self, batch: Batch) -> BatchResult:
        # A single culprit among n is found in 2·log2(n) calls. What takes more is not one input's fault,
        # and halving on would make a hopeless batch of n cost 2n calls.
        budget = _Budget(4 * len(batch.inputs).bit_length() + 4)
        result = await self._embed(batch, budget)
        if budget.undecided:
            _decide(batch.inputs, result.outcomes, budget.undecided)
        return result

    async def _embed(self, batch: Batch, budget: _Budget) -> BatchResult:
        parts = _legal(batch.inputs, self._limits)
        if len(parts) > 1:
            return await self._embed_parts(batch, parts, budget)
        try:
            result = await self._inner(batch)
            budget.in_vain = 0
            return result
        except GatewayError as error:
            refusal = error.without_traceback()
        result = await self._after(refusal, batch, budget)
        result.calls += 1
        return result

    async def _after(self, error: GatewayError, batch: Batch, budget: _Budget) -> BatchResult:
        """What becomes of a batch of which a call came to this."""
        if isinstance(error, InvalidRequest) and self._learn(error, batch.inputs):
            return await self._embed(batch, budget)
        if isinstance(error, UpstreamWrongCount):
            return await self._with_fewer(error, batch, budget)
        if error.blames_input and len(batch.inputs) > 1:
            if budget.take(2):
                return await self._embed_halves(batch, budget, by_length=isinstance(error, ContextLengthExceeded))
            budget.undecided.append(error)
        return BatchResult([error] * len(batch.inputs), calls=0)

    async def _with_fewer(self, error: UpstreamWrongCount, batch: Batch, budget: _Budget) -> BatchResult:
        """The server may do better with fewer inputs. Where it does not even with one, `IN_VAIN` soon ends this, so it
        takes none of the budget."""
        count = len(batch.inputs)
        if count == 1:
            budget.in_vain += 1
            return BatchResult([error], calls=0)
        result = await self._embed_halves(batch, budget, by_length=False)
        if count > 3 and result.calls == 2 * count - 2 and budget.in_vain == 0:
            self._limits.max_batch = 1  # all calls for several were in vain, and none for one
        return result

    async def _embed_halves(self, batch: Batch, budget: _Budget, *, by_length: bool) -> BatchResult:
        """`by_length`: the shorter ones first, of which all may be good however many are not."""
        inputs, places = batch.inputs, list(range(len(batch.inputs)))
        if by_length:
            places.sort(key=lambda i: tokens.estimate(inputs[i]))
        middle = (len(places) + 1) // 2
        return await self._embed_parts(batch, [places[:middle], places[middle:]], budget)

    async def _embed_parts(self, batch: Batch, parts: Sequence[Sequence[int]], budget: _Budget) -> BatchResult:
        """`parts`: the places of each one's inputs. They go one after the other, for the batch holds one slot. A part's
        error is its own, unless the other parts would meet it too (`stops_batch`): then these are not sent and have the
        same error; the route decides whether and where they are asked again. Once nobody waits for any of the batch no
        further part is sent either."""
        if batch.completed is None:
            batch.completed = {}  # which its parts share, and theirs
        outcomes: dict[int, Embedding | GatewayError] = {}
        calls = 0
        trouble: GatewayError | None = None
        for places in parts:
            if trouble is None and not batch.still_wanted():
                trouble = InvalidRequest("nobody waits for it any more")  # nobody reads it, and nobody is blamed
            if trouble is not None:
                outcomes.update(dict.fromkeys(places, trouble))
                continue
            part = sub_batch(batch, places)
            result = await self._embed(part, budget)
            pairs = zip(part.keys, result.outcomes, strict=True)
            batch.completed.update((key, each) for key, each in pairs if isinstance(each, Embedding))
            outcomes.update(zip(places, result.outcomes, strict=True))
            calls += result.calls
            errors = (each for each in result.outcomes if isinstance(each, GatewayError))
            trouble = next((error for error in errors if _stops(error, budget)), None)
        return BatchResult([outcomes[i] for i in range(len(batch.inputs))], calls)

    def _learn(self, error: InvalidRequest, sent: Sequence[Input]) -> bool:
        """Takes the rows or tokens that a call may have from the upstream's words. True if they taught something new.
        Words that quote an input teach nothing, or a caller's text could set a limit for all."""
        limits = self._limits
        most, rows = _named(_TOKENS, error.message), _named(_ROWS, error.message)
        if (most or rows) and quotes_input(upstream_message(error), sent):
            return False
        if most and len(sent) > 1 and most < sum(map(tokens.upper_bound, sent)) and not self._is_about_one(most, sent):
            limits.max_tokens_per_batch = min(most, limits.max_tokens_per_batch or most)
            return True
        if 0 < rows < len(sent):
            limits.max_batch = min(rows, limits.max_batch)
            return True
        return False

    def _is_about_one(self, most: int, sent: Sequence[Input]) -> bool:
        """Whether a limit of so many tokens may be a single input's, whatever the words say: it is no more than the
        model takes in one input, and one of these may be longer."""
        return (
            self._longest is not None
            and most <= self._longest
            and any(tokens.upper_bound(each) > most for each in sent)
        )


def _stops(error: GatewayError, budget: _Budget) -> bool:
    """Whether a part's error is a reason not to send the batch's other parts."""
    return budget.in_vain >= IN_VAIN if isinstance(error, UpstreamWrongCount) else error.stops_batch


def _decide(
    inputs: Sequence[Input], outcomes: list[Embedding | GatewayError], undecided: Sequence[GatewayError]
) -> None:
    """Settles inputs that were refused together and never tried alone. Where others of the batch were embedded these
    may be good, so their error becomes one that says to ask again; except for an input at least as long as one that was
    too long by itself, which surely is too long as well."""
    if not any(isinstance(each, Embedding) for each in outcomes):
        return
    told = UpstreamUnavailable("too many of the inputs in one upstream call were refused to tell which; ask again")
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
            outcomes[i] = told


def _named(limit: re.Pattern[str], words: str) -> int:
    """The number these words name as a limit, or 0."""
    match = limit.search(words)
    return int(next(filter(None, match.groups())).replace(",", "")) if match else 0


def _legal(inputs: Sequence[Input], limits: CallLimits) -> Sequence[Sequence[int]]:
    """The places of each call's inputs, in order. The batch was filled by `Queue.take`; since then limits may have been
    learned, or it goes to another deployment. An input over the token limit goes alone."""
    if limits.surely_allow(inputs):
        return [range(len(inputs))]
    parts: list[list[int]] = []
    room = BatchSpace(limits)
    for i, each in enumerate(inputs):
        if not parts or len(parts[-1]) == limits.max_batch or not room.take(each):
            parts.append([])
            room = BatchSpace(limits)
            room.take(each)
        parts[-1].append(i)
    return parts


class _Budget:
    """The extra calls that one batch may still cause; the refusals for which none were left; and how many calls for a
    single input, one after another, have brought no vector."""

    def __init__(self, calls: int) -> None:
        self._calls = calls
        self.undecided: list[GatewayError] = []
        self.in_vain = 0

    def take(self, calls: int) -> bool:
        self._calls -= calls
        return self._calls >= 0
