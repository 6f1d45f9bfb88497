"""Inputs longer than the model takes: refused, truncated, or embedded in pieces, never silently.

What fits is a matter of bounds (`app.pipeline.lengths`), because the tokenizer is the upstream's. An input that may or
may not fit is for the upstream to judge; one that it refuses is cut to what surely fits.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Generator, Iterable, Sequence
from typing import TypeAlias, TypeVar

from msgspec.structs import replace

from app import tokens, vectors
from app.catalog import Model, TokenRule, combined
from app.config import ModelSettings
from app.errors import ContextLengthExceeded, GatewayError, InvalidRequest, UpstreamInvalidVector
from app.pipeline import lengths
from app.pipeline.parts import merge_result, mixed_lengths
from app.pipeline.prefix import prefix_of
from app.types import NO_EMBEDDING, Embedder, Embedding, EmbedRequest, EmbedResult, Input, OnLongInput, Params, Source
from app.upstreams import stated

T = TypeVar("T")
_Work: TypeAlias = Generator[None, None, T]
"""Work on texts that can be interrupted before each of them."""

MAX_PIECES = 2048
"""Maximum pieces into which one request's inputs may be cut, not counting the first of each."""
_SAMPLE_PER_TOKEN = 100
"""Characters per token of the limit that are examined to tell that a text is too long."""
_FAR_OVER = 2
"""An input whose estimate is this many times the limit surely does not fit: in some vocabularies a token of Chinese has
1.8 characters. Such an input is not tried, nor left to an upstream that truncates silently."""
_MAX_CHARACTERS_PER_TOKEN = 8
"""A text of more characters than this per token of the limit is not worth trying; English has 5."""
_INLINE_CHARACTERS = 100_000
"""Characters above which texts are examined in a thread: some milliseconds of work, 25 for short Chinese texts."""
_TIME_SLICE = 0.02
"""Seconds for which a thread works on one request's texts, though on at least one; then others get their turn, because
threads are few, and a request that is late, or whose caller has hung up, ends there."""


