"""Inputs too long for the model, through the whole program: refused, cut or embedded in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from app.pipeline.lengths import InputLimit
from app.tokens import encode
from tests.fakes import FakeBaidu, FakeDashScope, FakeGemini, FakeOllama, FakeOpenAI, Vector, baidu_tokens, faults
from tests.harness import running

MODEL = "house-model"
"""Its tokenizer is unknown; the operator sets the limit on its inputs."""
COUNTED = "text-embedding-3-small"
"""A model whose tokens are counted exactly."""
BAIDU = {"type": "baidu", "mode": "v2", "api_key": "bce-v3/ALTAK-canary/canary"}
FITS = "words of four letters " * 900
"""It has more bytes than the limit has tokens, but far fewer tokens by the fakes' count."""
LONG = " ".join(f"far{i}" for i in range(12_000))
"""Too long by any count: 12,000 words for a model of 8,192 tokens."""
DENSE = "".join(chr(0x4E00 + i % 5000) for i in range(12_000))
"""It has no spaces, so that only the upstream can tell whether it is too long."""


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    models = {MODEL: 1536, COUNTED: 1536}
    with FakeOpenAI(api_key="sk-fake", models=models, matryoshka=("house", "text-embedding-3")) as fake:
        yield fake


def config(fake: FakeOpenAI, **model: Any) -> dict[str, Any]:
    upstream = {"type": "openai", "api_key": "sk-fake", "base_url": fake.url + "/v1"}
    models = {"public": {"deployments": [{"upstream": "up", "model": MODEL}], "max_tokens_per_input": 8192, **model}}
    return {"upstreams": {"up": upstream}, "models": models, "cache": {"memory": None}}


def vectors_of(response: httpx.Response) -> list[Vector]:
    assert response.status_code == 200, response.text
    return [np.array(row["embedding"], "<f4") for row in response.json()["data"]]


def counted(response: httpx.Response) -> tuple[int, int]:
    return tuple(int(response.headers.get(f"x-embedding-{what}-inputs", 0)) for what in ("truncated", "split"))  # type: ignore[return-value]


def mean(pieces: list[str], embedded: list[Vector]) -> Vector:
    total = np.zeros(len(embedded[0]))
    for piece, vector in zip(pieces, embedded, strict=True):
        total += len(piece) * vector.astype(np.float64)
    found: Vector = (total / np.linalg.norm(total)).astype("<f4")
    return found


CURE = "; shorten it, or send on_long_input: truncate or split"
"""What ends the message of a refusal that the caller could do without."""

# --- error ------------------------------------------------------------------------------------------


def test_what_is_too_long_by_any_count_is_refused_by_its_own_index_before_anything_is_sent(fake: FakeOpenAI) -> None:
    with running(config(fake)) as gateway:
        response = gateway.post({"model": "public", "input": ["short", FITS, LONG]})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input[2]")
        assert error["message"] == "input[2] has at least 12000 tokens; this model takes at most 8192" + CURE
        assert not fake.calls


