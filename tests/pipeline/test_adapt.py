"""What the gateway learns from an upstream's refusals, and what it does not."""

from __future__ import annotations

import pytest

from app.clock import Clock
from app.errors import (
    ContextLengthExceeded,
    GatewayError,
    InvalidRequest,
    QuotaExhausted,
    RateLimited,
    UpstreamAuth,
    UpstreamError,
    UpstreamIgnoredDimensions,
    UpstreamInvalidResponse,
    UpstreamInvalidVector,
    UpstreamUnavailable,
    UpstreamUnreachable,
    UpstreamWrongCount,
)
from app.pipeline import verdict
from app.pipeline.adapt import LEARNED_FOR, Adapt
from app.pipeline.deployment import CallLimits
from app.types import Batch, BatchEmbedder, BatchResult, Embedding, Media, Params, WireReply
from app.upstreams import replies
from tests.clock import HandClock

ROWS = [
    "batch size is invalid, it should not be larger than 10.: input.contents",
    "<400> InternalError.Algo.InvalidParameter: Value error, batch size is invalid, it should not be larger than 10.",
    "batch size 33 > maximum allowed batch size 10",
    "* BatchEmbedContentsRequest.requests: at most 10 requests can be in one batch",
    "too many instances. Unable to submit request because batchSize must be 10 but the entered value was 56.",
    "Too many inputs. The max number of inputs is 10.  We hope to increase the number of inputs per request soon.",
    "Invalid 'input': array too long. Expected an array with maximum length 10, but got an array with length 25",
    "Input should be a valid string; List should have at most 10 items after validation, not 25",
]
TOKENS = [
    "Requested 312 tokens, max 40 tokens per request",
    "at most 40 tokens in one batch",
    "maximum of 40 input tokens per batch",
    "the limit is 40 tokens summed across all inputs",
    "Request too large for x in organization org-y on tokens per min (TPM): Limit 40, Requested 90. Reduce the tokens.",
    "tokens per request must not exceed 40",
    "at most 40 tokens can be in one batch",
    "The max allowed tokens per submitted batch is 40. Your batch has 90 tokens after truncation.",
    "batch is invalid, it should not be larger than 40 tokens.: input.contents",
]
NEITHER = [
    "This model's maximum context length is 40 tokens, however you requested 51 tokens (51 in your prompt)",
    "Range of input length should be [1, 40]",
    "the max input length is 40 tokens",
    "input 3 is too long: 51 tokens, at most 40 tokens",
    "`inputs` must have less than 40 tokens. Given: 41",
    "the input length exceeds the context length",
    "Prompt tokens too long: the max input tokens is 40",
    "Invalid 'input[0]': array too long. Expected an array with maximum length 2, but got an array with length 3",
    "Invalid 'input': array too long. Expected an array with maximum length 2, but got an array with length 41",
    "List should have at most 2 items after validation, not 41",
    "InternalError",
]


class Upstream:
    """Refuses calls over its limits, with this message."""

    def __init__(self, words: str, *, rows: int = 1000, tokens: int = 1_000_000, kind: type[InvalidRequest]) -> None:
        self.words, self.rows, self.tokens, self.kind = words, rows, tokens, kind
        self.calls: list[list[str]] = []

    async def __call__(self, batch: Batch) -> BatchResult:
        texts = list(map(str, batch.inputs))
        self.calls.append(texts)
        if len(texts) > self.rows or sum(map(len, texts)) > self.tokens:
            raise self.kind(self.words)
        return BatchResult([Embedding(text.encode(), 1) for text in texts])


def batch(*texts: str) -> Batch:
    return Batch("m", list(texts), [text.encode() for text in texts], Params(), store=True, deadline=0)


def adapting(
    embed: BatchEmbedder, limits: CallLimits, max_input_tokens: int | None = None, clock: Clock | None = None
) -> Adapt:
    return Adapt(embed, limits, "up/m", clock or HandClock(), max_input_tokens)


