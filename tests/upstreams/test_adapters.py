"""Every dialect in UPSTREAMS automatically: its folder of sample replies, and the contract of all adapters."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import app.errors
from app.catalog import Model
from app.config import UpstreamKind
from app.errors import GatewayError
from app.types import Adapter, Batch, Params, Parsed, Target, WireReply
from app.upstreams import UPSTREAMS, replies

REPLIES = Path(__file__).parent / "replies"
TABLES = [orjson.loads(path.read_bytes()) for path in sorted(REPLIES.glob("*/*.json"))]
SECRETS = ("SECRET", "bce-v3/")


class Subject:
    """An upstream as configured by one table of sample replies."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.kind: UpstreamKind = UPSTREAMS[table["settings"]["type"]]
        self.settings = self.kind.settings.model_validate(table["settings"])
        self.adapter: Adapter = self.kind.adapter(self.settings)
        name = table["model"]
        model: Model = self.kind.models(self.settings).get(name) or self.kind.unlisted_model(name)
        self.target = Target(self.settings.base_url, model)

    def build(self, batch: Batch) -> Any:
        return self.adapter.build_request(batch, self.target)


SUBJECTS = [pytest.param(Subject(table), id=json.dumps(table["settings"])) for table in TABLES]


def cases() -> Iterator[Any]:
    for table in TABLES:
        subject = Subject(table)
        for case in table["cases"]:
            mode = table["settings"].get("mode", "")
            yield pytest.param(subject, case, id=f"{subject.kind.name} {mode}: {case['what']}")


def batch_of(*texts: str, params: Params | None = None) -> Batch:
    return Batch("public", list(texts), [b"k"] * len(texts), params or Params(), True, 0.0)


def reply_of(case: dict[str, Any]) -> WireReply:
    body = case["text"].encode() if "text" in case else orjson.dumps(case["body"])
    return WireReply(case["status"], case.get("headers", {}), body)