def test_what_may_be_too_long_is_the_upstreams_to_judge(fake: FakeOpenAI) -> None:
    # This upstream counts 36,000 bytes as 9,000 tokens; a better tokenizer might find fewer than 8,192.
    with running(config(fake)) as gateway:
        assert counted(gateway.post({"model": "public", "input": ["short", FITS]})) == (0, 0)
        response = gateway.post({"model": "public", "input": ["short", DENSE]})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input[1]")
        assert error["message"].endswith(CURE)
        assert error["message"].count(CURE) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("风" * 385, "input[1] has at least 385 tokens; this model takes at most 384" + CURE),
        ("word " * 296, "input[1] has 1480 characters; this model takes at most 1000" + CURE),
        ("a b " * 249, "input[1] has at least 647 tokens; this model takes at most 384" + CURE),
    ],
)
def test_baidus_limits_are_kept_by_baidus_own_rule(text: str, says: str) -> None:
    with FakeBaidu(v2_key=BAIDU["api_key"]) as fake:
        with running({"upstreams": {"up": {**BAIDU, "base_url": fake.url + "/v2"}}}) as gateway:
            response = gateway.post({"model": "embedding-v1", "input": ["短", text]})
            assert (response.status_code, response.json()["error"]["message"]) == (400, says)
            assert not fake.calls
            just = "风" * 384
            assert np.array_equal(
                vectors_of(gateway.post({"model": "embedding-v1", "input": just}))[0],
                fake.expected("embedding-v1", just),
            )


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_what_fits_is_never_cut(fake: FakeOpenAI, policy: str) -> None:
    text = DENSE[: 4 * 8190 // 3]  # three bytes per character; the fake counts four bytes as a token
    with running(config(fake)) as gateway:
        response = gateway.post({"model": "public", "input": [text, "short"], "on_long_input": policy})
        assert counted(response) == (0, 0)
        assert np.array_equal(vectors_of(response)[0], fake.expected(MODEL, text))


def test_the_built_in_model_takes_no_more_of_a_text_than_there_is_memory_for() -> None:
    with running({"upstreams": {"built-in": {"type": "lexical"}}}) as gateway:
        most = "word " * 20_000
        assert gateway.post({"model": "lexical", "input": ["short", most]}).status_code == 200
        response = gateway.post({"model": "lexical", "input": ["short", most + "s"]})
        says = "input[1] has 100001 characters; this model takes at most 100000" + CURE
        assert (response.status_code, response.json()["error"]["message"]) == (400, says)
        assert counted(gateway.post({"model": "lexical", "input": most + "s", "on_long_input": "split"})) == (0, 1)


# --- truncate ---------------------------------------------------------------------------------------


def test_truncate_embeds_the_beginning_that_surely_fits_and_says_so(fake: FakeOpenAI) -> None:
    with running(config(fake, on_long_input="truncate")) as gateway:
        response = gateway.post({"model": "public", "input": ["short", LONG, "last", DENSE]})
        kept = [InputLimit(8192, None).first(text) for text in (LONG, DENSE)]
        assert counted(response) == (2, 0)
        expected = [fake.expected(MODEL, text) for text in ("short", kept[0], "last", kept[1])]
        assert all(map(np.array_equal, vectors_of(response), expected))
        assert 8000 < len(kept[0].encode()) <= 8188
        assert kept[0].endswith(" ")
        assert DENSE.startswith(kept[1])


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_what_fits_by_the_upstreams_count_is_not_cut(fake: FakeOpenAI, policy: str) -> None:
    with running(config(fake)) as gateway:
        response = gateway.post({"model": "public", "input": [FITS, "short"], "on_long_input": policy})
        assert counted(response) == (0, 0)
        assert np.array_equal(vectors_of(response)[0], fake.expected(MODEL, FITS))
        assert response.headers["x-embedding-upstream-calls"] == "1"


def test_what_looked_as_if_it_would_fit_is_cut_when_the_upstream_refuses_it_and_the_rest_is_kept(
    fake: FakeOpenAI,
) -> None:
    needs_comparison = "abcdefg " * 4400  # 8,800 tokens by the upstream's count, at least 4,400 by ours
    with running(config(fake, on_long_input="truncate") | {"cache": {}}) as gateway:
        texts = ["one", needs_comparison, "two", FITS]
        response = gateway.post({"model": "public", "input": texts})
        texts[1] = InputLimit(8192, None).first(needs_comparison)
        assert all(map(np.array_equal, vectors_of(response), (fake.expected(MODEL, text) for text in texts)))
        assert counted(response) == (1, 0)
        assert sorted(call.texts.count("one") for call in fake.calls if call.billed) == [0] * (
            sum(1 for call in fake.calls if call.billed) - 1
        ) + [1]


def test_the_request_decides_over_the_model_and_the_model_over_the_default(fake: FakeOpenAI) -> None:
    with running(config(fake, on_long_input="truncate")) as gateway:

        def status(**body: Any) -> int:
            return gateway.post({"model": "public", "input": LONG, **body}).status_code

        assert (status(), status(on_long_input="error"), status(on_long_input=None)) == (200, 400, 200)
        assert gateway.post({"model": f"up/{MODEL}", "input": LONG}).status_code == 400


def test_a_vendor_that_may_cut_in_silence_never_gets_the_chance() -> None:
    with FakeGemini(api_key="AIza-fake") as fake:
        upstream = {"type": "gemini", "api_key": "AIza-fake", "base_url": fake.url + "/v1beta"}
        with running({"upstreams": {"up": upstream}}) as gateway:
            text = "just a few words " * 200
            response = gateway.post({"model": "gemini-embedding-001", "input": text, "on_long_input": "truncate"})
            kept = InputLimit(2048, None).first(text)
            assert np.array_equal(vectors_of(response)[0], fake.expected("gemini-embedding-001", kept))
            assert counted(response) == (1, 0)


@pytest.mark.parametrize("text", ["海" * 5000, "QUJDRA" * 4000], ids=["Han", "base64"])
def test_what_is_far_too_long_is_not_left_to_a_vendor_that_cuts_in_silence(text: str) -> None:
    with FakeGemini(api_key="AIza-fake") as fake:
        upstream = {"type": "gemini", "api_key": "AIza-fake", "base_url": fake.url + "/v1beta"}
        with running({"upstreams": {"up": upstream}}) as gateway:
            response = gateway.post({"model": "gemini-embedding-001", "input": ["short", text]})
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input[1]")
            assert "about" in error["message"]
            assert not fake.calls
            assert gateway.post({"model": "gemini-embedding-001", "input": text[:3000]}).status_code == 200


def test_nor_does_a_server_of_which_the_operator_says_so(fake: FakeOpenAI) -> None:
    with running(config(fake, cuts_silently=True)) as gateway:
        response = gateway.post({"model": "public", "input": FITS, "on_long_input": "truncate"})
        assert np.array_equal(vectors_of(response)[0], fake.expected(MODEL, InputLimit(8192, None).first(FITS)))
        assert counted(response) == (1, 0)


def test_ollama_is_cut_to_the_context_its_server_tells() -> None:
    with FakeOllama() as fake:
        with running({"upstreams": {"up": {"type": "ollama", "base_url": fake.url}}}) as gateway:
            text = "token by token " * 900
            body = {"model": "nomic-embed-text", "input": text, "on_long_input": "truncate"}
            response = gateway.post(body)
            kept = InputLimit(2048, None).first(text)
            assert np.array_equal(vectors_of(response)[0], fake.expected("nomic-embed-text", kept))


# --- split ------------------------------------------------------------------------------------------


def test_split_answers_the_mean_of_the_pieces_weighted_by_length_and_sums_the_usage(fake: FakeOpenAI) -> None:
    with running(config(fake, on_long_input="split")) as gateway:
        response = gateway.post({"model": "public", "input": ["short", LONG, DENSE, LONG]})
        for place, text in ((1, LONG), (2, DENSE), (3, LONG)):
            pieces = list(InputLimit(8192, None).pieces(text))
            assert len(pieces) > 3
            expected = mean(pieces, [fake.expected(MODEL, piece) for piece in pieces])
            assert np.array_equal(vectors_of(response)[place], expected)
        assert np.array_equal(vectors_of(response)[0], fake.expected(MODEL, "short"))
        assert counted(response) == (0, 3)
        usage = response.json()["usage"]
        assert usage["prompt_tokens"] > fake.billed_tokens
        assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] == fake.billed_tokens