def answers(result: BatchResult) -> list[str]:
    return [each.vector.decode() if isinstance(each, Embedding) else str(each) for each in result.outcomes]


@pytest.mark.parametrize("words", ROWS)
async def test_rows_are_learned_once_from_every_vendor_s_words(words: str) -> None:
    texts = [f"text {i}" for i in range(25)]
    upstream, limits = Upstream(words, rows=10, kind=InvalidRequest), CallLimits(100)
    adapt = adapting(upstream, limits)
    result = await adapt(batch(*texts))
    assert answers(result) == texts
    assert [len(call) for call in upstream.calls] == [25, 10, 10, 5]
    assert (limits.max_batch, limits.max_tokens_per_batch, result.calls) == (10, None, 4)


@pytest.mark.parametrize("kind", [InvalidRequest, ContextLengthExceeded])
@pytest.mark.parametrize("words", TOKENS)
@pytest.mark.parametrize("known", [None, 100])
async def test_tokens_of_a_call_are_learned_once(known: int | None, words: str, kind: type[InvalidRequest]) -> None:
    texts = [f"text {i:05}" for i in range(9)]  # of 10 bytes each
    upstream, limits = Upstream(words, tokens=40, kind=kind), CallLimits(100, known)
    adapt = adapting(upstream, limits)
    assert answers(await adapt(batch(*texts))) == texts
    assert [len(call) for call in upstream.calls] == [9, 4, 4, 1]
    assert (limits.max_batch, limits.max_tokens_per_batch) == (100, 40)
    upstream.calls.clear()
    assert answers(await adapt(batch(*texts))) == texts
    assert [len(call) for call in upstream.calls] == [4, 4, 1], "nothing is refused any more"


@pytest.mark.parametrize("words", NEITHER)
async def test_the_limit_of_one_input_is_no_limit_of_calls(words: str) -> None:
    upstream, limits = Upstream(words, tokens=40, kind=InvalidRequest), CallLimits(100, 500)
    result = await adapting(upstream, limits)(batch("a" * 30, "b" * 41, "c" * 5))
    assert answers(result)[::2] == ["a" * 30, "c" * 5]
    assert isinstance(result.outcomes[1], GatewayError)
    assert (limits.max_batch, limits.max_tokens_per_batch) == (100, 500)


async def test_one_input_over_the_tokens_of_a_call_is_refused_alone() -> None:
    upstream, limits = Upstream(TOKENS[0], tokens=40, kind=InvalidRequest), CallLimits(100)
    result = await adapting(upstream, limits)(batch("a" * 30, "b" * 41, "c" * 5))
    assert answers(result)[::2] == ["a" * 30, "c" * 5]
    assert isinstance(result.outcomes[1], InvalidRequest)


ALL_WOULD_MEET = [
    RateLimited("slow down"),
    QuotaExhausted("used up"),
    UpstreamAuth("no"),
    UpstreamUnreachable("no connection"),
    UpstreamIgnoredDimensions("768, not 256"),
]


@pytest.mark.parametrize("trouble", ALL_WOULD_MEET, ids=lambda error: error.code)
async def test_what_all_would_meet_ends_the_calls_of_a_batch(trouble: GatewayError) -> None:
    calls: list[list[str]] = []

    async def fails_from_the_second_on(batch: Batch) -> BatchResult:
        calls.append(list(map(str, batch.inputs)))
        if len(calls) > 1:
            raise trouble
        return BatchResult([Embedding(text.encode(), 1) for text in calls[0]])

    result = await adapting(fails_from_the_second_on, CallLimits(2))(batch(*"abcdefgh"))
    assert calls == [["a", "b"], ["c", "d"]]
    assert answers(result) == ["a", "b", *[str(trouble)] * 6]
    assert result.calls == 2