class LongInputs:
    """`models` are the facts of each deployment; what fits must fit all of them."""

    def __init__(self, inner: Embedder, models: Sequence[Model], settings: ModelSettings | None) -> None:
        self._inner = inner
        self._models, facts = models, combined(models)
        self._limit = lengths.InputLimit(facts.max_tokens_per_input, facts.max_characters_per_input, facts.counted_by)
        self._tries = not facts.cuts_silently
        self._default_policy: OnLongInput = settings.on_long_input if settings else "error"

    async def __call__(self, request: EmbedRequest) -> EmbedResult:
        params, policy = request.params, request.on_long_input or self._default_policy
        prefix = self._longest_prefix(params) if params.input_type is not None else ""
        # An instruction beside the text may count or not: no input is refused for it, and room is left.
        reserved = prefix or params.instruct or ""
        limit = self._limit.without(reserved)
        plan: _Plan | None
        try:
            if policy != "error" and limit.unbounded:
                # No limit is known: an upstream that refuses an input may name it.
                texts = {i for i, text in enumerate(request.inputs) if type(text) is str}
                plan = _Plan(request.inputs, texts, limit, all_pieces=policy == "split", tries=True)
            elif not request.media and max(map(len, request.inputs)) <= limit.safe_characters:  # type: ignore[arg-type]  # all are text
                return await self._inner(request)
            else:
                plan = await _run(self._plan(request, policy, limit, prefix), request.inputs)
            if plan is None:
                return await self._inner(request)
        except ContextLengthExceeded as error:
            if policy == "error":
                error.message += "; shorten it, or send on_long_input: truncate or split"
            raise
        try:
            result = await self._embed(request, plan, reserved)
        except GatewayError as error:
            error.calls += plan.calls
            raise
        if policy == "split":
            result.split = len(plan.pieces)
        else:
            result.truncated = len(plan.pieces)
        return result

    def _longest_prefix(self, params: Params) -> str:
        """The longest of those that the deployments put before a text: any of them may serve it."""
        prefixes = [prefix_of(each, params.input_type, params.instruct) for each in self._models]
        return max(prefixes, key=tokens.upper_bound)

    def _plan(
        self, request: EmbedRequest, policy: OnLongInput, limit: lengths.InputLimit, prefix: str
    ) -> _Work[_Plan | None]:
        """How to cut the inputs; None if all are sent as they are. Raises `InvalidRequest`."""
        long: list[int] = []
        for i, text in enumerate(request.inputs):
            yield
            if type(text) is str and not limit.surely_allows(text):
                long.append(i)
        if long and limit.rule == "cl100k_base":
            long = yield from _not_fitting(limit, request.inputs, long, first=policy == "error")
        if not long:
            return None
        if policy == "error":
            for i in long:
                yield
                self._refuse(i, prefix, _text(request.inputs, i))
            return None
        if policy == "split":
            _check_dense(request)
        plan = _Plan(request.inputs, set(long), limit, all_pieces=policy == "split", tries=self._tries)
        yield from plan.cut([i for i in long if not plan.may_fit(i)])
        return plan

    def _refuse(self, i: int, prefix: str, text: str) -> None:
        """Raises `ContextLengthExceeded` for an input that is too long however its tokens are counted; and for one that
        is far too long by estimate, if the upstream would truncate it silently."""
        limit, full_text = self._limit, prefix + text
        # Enough to tell, however long the text is.
        sample = full_text[: _SAMPLE_PER_TOKEN * limit.tokens] if limit.tokens is not None else ""
        if limit.characters is not None and len(full_text) > limit.characters:
            size, maximum = f"{len(full_text)} characters", limit.characters
        elif limit.tokens is not None and (count := lengths.at_least(sample, limit.rule)) > limit.tokens:
            exact = limit.rule == "cl100k_base" and len(sample) == len(full_text) <= lengths.MAX_COUNTED_CHARACTERS
            size, maximum = f"{count} tokens" if exact else f"at least {count} tokens", limit.tokens
        elif (
            limit.tokens is not None
            and not self._tries
            and (estimate := tokens.estimate(full_text)) > _FAR_OVER * limit.tokens
        ):
            size, maximum = f"about {estimate} tokens", limit.tokens
        else:
            return
        suffix = " with its role or instruction" if prefix else ""
        raise ContextLengthExceeded(
            f"input[{i}] has {size}{suffix}; this model takes at most {maximum}", param=f"input[{i}]"
        )

    async def _embed(self, request: EmbedRequest, plan: _Plan, reserved: str) -> EmbedResult:
        """Embeds all pieces at once; inputs that are then found too long are cut and tried again. `reserved` needs room
        too, in front of each piece."""
        everything = range(len(request.inputs))
        result = await self._ask(request, plan, everything)
        if not result.too_long:
            return result
        refused = sorted({plan.owners[place] for place in result.too_long})
        for place, error in result.too_long.items():
            if plan.owners[place] not in plan.long or plan.owners[place] in plan.pieces:
                raise error  # a piece that surely fits was refused: cutting it now would be a guess
        if plan.limit.unbounded:
            if plan.all_pieces:
                _check_dense(request)
            plan.limit = _stated_limit(result.too_long.values(), plan.limit.rule).without(reserved)
        await _run(plan.cut(refused), [request.inputs[i] for i in refused])
        again = await self._ask(request, plan, refused, final=True)
        merge_result(result, refused, again)
        result.cached_tokens += again.cached_tokens
        result.shared_tokens += again.shared_tokens
        result.too_long = {}
        if mixed_lengths(result.embeddings):  # each was checked by itself; asked for together, they are of one model
            result = await self._ask(request, plan, everything, final=True)
        result.calls = plan.calls
        return result

    async def _ask(
        self, request: EmbedRequest, plan: _Plan, indexes: Sequence[int], *, final: bool = False
    ) -> EmbedResult:
        result = await self._inner(plan.request(request, indexes, final=final))
        plan.calls += result.calls
        return plan.join(result, indexes)