def test_pieces_that_a_text_has_twice_are_told_as_asked_once_and_not_as_cached(fake: FakeOpenAI) -> None:
    with running(config(fake, on_long_input="split")) as gateway:
        usage = gateway.post({"model": "public", "input": "far away " * 4000}).json()["usage"]
        free = usage["prompt_tokens_details"]["cached_tokens"]
        assert free == usage["prompt_tokens"] - fake.billed_tokens > 0
        spared = {source: gateway.metric("tokens_total", source=source) for source in ("cached", "deduplicated")}
        assert spared == {"cached": 0, "deduplicated": free}


def test_pieces_are_cached_like_any_text_and_what_was_cached_of_them_cost_nothing(fake: FakeOpenAI) -> None:
    with running(config(fake, on_long_input="split") | {"cache": {}}) as gateway:
        first, *rest = InputLimit(8192, None).pieces(LONG)
        assert gateway.post({"model": "public", "input": first}).status_code == 200
        paid = fake.billed_tokens
        whole = gateway.post({"model": "public", "input": LONG})
        details = whole.json()["usage"]["prompt_tokens_details"]
        assert (whole.headers["x-embedding-cache"], details["cached_tokens"]) == ("miss", paid)
        assert fake.rows == 1 + len(rest)
        again = gateway.post({"model": "public", "input": LONG})
        assert (again.headers["x-embedding-cache"], again.json()["data"]) == ("hit", whole.json()["data"])
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == again.json()["usage"]["prompt_tokens"]
        assert fake.rows == 1 + len(rest)