@pytest.mark.parametrize(
    ("words", "sent"), [(ROWS[0], [64, 10, 10]), ("no", [64, 32, 16])], ids=["a limit that was learned", "halving"]
)
async def test_calls_of_a_batch_that_nobody_waits_for_any_more_are_not_made(words: str, sent: list[int]) -> None:
    upstream = Upstream(words, rows=10, kind=InvalidRequest)
    abandoned = batch(*map(str, range(64)))
    abandoned.still_wanted = lambda: len(upstream.calls) < 3
    result = await adapting(upstream, CallLimits(1000))(abandoned)
    assert list(map(len, upstream.calls)) == sent
    assert result.calls == 3
    assert verdict.deployment_error(result) is None, "it speaks against no deployment"


@pytest.mark.parametrize("kind", [UpstreamInvalidVector, UpstreamWrongCount, UpstreamError, UpstreamInvalidResponse])
async def test_what_may_be_one_calls_own_does_not(kind: type[GatewayError]) -> None:
    async def embed(batch: Batch) -> BatchResult:
        if "c" in batch.inputs:
            raise kind("bad")
        return BatchResult([Embedding(str(text).encode(), 1) for text in batch.inputs])

    result = await adapting(embed, CallLimits(1))(batch(*"abcdef"))
    assert answers(result) == ["a", "b", "bad", "d", "e", "f"]


async def test_a_server_that_gives_one_vector_however_many_it_is_asked_for_is_asked_for_one() -> None:
    calls: list[int] = []

    async def gives_one(batch: Batch) -> BatchResult:
        calls.append(len(batch.inputs))
        if len(batch.inputs) > 1:
            raise UpstreamWrongCount("1 for several")
        return BatchResult([Embedding(str(batch.inputs[0]).encode(), 1)])

    limits = CallLimits(100)
    adapt = adapting(gives_one, limits)
    assert answers(await adapt(batch(*"abcdefgh"))) == list("abcdefgh")
    assert calls == [8, 4, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1]
    assert limits.max_batch == 1
    del calls[:]
    assert answers(await adapt(batch(*"ijk"))) == list("ijk")
    assert calls == [1, 1, 1]


async def test_what_a_moments_trouble_taught_is_tried_again_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    calls: list[int] = []
    ill = True

    async def gives_one_while_ill(batch: Batch) -> BatchResult:
        calls.append(len(batch.inputs))
        if ill and len(batch.inputs) > 1:
            raise UpstreamWrongCount("7 for 8")
        return BatchResult([Embedding(str(text).encode(), 1) for text in batch.inputs])

    clock, limits = HandClock(), CallLimits(100, 500)
    adapt = adapting(gives_one_while_ill, limits, clock=clock)
    await adapt(batch(*"abcdefgh"))
    assert limits == CallLimits(1, 500)
    assert [each.getMessage() for each in caplog.records] == [
        "deployment up/m: for the next 10 minutes its limits are max_batch 1, max_tokens_per_batch 500, because of its "
        "reply: 7 for 8"
    ]
    ill = False
    clock.now += LEARNED_FOR - 1
    await adapt(batch("a"))
    assert limits == CallLimits(1, 500)
    clock.now += 1
    await adapt(batch("a"))
    assert limits == CallLimits(100, 500)
    del calls[:]
    await adapt(batch(*"abcdefgh"))
    assert calls == [8]


async def test_a_limit_that_is_real_costs_one_refused_call_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    upstream = Upstream(ROWS[0], rows=10, kind=InvalidRequest)
    clock, limits = HandClock(), CallLimits(25)
    adapt = adapting(upstream, limits, clock=clock)
    for _ in range(3):
        for _ in range(5):
            await adapt(batch(*map(str, range(25))))
            clock.now += LEARNED_FOR / 5
    assert sum(len(call) > upstream.rows for call in upstream.calls) == 3
    assert len(caplog.records) == 3