def every_text(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from every_text(each)


@pytest.mark.parametrize("name", list(UPSTREAMS))
def test_every_upstream_has_a_folder_of_sample_replies(name: str) -> None:
    mine = [table for table in TABLES if table["settings"]["type"] == name]
    assert any("error" in case["expect"] for table in mine for case in table["cases"])
    assert any("vectors" in case["expect"] for table in mine for case in table["cases"])


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_upstream_has_models_or_a_way_to_learn_them(subject: Subject) -> None:
    """Otherwise it starts, and every name is a 404."""
    kind, settings = subject.kind, subject.settings
    assert kind.models(settings) or kind.discover or kind.assumed(settings)


@pytest.mark.parametrize(("subject", "case"), list(cases()))
def test_a_sample_reply_is_read_as_its_table_says(subject: Subject, case: dict[str, Any]) -> None:
    expect, reply = case["expect"], reply_of(case)
    error = subject.adapter.parse_error(reply)
    if "error" in expect:
        assert error is not None
        assert type(error).__name__ == expect["error"]
        assert error.retryable is expect["retry"]
        assert expect.get("says", "") in error.message
        assert error.retry_after == expect.get("retry_after")
        return
    assert error is None
    batch = batch_of(*["text"] * len(expect.get("vectors", "x")))
    if "malformed" in expect:
        with pytest.raises((KeyError, TypeError, ValueError, IndexError)):
            subject.adapter.parse_response(reply, batch)
        return
    parsed = subject.adapter.parse_response(reply, batch)
    assert list(parsed.indexes) == expect["indexes"]
    assert list(parsed.vectors) == [np.array(numbers, "<f4").tobytes() for numbers in expect["vectors"]]
    assert parsed.tokens == expect["tokens"]


def errors_of(kind: type[GatewayError]) -> Iterator[type[GatewayError]]:
    for each in kind.__subclasses__():
        yield each
        yield from errors_of(each)


@pytest.mark.parametrize("kind", [*errors_of(GatewayError)], ids=lambda kind: kind.__name__)
def test_there_are_words_for_every_error_that_a_dialect_may_give(kind: type[GatewayError]) -> None:
    error = replies.make_error(kind, WireReply(500, {}, b""), "theirs")
    assert type(error) is kind
    assert replies.upstream_message(error) == "theirs"


# --- the contract -----------------------------------------------------------------------------------

PARAMS = [
    Params(),
    Params(dimensions=256),
    Params(dimensions=64, input_type="query"),
    Params(input_type="document", instruct="Given a question, find what answers it", output_type="dense&sparse"),
]
TEXTS = ("first", "第二个", 'with "quotes"\n\x00', "🎉", "first")


@pytest.mark.parametrize("params", PARAMS, ids=repr)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_building_a_request_is_pure(subject: Subject, params: Params) -> None:
    batch = batch_of(*TEXTS, params=params)
    before = copy.deepcopy(batch)
    one, two = subject.build(batch), subject.build(batch)
    assert one == two
    assert batch == before
    # The sender adds headers to it, so it must share nothing with the next request.
    one.headers["x"] = one.query["x"] = "y"
    assert subject.build(batch) == two


@pytest.mark.parametrize("subject", SUBJECTS)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_a_request_carries_every_text_in_order(subject: Subject, texts: list[str]) -> None:
    sent = list(every_text(orjson.loads(subject.build(batch_of(*texts)).body)))
    # The texts are adjacent, or separated by equally many strings of the dialect.
    places = itertools.product(range(len(sent)), range(1, 5))
    assert any(sent[start::step][: len(texts)] == texts for start, step in places)


@pytest.mark.parametrize("params", PARAMS, ids=repr)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_request_is_a_post_of_json_under_the_base_url_without_secrets(subject: Subject, params: Params) -> None:
    request = subject.build(batch_of(*TEXTS, params=params))
    assert request.method == "POST"
    assert request.url.startswith(subject.target.base_url + "/")
    assert "?" not in request.url
    assert all(name == name.lower() for name in request.headers)
    assert request.headers["content-type"] == "application/json"
    assert not any(secret in repr(request) for secret in SECRETS)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = (
    *("error", "code", "type", "message", "msg", "detail", "error_code", "error_msg"),
    *("data", "index", "text_index", "embedding", "embeddings", "output", "usage", "total_tokens"),
    *("values", "usageMetadata", "promptTokenCount", "details", "reason", "violations", "quotaId", "retryDelay"),
)
# Plausible replies: the known keys, with any values.
ALIKE = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 600) | st.floats() | st.sampled_from(["", "zczMPQ==", "1", "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=20,
)
BODIES = st.binary(max_size=200) | ANYTHING.map(json.dumps).map(lambda text: text.encode("utf-8", "replace"))
BODIES |= ALIKE.map(lambda value: orjson.dumps(value))
STATUSES = st.just(200) | st.integers(100, 599)
HEADERS = st.dictionaries(st.sampled_from(["retry-after", "retry-after-ms", "date"]), st.text(max_size=30))


@pytest.mark.parametrize("subject", SUBJECTS)
@given(status=STATUSES, headers=HEADERS, body=BODIES)
@settings(max_examples=150, deadline=None)
def test_no_reply_whatsoever_upsets_an_adapter(
    subject: Subject, status: int, headers: dict[str, str], body: bytes
) -> None:
    reply = WireReply(status, headers, body)
    error = subject.adapter.parse_error(reply)
    if error is not None:
        assert isinstance(error, GatewayError)
        assert error.message
        assert len(error.message) <= 8500
        assert error.retry_after is None or 0 <= error.retry_after < float("inf")
    else:
        assert status < 300
    try:
        parsed = subject.adapter.parse_response(reply, batch_of("a"))
    except (KeyError, TypeError, ValueError, IndexError):
        return
    assert isinstance(parsed, Parsed)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_long_complaint_is_cut_to_size(subject: Subject) -> None:
    for body in (b'{"error":{"message":"' + b"x" * 9000 + b'"}}', b"<p>" * 5000 + b"y" * 9000):
        error = subject.adapter.parse_error(WireReply(500, {}, body))
        assert error is not None
        assert len(error.message) <= 8500


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("size", [2**19, 16 * 2**20])
def test_a_complaint_without_end_holds_nobody_up(subject: Subject, size: int) -> None:
    words = b"model of context, a maximum " * (size // 28)
    for body in (
        b'{"code":"x","error":{"message":"' + words + b'"}}',
        b'{"error_code":1,"error":"' + words + b'"}',
        words,
    ):
        started = time.thread_time()
        error = subject.adapter.parse_error(WireReply(400, {}, body))
        assert time.thread_time() - started < 0.2
        assert error is not None
        assert error.retry_after is None


def test_no_status_of_an_upstream_becomes_the_callers_401_or_404() -> None:
    for table in TABLES:
        adapter = Subject(table).adapter
        for status in range(300, 600):
            error = adapter.parse_error(WireReply(status, {}, b""))
            assert error is not None
            assert not isinstance(error, app.errors.InvalidApiKey | app.errors.ModelNotFound)
            assert error.status in (400, 429, 502, 503, 504)


@pytest.mark.parametrize("status", [404, 405, 406, 410, 411, 415, 417, 421, 426, 431, 451, 501])
def test_a_status_for_our_address_or_framing_or_place_is_not_the_callers_fault(status: int) -> None:
    for table in TABLES:
        reply = WireReply(status, {}, b'{"error": {"message": "nope"}}')
        assert type(Subject(table).adapter.parse_error(reply)) is app.errors.UpstreamMisconfigured