def test_pieces_of_a_shorter_vector_are_shorter_vectors(fake: FakeOpenAI) -> None:
    with running(config(fake, on_long_input="split")) as gateway:
        response = gateway.post({"model": "public", "input": LONG, "dimensions": 256})
        pieces = list(InputLimit(8192, None).pieces(LONG))
        assert np.array_equal(
            vectors_of(response)[0], mean(pieces, [fake.expected(MODEL, piece, 256) for piece in pieces])
        )


@pytest.mark.parametrize("model", ["text-embedding-v3", "text-embedding-v1"])
def test_dashscope_splits_by_its_limits(model: str) -> None:
    limit = {"text-embedding-v3": 8192, "text-embedding-v1": 2048}[model]
    with FakeDashScope(api_key="sk-fake") as fake:
        upstream = {"type": "dashscope", "api_key": "sk-fake", "base_url": fake.url + "/api/v1"}
        with running({"upstreams": {"up": upstream}}) as gateway:
            text = "春江潮水连海平,海上明月共潮生。" * 1500
            response = gateway.post({"model": model, "input": text, "on_long_input": "split", "input_type": "query"})
            pieces = list(InputLimit(limit, None).pieces(text))
            embedded = [fake.expected(model, piece, text_type="query") for piece in pieces]
            assert np.array_equal(vectors_of(response)[0], mean(pieces, embedded))


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"风急天高猿啸哀{i}" for i in range(400)),
        "to be or {} not, ".join(map(str, range(300))),
        "🙂 文字 and Ünïcödé… {}".join(map(str, range(120))),
    ],
)
def test_baidu_splits_by_its_own_rule_and_never_refuses_a_piece(text: str) -> None:
    with FakeBaidu(v2_key=BAIDU["api_key"]) as fake:
        with running({"upstreams": {"up": {**BAIDU, "base_url": fake.url + "/v2"}}}) as gateway:
            response = gateway.post({"model": "embedding-v1", "input": ["短", text], "on_long_input": "split"})
            pieces = list(InputLimit(384, 1000, "han+words").pieces(text))
            embedded = [fake.expected("embedding-v1", piece) for piece in pieces]
            assert np.array_equal(vectors_of(response)[1], mean(pieces, embedded))
            assert all(call.status == 200 for call in fake.calls)
            assert max(map(baidu_tokens, pieces)) <= 384
            assert sum(map(baidu_tokens, pieces)) + 1 == response.json()["usage"]["prompt_tokens"]


def test_a_piece_that_is_refused_for_its_content_is_named_by_the_callers_own_index(fake: FakeOpenAI) -> None:
    with running(config(fake, on_long_input="split")) as gateway:
        guilty = LONG + "guilty " + LONG
        fake.fail(
            faults.vendor_error("bad_input"),
            times=None,
            when=lambda texts: any("guilty" in str(text) for text in texts),
        )
        error = gateway.post({"model": "public", "input": ["a", "b", guilty, "c"]}).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "input[2]")