async def test_one_that_once_gave_too_few_is_trusted_again() -> None:
    calls: list[int] = []

    async def gives_too_few_once(batch: Batch) -> BatchResult:
        calls.append(len(batch.inputs))
        if len(calls) == 1:
            raise UpstreamWrongCount("7 for 8")
        return BatchResult([Embedding(str(text).encode(), 1) for text in batch.inputs])

    limits = CallLimits(100)
    assert answers(await adapting(gives_too_few_once, limits)(batch(*"abcdefgh"))) == list("abcdefgh")
    assert (calls, limits.max_batch) == ([8, 4, 4], 100)


async def test_and_one_that_gives_none_is_not_asked_for_each() -> None:
    calls: list[int] = []

    async def gives_none(batch: Batch) -> BatchResult:
        calls.append(len(batch.inputs))
        raise UpstreamWrongCount("0")

    result = await adapting(gives_none, CallLimits(100))(batch(*"abcdefgh"))
    assert (calls, result.calls, answers(result)) == ([8, 4, 2, 1, 1], 5, ["0"] * 8)


@pytest.mark.parametrize("words", [ROWS[0], TOKENS[0]])
async def test_a_text_that_is_quoted_teaches_nothing(words: str) -> None:
    async def refuses_and_quotes(batch: Batch) -> BatchResult:
        if words in batch.inputs:
            raise InvalidRequest(f"the upstream refused the input: not allowed: {words}")
        return BatchResult([Embedding(str(text).encode(), 1) for text in batch.inputs])

    limits = CallLimits(1000, 1_000_000)
    texts = [*map(str, range(30)), words]
    result = await adapting(refuses_and_quotes, limits)(batch(*texts))
    assert answers(result)[:30] == texts[:30]
    assert limits == CallLimits(1000, 1_000_000)


@pytest.mark.parametrize("head", ["\a" * 40, "\n" * 80], ids=["bells", "lines"])
async def test_nor_does_one_of_which_pydantic_quotes_both_ends(head: str) -> None:
    """Escaped as in Python: its beginning is not recognised, and its end is short."""
    text = f"{head} {'x' * 100} batchSize must be 1 but"
    quoted = f"{repr(text)[:25]}...{repr(text)[-24:]}"
    words = f"String should have at most 99 characters [type=string_too_long, input_value={quoted}, input_type=str]"

    async def refuses_and_quotes(batch: Batch) -> BatchResult:
        if text in batch.inputs:
            raise replies.make_error(InvalidRequest, WireReply(400, {}, b""), words)
        return BatchResult([Embedding(str(each).encode(), 1) for each in batch.inputs])

    limits = CallLimits(1000)
    await adapting(refuses_and_quotes, limits)(batch("another", text))
    assert limits == CallLimits(1000)


async def test_a_text_that_begins_as_our_own_words_do_is_not_quoted() -> None:
    texts = [f"the input is text {i}" for i in range(25)]
    words = replies.make_error(InvalidRequest, WireReply(400, {}, b""), ROWS[0]).message
    upstream = Upstream(words, rows=10, kind=InvalidRequest)
    assert answers(await adapting(upstream, CallLimits(100))(batch(*texts))) == texts
    assert [len(call) for call in upstream.calls] == [25, 10, 10, 5]


async def test_a_limit_that_was_not_exceeded_teaches_nothing() -> None:
    """Some upstreams count marks around each text as well: then halving finds what fits."""
    upstream, limits = Upstream("max 40 tokens per request", tokens=30, kind=InvalidRequest), CallLimits(100)
    texts = ["a" * 18, "b" * 18]
    assert answers(await adapting(upstream, limits)(batch(*texts))) == texts
    assert limits.max_tokens_per_batch is None


async def test_one_long_input_does_not_make_the_calls_of_the_others_small() -> None:
    upstream, limits = Upstream("max 1,000 tokens per request", tokens=1000, kind=InvalidRequest), CallLimits(2048)
    texts = [f"text {i:05}" for i in range(200)]
    texts[50] = "x" * 900
    assert answers(await adapting(upstream, limits)(batch(*texts))) == texts
    assert [len(call) for call in upstream.calls] == [200, 50, 11, 100, 39]
    assert limits.max_tokens_per_batch == 1000