class _Plan:
    """The pieces in which each input is embedded."""

    def __init__(
        self,
        inputs: Sequence[Input],
        long: Collection[int],
        limit: lengths.InputLimit,
        *,
        all_pieces: bool,
        tries: bool,
    ) -> None:
        """`long`: the inputs that do not surely fit. `all_pieces`: embed all pieces of an input, not only the first.
        `tries`: try inputs that may fit."""
        self.long, self.limit, self.all_pieces = long, limit, all_pieces
        self._inputs, self._tries = inputs, tries
        self.pieces: dict[int, Sequence[str]] = {}
        """By index, those of the inputs that were cut."""
        self._pieces_left = MAX_PIECES
        self.owners: list[int] = []
        """For each piece of the last request, the index of its input."""
        self.calls = 0
        """Upstream calls so far: they count whatever becomes of the request."""

    def may_fit(self, i: int) -> bool:
        """Whether to try the input as it is: it is likely to fit, and refused if it does not."""
        text, limit = _text(self._inputs, i), self.limit
        if limit.is_counted(text):
            return False  # it was counted and does not fit; counting again would block the event loop
        if not self._tries or (limit.characters is not None and len(text) > limit.characters):
            return False
        if limit.tokens is None:
            return True
        if limit.rule == "bytes" and (
            len(text) > _MAX_CHARACTERS_PER_TOKEN * limit.tokens or tokens.estimate(text) > _FAR_OVER * limit.tokens
        ):
            return False
        return lengths.at_least(text, limit.rule) <= limit.tokens

    def cut(self, indexes: Sequence[int]) -> _Work[None]:
        for i in indexes:
            yield
            text = _text(self._inputs, i)
            if self.all_pieces and len(text) > (self._pieces_left + 1) * self.limit.max_piece_characters:
                raise self._too_many(i)
            try:
                pieces = self.limit.pieces(text) if self.all_pieces else [self.limit.first(text)]
            except ValueError:
                raise InvalidRequest(
                    f"not even the beginning of input[{i}] certainly fits this model after its prefix",
                    param=f"input[{i}]",
                ) from None
            # A piece of whitespace means nothing, and some upstreams refuse it.
            self.pieces[i] = [piece for piece in pieces if not piece.isspace()] or pieces[:1]
            self._pieces_left -= len(self.pieces[i]) - 1
            if self._pieces_left < 0:
                raise self._too_many(i)

    def _too_many(self, i: int) -> ContextLengthExceeded:
        where, length = f"input[{i}]", len(_text(self._inputs, i))
        return ContextLengthExceeded(f"{where} has {length} characters: too many pieces for one request", param=where)

    def request(self, request: EmbedRequest, indexes: Sequence[int], *, final: bool = False) -> EmbedRequest:
        """The request for the pieces of these inputs; each piece's position is its input's index."""
        pieces = [(i, piece) for i in indexes for piece in self.pieces.get(i, (self._inputs[i],))]
        self.owners = [i for i, _ in pieces]
        return replace(
            request,
            inputs=[piece for _, piece in pieces],
            positions=self.owners,
            collect_too_long=self._tries and not final,
        )

    def join(self, result: EmbedResult, indexes: Sequence[int]) -> EmbedResult:
        """One embedding for each of these inputs, made from those of its pieces."""
        embeddings, sources, tokens_by_source = [], [], dict.fromkeys(Source, 0)
        found = iter(zip(result.embeddings, result.sources, strict=True))
        for i in indexes:
            pieces = self.pieces.get(i, ("",))
            parts = [next(found) for _ in pieces]
            source = _costliest([each for _, each in parts])
            if source is Source.UPSTREAM:
                for embedding, each in parts:
                    tokens_by_source[each] += embedding.tokens
            averaged = self.all_pieces and i in self.pieces
            embeddings.append(_mean(i, [each for each, _ in parts], pieces) if averaged else parts[0][0])
            sources.append(source)
        cached, shared = tokens_by_source[Source.CACHE], tokens_by_source[Source.INFLIGHT]
        return replace(result, embeddings=embeddings, sources=sources, cached_tokens=cached, shared_tokens=shared)