def test_space_that_fills_a_piece_is_not_embedded(fake: FakeOpenAI) -> None:
    with running(config(fake, on_long_input="split")) as gateway:
        text = "beginning " + " " * 60_000 + "end"
        response = gateway.post({"model": "public", "input": text})
        assert response.status_code == 200
        assert all(str(each).strip() for call in fake.calls for each in call.texts)


@pytest.mark.parametrize("text", ["hay " * 100 + "needle " + "hay " * 100, "needle"], ids=["a piece", "a short text"])
def test_what_is_refused_though_it_should_have_fitted_is_told_and_not_asked_again(fake: FakeOpenAI, text: str) -> None:
    with running(config(fake, on_long_input="split", max_tokens_per_input=100)) as gateway:
        refusal = faults.http_error(400, b'{"error":{"message":"input is too long"}}')
        fake.fail(refusal, times=None, when=lambda texts: any("needle" in text for text in texts))
        response = gateway.post({"model": "public", "input": ["fine", text]})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input[1]")
        assert len([call for call in fake.calls if len(call.texts) == 1 and "needle" in call.texts[0]]) == 1


def test_a_request_that_would_make_too_many_pieces_is_refused_at_once(fake: FakeOpenAI) -> None:
    with running(config(fake, on_long_input="split", max_tokens_per_input=100)) as gateway:
        response = gateway.post({"model": "public", "input": ["fine", "many " * 60_000]})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input[1]")
        assert "too many pieces" in error["message"]
        assert not fake.calls


def test_a_limit_that_leaves_no_room_is_the_callers_to_hear_of(fake: FakeOpenAI) -> None:
    with running(config(fake, on_long_input="truncate", max_tokens_per_input=4)) as gateway:
        error = gateway.post({"model": "public", "input": "one two three four five"}).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "input[0]")
        assert not fake.calls


def test_an_operators_limit_is_the_limit(fake: FakeOpenAI) -> None:
    with running(config(fake, max_tokens_per_input=3)) as gateway:
        error = gateway.post({"model": "public", "input": "one two three four"}).json()["error"]
        assert error["message"] == "input[0] has at least 4 tokens; this model takes at most 3" + CURE
        assert gateway.get("/v1/models/public").json()["max_input_tokens"] == 3


# --- counted ------------------------------------------------------------------------------------------


def counting(fake: FakeOpenAI, **model: Any) -> dict[str, Any]:
    deployments = [{"upstream": "up", "model": COUNTED}]
    return config(fake, deployments=deployments, max_tokens_per_input=20, **model)


def test_what_has_as_many_tokens_as_allowed_is_sent_and_one_more_is_refused_with_the_count(fake: FakeOpenAI) -> None:
    with running(counting(fake)) as gateway:
        assert counted(gateway.post({"model": "public", "input": " internationalization" * 10})) == (0, 0)
        assert len(encode(" internationalization" * 10)) == 20
        response = gateway.post({"model": "public", "input": ["short", " internationalization" * 10 + " x"]})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "input[1]")
        assert error["message"] == "input[1] has 21 tokens; this model takes at most 20" + CURE
        assert len(fake.calls) == 1


@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox jumps over the lazy dog. " * 40,
        "敏捷的棕色狐狸跳过了懒狗。" * 30,
        "👩‍👩‍👧‍👦🇨🇳" * 40,
        "a" * 700,
    ],
    ids=["english", "chinese", "emoji", "letters"],
)
def test_a_cut_keeps_nearly_all_that_fits_and_pieces_are_the_whole(fake: FakeOpenAI, text: str) -> None:
    with running(counting(fake, on_long_input="truncate")) as gateway:
        assert counted(gateway.post({"model": "public", "input": text})) == (1, 0)
        (kept,) = map(str, fake.calls[-1].texts)
        assert text.startswith(kept)
        assert 12 <= len(encode(kept)) <= 20
        fake.calls.clear()
        response = gateway.post({"model": "public", "input": text, "on_long_input": "split"})
        assert counted(response) == (0, 1)
        pieces = sorted({str(piece) for call in fake.calls for piece in call.texts}, key=text.find)
        assert all(len(encode(piece)) <= 20 for piece in pieces)
        assert set("".join(pieces)) == set(text)
        whole = InputLimit(20, None, "cl100k_base").pieces(text)
        assert "".join(whole) == text
        assert set(pieces) == set(whole)