async def test_tokens_named_for_a_batch_are_not_taken_for_rows() -> None:
    words = "batch is invalid, it should not be larger than 40 tokens"
    upstream, limits = Upstream(words, tokens=40, kind=InvalidRequest), CallLimits(2048)
    await adapting(upstream, limits)(batch(*(str(i) for i in range(60))))
    assert (limits.max_batch, limits.max_tokens_per_batch) == (2048, 40)


async def test_a_batch_made_for_another_deployment_is_cut_to_this_ones_tokens() -> None:
    upstream = Upstream("", kind=InvalidRequest)
    await adapting(upstream, CallLimits(10, 50))(batch("é" * 10, "x" * 20, "y" * 200, "z"))
    assert upstream.calls == [["é" * 10, "x" * 20], ["y" * 200], ["z"]]


@pytest.mark.parametrize(("text", "calls"), [("é" * 20, [2]), ("急" * 14, [1, 1]), ("𠀀" * 11, [1, 1])])
async def test_bytes_are_what_a_calls_tokens_are_counted_by_not_characters(text: str, calls: list[int]) -> None:
    upstream = Upstream("", kind=InvalidRequest)
    await adapting(upstream, CallLimits(10, 80))(batch(text, text))
    assert [len(call) for call in upstream.calls] == calls


async def test_images_are_no_tokens_and_go_with_texts() -> None:
    upstream, image = Upstream("", kind=InvalidRequest), Media("image", "https://example.com/a.png")
    mixed = batch("x" * 30, "y" * 10)
    mixed.inputs = [image, *mixed.inputs, image]
    await adapting(upstream, CallLimits(10, 40, images=2))(mixed)
    assert [len(call) for call in upstream.calls] == [4]


async def test_a_batch_made_for_another_deployment_is_cut_to_this_ones_images() -> None:
    upstream = Upstream("", kind=InvalidRequest)
    image, video = Media("image", "https://example.com/a.png"), Media("video", "https://example.com/a.mp4")
    mixed = batch(*"abcdefg")
    mixed.inputs = ["a", image, "b", image, video, "c", video]
    await adapting(upstream, CallLimits(10, images=1, videos=1))(mixed)
    assert [len(call) for call in upstream.calls] == [3, 3, 1]


class Choosy:
    """Refuses calls with any of the texts named `bad`."""

    def __init__(self, kind: type[InvalidRequest], *, longer_than: int | None = None) -> None:
        self.kind, self.longer_than = kind, longer_than
        self.calls = 0

    def bad(self, text: str) -> bool:
        return "bad" in text if self.longer_than is None else len(text) > self.longer_than

    async def __call__(self, batch: Batch) -> BatchResult:
        self.calls += 1
        if any(self.bad(str(text)) for text in batch.inputs):
            raise self.kind("no")
        return BatchResult([Embedding(str(text).encode(), 1) for text in batch.inputs])


async def test_however_many_are_too_long_the_short_ones_beside_them_are_embedded() -> None:
    upstream = Choosy(ContextLengthExceeded, longer_than=100)
    texts = [f"{i} {'x' * 200}" if i % 2 else f"{i}" for i in range(64)]
    result = await adapting(upstream, CallLimits(64))(batch(*texts))
    for text, outcome in zip(texts, result.outcomes, strict=True):
        if upstream.bad(text):
            assert isinstance(outcome, ContextLengthExceeded)
        else:
            assert isinstance(outcome, Embedding)
            assert outcome.vector.decode() == text
    assert result.calls == upstream.calls <= 33


async def test_what_was_refused_among_others_and_not_alone_is_not_told_that_it_is_at_fault() -> None:
    upstream = Choosy(InvalidRequest)
    texts = [f"bad {i}" if i % 2 else f"good {i}" for i in range(64)]
    result = await adapting(upstream, CallLimits(64))(batch(*texts))
    refused = {i for i, each in enumerate(result.outcomes) if isinstance(each, InvalidRequest)}
    embedded = {i for i, each in enumerate(result.outcomes) if isinstance(each, Embedding)}
    left = set(range(64)) - refused - embedded
    assert min(len(refused), len(embedded), len(left)) > 0
    assert all(i % 2 for i in refused)
    assert all(isinstance(each := result.outcomes[i], UpstreamUnavailable) and each.retryable for i in left)