async def _run(work: _Work[T], texts: Iterable[Input]) -> T:
    """Runs this work on these texts and returns its result; in a thread if they are long, in turns with other
    requests."""
    long = sum(len(text) for text in texts if type(text) is str) > _INLINE_CHARACTERS
    done: tuple[T] | None = None
    while done is None:
        done = await asyncio.to_thread(_run_for, work, _TIME_SLICE) if long else _run_for(work, math.inf)
    return done[0]


def _run_for(work: _Work[T], seconds: float) -> tuple[T] | None:
    """Runs the work for so many seconds; returns its result, as a tuple, if that completes it. The exception that
    carries the result is not returned: its traceback would refer to the frame that keeps it, and so hold the request
    until the cyclic garbage collector runs."""
    until = time.perf_counter() + seconds
    try:
        while time.perf_counter() < until:
            next(work)
    except StopIteration as stop:
        return (stop.value,)
    return None


def _not_fitting(
    limit: lengths.InputLimit, inputs: Sequence[Input], indexes: Sequence[int], *, first: bool
) -> _Work[list[int]]:
    """Those of `indexes` that do not fit when counted. `first`: stop at the first that is counted and does not fit."""
    too_long: list[int] = []
    for i in indexes:
        yield
        if not limit.allows(_text(inputs, i)):
            too_long.append(i)
            if first and limit.is_counted(_text(inputs, i)):
                break
    return too_long


def _check_dense(request: EmbedRequest) -> None:
    """Raises `InvalidRequest` if sparse vectors are requested: there is no mean of these."""
    if request.params.output_type != "dense":
        raise InvalidRequest("on_long_input: split gives dense vectors only", param="on_long_input")


def _stated_limit(refusals: Iterable[GatewayError], rule: TokenRule) -> lengths.InputLimit:
    """The input limit that upstreams named when they refused some. Raises a refusal that names none."""
    token_limits, character_limits = [], []
    for refusal in refusals:
        if (tokens_allowed := stated.input_tokens(refusal.message)) is not None:
            token_limits.append(tokens_allowed)
        elif (characters_allowed := stated.input_characters(refusal.message)) is not None:
            character_limits.append(characters_allowed)
        else:
            refusal.message += "; to have it cut here, set models.NAME.max_tokens_per_input and ask for NAME"
            raise refusal
    return lengths.InputLimit(min(token_limits, default=None), min(character_limits, default=None), rule)


def _text(inputs: Sequence[Input], i: int) -> str:
    """Only texts are ever long."""
    text = inputs[i]
    assert isinstance(text, str)
    return text


def _mean(i: int, parts: Sequence[Embedding], pieces: Sequence[str]) -> Embedding:
    """The mean of the pieces' vectors, weighted by their lengths in characters, at unit length; also if there is only
    one."""
    if any(not part.vector for part in parts):
        return NO_EMBEDDING  # one of them was refused: `_embed` decides what becomes of the input
    try:
        vector = vectors.mean([part.vector for part in parts], [len(piece) for piece in pieces])
    except ValueError:
        raise UpstreamInvalidVector(f"the vectors of input[{i}]'s pieces cancel each other out") from None
    return Embedding(vector, sum(part.tokens for part in parts))


def _costliest(sources: Collection[Source]) -> Source:
    """The source that an input counts as coming from, given those of its pieces: the costliest of them."""
    return next(each for each in (Source.UPSTREAM, Source.INFLIGHT, Source.CACHE) if each in sources)