# --- an unknown limit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_a_limit_is_learned_from_the_refusal_that_states_it(fake: FakeOpenAI, policy: str) -> None:
    unknown = config(fake, max_tokens_per_input=None, on_long_input=policy)
    with running({**unknown, "cache": {}}) as gateway, running(config(fake, on_long_input=policy)) as told:
        asked = {"model": "public", "input": ["short", LONG]}
        found, expected = gateway.post(asked), told.post(asked)
        for one, other in zip(vectors_of(found), vectors_of(expected), strict=True):
            assert np.array_equal(one, other)
        assert counted(found) == counted(expected)
        assert int(found.headers["x-embedding-upstream-calls"]) > int(expected.headers["x-embedding-upstream-calls"])
        assert found.json()["usage"] == expected.json()["usage"]
        assert found.headers["x-embedding-cache"] == "miss"


@pytest.mark.parametrize(
    ("says", "room"),
    [
        ("the max input characters is 1000", InputLimit(None, 1000)),
        ("String should have at most 1,000 characters", InputLimit(None, 1000)),
        ("Range of input length should be [1, 100]", InputLimit(100, None)),
        ("This model's maximum context length is 100 tokens", InputLimit(100, None)),
        ("input (602 tokens) is larger than the max context size (100 tokens). skipping", InputLimit(100, None)),
    ],
)
def test_whatever_it_is_stated_in(fake: FakeOpenAI, says: str, room: InputLimit) -> None:
    with running(config(fake, max_tokens_per_input=None, on_long_input="truncate")) as gateway:
        refusal = {"error": {"message": says, "code": "context_length_exceeded"}}
        fake.fail(faults.http_error(400, json.dumps(refusal).encode()))
        assert counted(gateway.post({"model": "public", "input": LONG})) == (1, 0)
        assert fake.calls[-1].texts == [room.first(LONG)]


def test_such_a_limit_is_the_requests_own(fake: FakeOpenAI) -> None:
    """Without a cut, the upstream decides whether to refuse: another deployment may take more."""
    with running(config(fake, max_tokens_per_input=None)) as gateway:
        cut = gateway.post({"model": "public", "input": LONG, "on_long_input": "truncate"})
        assert counted(cut) == (1, 0)
        before = len(fake.calls)
        refused = gateway.post({"model": "public", "input": LONG})
        assert refused.status_code == 400
        assert len(fake.calls) > before, "the upstream was asked"


def test_calls_before_the_one_that_fails_are_told(fake: FakeOpenAI) -> None:
    with running(config(fake, max_tokens_per_input=None, on_long_input="truncate")) as gateway:
        fake.fail(faults.http_error(400, b'{"error":{"message":"maximum context length is 100 tokens"}}'))
        fake.fail(faults.http_error(401, b'{"error":{"message":"no"}}'), times=None)
        failed = gateway.post({"model": "public", "input": LONG})
        assert failed.status_code == 502
        assert failed.headers["x-embedding-upstream-calls"] == f"{len(fake.calls)}" == "2"


def test_where_a_refusal_states_none_the_caller_is_told_what_would_help(fake: FakeOpenAI) -> None:
    with running(config(fake, max_tokens_per_input=None, on_long_input="truncate")) as gateway:
        fake.fail(faults.http_error(400, b'{"error":{"message":"input is too long"}}'), times=None)
        refused = gateway.post({"model": "public", "input": LONG})
        error = refused.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "max_tokens_per_input" in error["message"]
        assert error["message"].endswith("; to have it cut here, set models.NAME.max_tokens_per_input and ask for NAME")
        assert refused.headers["x-embedding-upstream-calls"] == f"{len(fake.calls)}"
        usual = gateway.post({"model": "public", "input": LONG, "on_long_input": "error"}).json()["error"]
        assert "max_tokens_per_input" not in usual["message"]