async def test_where_none_was_too_long_alone_nobody_is_told_so() -> None:
    async def one_at_a_time(batch: Batch) -> BatchResult:
        if len(batch.inputs) > 1:
            raise ContextLengthExceeded("no")
        return BatchResult([Embedding(b"", 1)])

    result = await adapting(one_at_a_time, CallLimits(64))(batch(*map(str, range(64))))
    assert {type(each) for each in result.outcomes} == {Embedding, UpstreamUnavailable}


async def test_a_batch_that_is_hopeless_is_refused_as_a_whole_after_a_few_calls() -> None:
    upstream = Choosy(InvalidRequest)
    result = await adapting(upstream, CallLimits(64))(batch(*(f"bad {i}" for i in range(64))))
    assert all(isinstance(each, InvalidRequest) for each in result.outcomes)
    assert result.calls == upstream.calls <= 33


@pytest.mark.parametrize("longest", [None, 39, 40, 41])
async def test_what_one_input_may_have_is_not_learned_as_what_a_call_may(longest: int | None) -> None:
    words = "embeddings max tokens per batch size is 40"
    upstream, limits = Upstream(words, tokens=100, kind=InvalidRequest), CallLimits(16)
    await adapting(upstream, limits, longest)(batch("x" * 101, "y", "z"))
    assert limits.max_tokens_per_batch == (None if longest in (40, 41) else 40)


async def test_texts_without_a_vector_that_are_apart_keep_no_other_from_being_tried() -> None:
    async def embed(batch: Batch) -> BatchResult:
        if {"x", "y"} & set(map(str, batch.inputs)):
            raise UpstreamWrongCount("none")
        return BatchResult([Embedding(str(text).encode(), 1) for text in batch.inputs])

    limits = CallLimits(10)
    result = await adapting(embed, limits)(batch(*"xabcdyef"))
    assert answers(result) == ["none", *"abcd", "none", *"ef"]


async def test_a_server_that_has_no_vector_for_one_text_alone_either_is_still_sent_several() -> None:
    async def embed(batch: Batch) -> BatchResult:
        if len(batch.inputs) > 1 or batch.inputs[0] == "x":
            raise UpstreamWrongCount("none")
        return BatchResult([Embedding(str(text).encode(), 1) for text in batch.inputs])

    limits = CallLimits(10)
    result = await adapting(embed, limits)(batch(*"abcx"))
    assert answers(result) == [*"abc", "none"]
    assert limits.max_batch == 10


@pytest.mark.parametrize("words", [ROWS[0], TOKENS[0]])
async def test_what_is_no_refusal_of_the_call_teaches_no_limit(words: str) -> None:
    async def embed(batch: Batch) -> BatchResult:
        raise UpstreamError(words)

    limits = CallLimits(100)
    result = await adapting(embed, limits)(batch(*(f"text {i:05}" for i in range(25))))
    assert (result.calls, limits.max_batch, limits.max_tokens_per_batch) == (1, 100, None)


async def test_what_the_parts_of_a_part_have_paid_for_is_known_while_the_next_is_under_way() -> None:
    async def embed(batch: Batch) -> BatchResult:
        if "x" in batch.inputs:
            raise InvalidRequest("no")
        if "b" in batch.inputs:
            raise TimeoutError  # as when the callers' deadline passes
        return BatchResult([Embedding(str(text).encode(), 1) for text in batch.inputs])

    asked = batch(*"xabcdefg")
    with pytest.raises(TimeoutError):
        await adapting(embed, CallLimits(10))(asked)
    assert asked.completed == {b"a": Embedding(b"a", 1)}
