"""Bad requests: each is refused with OpenAI's error, naming the field, before anything reaches an upstream."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.api.embeddings import INLINE_PARSE_LIMIT
from app.api.schema import check_object_count, parse_body
from app.errors import InvalidRequest
from tests.api.support import FIXED_LENGTH, MODEL, error_of, head, post, wire
from tests.api.support import config as config_of
from tests.fakes import FakeOpenAI
from tests.harness import Running, running

MAX_INPUTS = 20


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as fake:
        yield fake


@pytest.fixture(scope="module")
def gateway(upstream: FakeOpenAI) -> Iterator[Running]:
    server = {"max_inputs": MAX_INPUTS, "max_body": "1MiB"}
    with running(config_of(upstream, server=server)) as gateway:
        yield gateway


@pytest.fixture
def fake(upstream: FakeOpenAI) -> FakeOpenAI:
    upstream.reset()
    return upstream


@pytest.fixture(scope="module")
def client(gateway: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        yield client


def refused(response: httpx.Response, status: int, code: str, param: str | None, words: str) -> None:
    assert response.status_code == status, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert (error["code"], error["param"]) == (code, param)
    assert words in error["message"]
    assert len(error["message"]) < 1000


# --- large bodies with nothing in them ----------------------------------------------------------------------


def test_a_large_body_of_little_things_is_refused(fake: FakeOpenAI, gateway: Running) -> None:
    body = f'{{"model":"{MODEL}","input":[{",".join(["[]"] * 300_000)}]}}'
    refused(gateway.post(body.encode()), 400, "invalid_value", None, "strings, lists and objects")
    assert not fake.calls


@pytest.mark.parametrize("item", ["[]", "{}", '"a"', r'"\\"', '{"a":[]}', "[" * 50 + "]" * 50])
def test_before_they_are_made(item: str) -> None:
    body = f'{{"model":"{MODEL}","input":[{",".join([item] * (1_500_000 // len(item)))}]}}'
    with pytest.raises(InvalidRequest, match="strings, lists and objects"):
        check_object_count(body.encode(), max_inputs=MAX_INPUTS)


@pytest.mark.parametrize(
    "text",
    ["[]" * 90_000, '{"a":"b"}' * 20_000, "[" * 199_999 + "\\", "\\" * 99_999 + '"' * 99_999, '\n\t\\"[[["' * 20_000],
)
def test_what_stands_in_texts_is_none_of_them(text: str) -> None:
    body = json.dumps({"model": "m", "input": [text, text, "{"]})
    assert len(body) > INLINE_PARSE_LIMIT
    check_object_count(body.encode(), max_inputs=3)


def test_nor_is_what_large_requests_are_made_of() -> None:
    part = {"type": "image_url", "image_url": {"url": "https://example.com/" + "x" * 100, "detail": "low"}}
    for inputs in ([part] * 2048, [[100_000] * 1000] * 2048, [5] * 500_000, ["a"] * 2048 + ["b" * 2**18]):
        check_object_count(json.dumps({"model": "m", "input": inputs}).encode(), max_inputs=2048)


# --- bodies that are not a request --------------------------------------------------------------------------

SURROGATE = rb"\ud800"
DEEP = 100_000

BODIES: dict[str, tuple[bytes, str, str]] = {
    "nothing": (b"", "invalid_json", "not valid JSON"),
    "invalid UTF-8": (b"\xff\xfe\xfd", "invalid_json", "UTF-8"),
    "invalid UTF-8 in a text": (b'{"model":"m","input":"\xff"}', "invalid_json", "not UTF-8 at byte 22"),
    "a surrogate encoded as UTF-8": (b'{"model":"m","input":"\xed\xa0\x80"}', "invalid_json", "UTF-8"),
    "UTF-16": ('{"model":"m","input":"hi"}'.encode("utf-16"), "invalid_json", "UTF-8"),
    "a byte order mark": (b'\xef\xbb\xbf{"model":"m","input":"hi"}', "invalid_json", "not valid JSON"),
    "half a surrogate pair": (b'{"model":"m","input":"%b"}' % SURROGATE, "invalid_unicode", "surrogate"),
    "the other half": (rb'{"model":"m","input":"\udc00"}', "invalid_unicode", "surrogate"),
    "halves in the wrong order": (rb'{"model":"m","input":"\udc00\ud800"}', "invalid_unicode", "surrogate"),
    "a surrogate in one of several texts": (b'{"model":"m","input":["a","%b"]}' % SURROGATE, "invalid_unicode", ""),
    "a surrogate in the wrong type": (b'{"model":"m","input":{"a":"%b"}}' % SURROGATE, "invalid_unicode", ""),
    "a surrogate in a number's place": (b'{"dimensions":"%b"}' % SURROGATE, "invalid_unicode", ""),
    "a surrogate in the model's name": (b'{"model":"%b","input":"a"}' % SURROGATE, "invalid_unicode", ""),
    "a surrogate in a key": (b'{"%b":1}' % SURROGATE, "invalid_unicode", ""),
    "NaN": (b'{"model":"m","input":NaN}', "invalid_json", "not valid JSON"),
    "Infinity": (b'{"model":"m","input":"a","dimensions":Infinity}', "invalid_json", ""),
    "-Infinity": (b'{"model":"m","input":"a","dimensions":-Infinity}', "invalid_json", ""),
    "a number beyond double": (b'{"model":"m","input":"a","dimensions":1e400}', "invalid_json", ""),
    "an integer of 5,000 digits": (b'{"model":"m","input":[%b]}' % (b"9" * 5000), "invalid_json", ""),
    "a negative one": (b'{"model":"m","input":"a","dimensions":-%b}' % (b"9" * 5000), "invalid_json", ""),
    "lists 100,000 deep": (b"[" * DEEP + b"]" * DEEP, "invalid_json", "depth"),
    "lists 100,000 deep and not closed": (b"[" * DEEP, "invalid_json", "depth"),
    "objects 100,000 deep": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "invalid_json", "depth"),
    "an input 100,000 deep": (b'{"model":"m","input":' + b"[" * DEEP + b"]" * DEEP + b"}", "invalid_json", "depth"),
    "an unknown field 100,000 deep": (b'{"x":' + b"[" * DEEP + b"]" * DEEP + b"}", "invalid_json", "depth"),
    "cut off": (b'{"model":"m","input":"hi', "invalid_json", "not valid JSON"),
    "more after the end": (b'{"model":"m","input":"hi"}{}', "invalid_json", "not valid JSON"),
    "Python, not JSON": (b"{'model':'m','input':None}", "invalid_json", "not valid JSON"),
    "a form": (b"model=m&input=hi", "invalid_json", "not valid JSON"),
    "a trailing comma": (b'{"model":"m","input":["hi",]}', "invalid_json", "not valid JSON"),
    "a raw line end in a text": (b'{"model":"m","input":"a\nb"}', "invalid_json", "not valid JSON"),
    "null": (b"null", "invalid_value", "must be a JSON object, not null"),
    "a list": (b"[]", "invalid_value", "must be a JSON object, not a list"),
    "a string": (b'"hi"', "invalid_value", "must be a JSON object, not a string"),
    "a number": (b"1", "invalid_value", "must be a JSON object, not 1"),
    "true": (b"true", "invalid_value", "must be a JSON object, not a boolean"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_a_400(name: str, fake: FakeOpenAI, client: httpx.Client) -> None:
    body, code, words = BODIES[name]
    before = len(fake.requests)
    response = client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
    refused(response, 400, code, None, words)
    assert not fake.calls
    assert len(fake.requests) == before, "the upstream is not even asked for its models"


# --- invalid fields ------------------------------------------------------------------------------------------

V, NO_MODEL = "invalid_value", "you must provide a model parameter"
NOT_AN_ITEM = "must be a string or a list of token ids, not"
NOT_IDS = "must hold token ids only"
NO_ID = "is no cl100k_base token id"

Case = tuple[dict[str, Any], str, str | None, str]


NO_CHOICES: tuple[object, ...] = ("", "no such", 1, 0, True, False, 1.5, [], ["float"], {}, {"a": 1}, "x" * 100_000)


def wrong(field: str, values: Iterable[object], words: str) -> list[Case]:
    """One case for each value that this field must not have."""
    return [({field: value}, V, field, words) for value in values]


FIELDS: list[Case] = [
    # input
    ({"input": None}, V, "input", "you must provide input"),
    ({"input": ""}, V, "input", "must not be an empty string"),
    ({"input": []}, V, "input", "must not be an empty list"),
    ({"input": [""]}, V, "input[0]", "must not be an empty string"),
    ({"input": ["a"] * 7 + [""]}, V, "input[7]", "input[7] must not be an empty string"),
    ({"input": ["a"] * 7 + ["", ""]}, V, "input[7]", "input[7]"),
    ({"input": [[]]}, V, "input[0]", "must not be an empty list of token ids"),
    ({"input": [[1], []]}, V, "input[1]", "must not be an empty list of token ids"),
    ({"input": ["a"] * (MAX_INPUTS + 1)}, V, "input", f"has 21 items; at most {MAX_INPUTS}"),
    ({"input": [[1]] * (MAX_INPUTS + 1)}, V, "input", f"has 21 items; at most {MAX_INPUTS}"),
    ({"input": [None] * (MAX_INPUTS + 1)}, V, "input", f"has 21 items; at most {MAX_INPUTS}"),
    ({"input": True}, V, "input", "not a boolean"),
    ({"input": 5}, V, "input", "not 5"),
    ({"input": 1.5}, V, "input", "not 1.5"),
    ({"input": {}}, V, "input", "not an object"),
    ({"input": {"text": "a"}}, V, "input", "not an object"),
    ({"input": [True]}, V, "input[0]", f"{NOT_AN_ITEM} a boolean"),
    ({"input": [1.5]}, V, "input[0]", f"{NOT_AN_ITEM} 1.5"),
    ({"input": [None]}, V, "input[0]", f"{NOT_AN_ITEM} null"),
    ({"input": [{}]}, V, "input[0]", "a content object has exactly one of"),
    ({"input": ["a"] * 7 + [None]}, V, "input[7]", f"{NOT_AN_ITEM} null"),
    ({"input": ["a"] * 7 + [True]}, V, "input[7]", f"{NOT_AN_ITEM} a boolean"),
    ({"input": ["a"] * 7 + [{"b": 1}]}, V, "input[7]", "a content object has exactly one of"),
    ({"input": ["a", 1]}, V, "input[1]", "input[1] is 1 among items of another kind"),
    ({"input": ["a", [1]]}, V, "input[1]", "a list among items of another kind"),
    ({"input": [[1], "a"]}, V, "input[1]", "a string among items of another kind"),
    ({"input": [1, "a"]}, V, "input[1]", "a string among items of another kind"),
    ({"input": [1, [2]]}, V, "input[1]", "a list among items of another kind"),
    ({"input": [None, "a"]}, V, "input[0]", f"{NOT_AN_ITEM} null"),
    ({"input": [{}, "a", "b"]}, V, "input[0]", "a content object has exactly one of"),
    ({"input": [1.5, 2]}, V, "input[0]", f"{NOT_AN_ITEM} 1.5"),
    ({"input": [1, 2, True]}, V, "input[2]", f"{NOT_AN_ITEM} a boolean"),
    ({"input": ["a", 1, None]}, V, "input[2]", f"{NOT_AN_ITEM} null"),
    # token ids
    ({"input": [100_256]}, V, "input", f"holds 100256 at position 0, which {NO_ID}"),
    ({"input": [100_257]}, V, "input", f"holds 100257 at position 0, which {NO_ID} of any text"),  # <|endoftext|>
    ({"input": [1, 2, -1]}, V, "input", f"holds -1 at position 2, which {NO_ID}"),
    ({"input": [2**63]}, V, "input", NO_ID),
    ({"input": [-(2**63)]}, V, "input", NO_ID),
    ({"input": [[1], [2, 100_256]]}, V, "input[1]", f"holds 100256 at position 1, which {NO_ID}"),
    ({"input": [10**30]}, V, "input[0]", f"{NOT_AN_ITEM} a number"),
    ({"input": [1, 10**30]}, V, "input[1]", f"{NOT_AN_ITEM} a number"),
    ({"input": [[1], [10**30]]}, V, "input[1]", NOT_IDS),
    ({"input": [[1], ["a"]]}, V, "input[1]", NOT_IDS),
    ({"input": [[1], [None]]}, V, "input[1]", NOT_IDS),
    ({"input": [[1], [True]]}, V, "input[1]", NOT_IDS),
    ({"input": [[1], [1.5]]}, V, "input[1]", NOT_IDS),
    ({"input": [[[1]]]}, V, "input[0]", NOT_IDS),
    ({"input": [[1], [[]]]}, V, "input[1]", NOT_IDS),
    # dimensions
    *wrong(
        "dimensions",
        (0, -1, "256", 1.5, 256.0, True, False, 10**30, [], {}, ""),
        "dimensions must be a whole number of at least 1",
    ),
    ({"dimensions": 65536}, "unsupported_dimensions", "dimensions", "at most 1536"),
    ({"dimensions": 65537}, "unsupported_dimensions", "dimensions", "more than 65536"),
    ({"dimensions": 2**63}, "unsupported_dimensions", "dimensions", "more than 65536"),
    ({"dimensions": 1537}, "unsupported_dimensions", "dimensions", "at most 1536"),
    ({"dimensions": 256, "model": FIXED_LENGTH}, "unsupported_dimensions", "dimensions", "only 1536"),
    # choices
    *(
        case
        for field in ("encoding_format", "input_type", "text_type", "output_type", "on_long_input")
        for case in wrong(field, NO_CHOICES, f"Invalid value for '{field}'")
    ),
    ({"encoding_format": "BASE64"}, V, "encoding_format", "Supported values: ['float', 'base64']"),
    ({"input_type": "passage"}, V, "input_type", "Supported values: ['query', 'document']"),
    ({"input_type": "query", "text_type": "document"}, V, "text_type", "differ"),
    ({"output_type": "sparse"}, V, "output_type", "dense vectors only"),
    # texts
    *wrong("user", (1, True, [], {}, 1.5, 10**30), "user must be a string"),
    *wrong("instruct", (1, True, [], {}, 1.5), "instruct must be a string"),
    ({"instruct": "find"}, V, "instruct", "takes no instruction"),
    ({"instruct": "x" * 4097}, V, "instruct", "has 4097 characters"),
    # model
    *wrong("model", (None, "", 1, True, [], {}, ["m"], 1.5), NO_MODEL),
]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:40]}…{len(text)}"


@pytest.mark.parametrize(
    ("fields", "code", "param", "words"), FIELDS, ids=[f"{i}-{_shown(case[0])}" for i, case in enumerate(FIELDS)]
)
def test_a_field_that_is_wrong_is_a_400_that_names_it(
    fields: dict[str, Any], code: str, param: str, words: str, fake: FakeOpenAI, client: httpx.Client
) -> None:
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": "hi", **fields})
    refused(response, 400, code, param, words)
    assert not fake.calls


@pytest.mark.parametrize(("field", "words"), [("model", NO_MODEL), ("input", "you must provide input")])
def test_a_required_field_that_is_missing_is_named(
    field: str, words: str, fake: FakeOpenAI, client: httpx.Client
) -> None:
    body = {"model": MODEL, "input": "hi"}
    del body[field]
    refused(client.post("/v1/embeddings", json=body), 400, V, field, words)
    assert not fake.calls


def test_an_unknown_model_is_a_404_that_lists_no_model_the_upstream_has(fake: FakeOpenAI, client: httpx.Client) -> None:
    response = client.post("/v1/embeddings", json={"model": "gpt-4", "input": "hi"})
    refused(response, 404, "model_not_found", "model", "The model 'gpt-4' does not exist")
    assert error_of(response)["message"].endswith("; GET /v1/models lists what does")
    assert not any(name in response.text for name in fake.models)
    assert not fake.calls


@pytest.mark.parametrize(
    "name", ["x" * 100_000, "模" * 50_000, "\0" * 1000, "a\r\nb", "../../etc/passwd", "{0.__class__}"]
)
def test_an_unknown_models_name_comes_back_cut_and_harmless(name: str, fake: FakeOpenAI, client: httpx.Client) -> None:
    response = client.post("/v1/embeddings", json={"model": name, "input": "hi"})
    refused(response, 404, "model_not_found", "model", f"'{name[:200]}'")
    assert not fake.calls


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "zstd", "gzip, identity", "nonsense"])
def test_a_compressed_body_is_a_415_and_is_not_unpacked(encoding: str, fake: FakeOpenAI, client: httpx.Client) -> None:
    bomb = gzip.compress(b'{"model":"m","input":"' + b"a" * 50_000_000 + b'"}')
    response = client.post("/v1/embeddings", content=bomb, headers={"content-encoding": encoding})
    refused(response, 415, "unsupported_encoding", None, "compressed")
    assert not fake.calls


@pytest.mark.parametrize(
    "declared",
    ["text/plain;charset=UTF-8", "text/plain; application/json", "application/x-www-form-urlencoded", "", "json"],
)
def test_a_body_that_a_browser_sends_for_any_web_page_is_a_415(
    declared: str, fake: FakeOpenAI, client: httpx.Client
) -> None:
    """A page cannot read such a request's answer, but it could have it paid for."""
    body = b'{"model":"%b","input":"hi"}' % MODEL.encode()
    headers = {"origin": "https://page.example", "content-type": declared}
    refused(
        client.post("/v1/embeddings", content=body, headers=headers), 415, "unsupported_media_type", None, "web page"
    )
    assert not fake.calls
    assert client.post("/v1/embeddings", content=body, headers={"content-type": declared}).status_code == 200


@pytest.mark.parametrize("declared", ["application/json", "Application/JSON; charset=utf-8"])
def test_a_body_that_a_browser_sends_only_with_leave_is_answered(declared: str, client: httpx.Client) -> None:
    """Such as that of the page at /docs."""
    body = b'{"model":"%b","input":"hi"}' % MODEL.encode()
    headers = {"origin": "http://127.0.0.1:8080", "content-type": declared}
    assert client.post("/v1/embeddings", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "identity, utf-8"])
def test_a_charset_that_stands_for_a_coding_changes_nothing(
    encoding: str, fake: FakeOpenAI, client: httpx.Client
) -> None:
    """Some clients write the charset where a coding belongs."""
    body = b'{"model":"%b","input":"hi"}' % MODEL.encode()
    headers = {"content-encoding": encoding}
    assert client.post("/v1/embeddings", content=body, headers=headers).status_code == 200
    response = client.post("/v1/embeddings", content=gzip.compress(body), headers=headers)
    refused(response, 400, "invalid_json", None, "not valid JSON")
    assert len(fake.calls) == 1


# --- unusual but valid -----------------------------------------------------------------------------------------


def test_of_a_key_sent_twice_the_last_counts(fake: FakeOpenAI, client: httpx.Client) -> None:
    body = b'{"model":"no such","input":"first","model":"%b","input":"last"}' % MODEL.encode()
    assert client.post("/v1/embeddings", content=body).status_code == 200
    assert [call.texts for call in fake.calls] == [["last"]]


@pytest.mark.parametrize("text", ["\0", "a\0b", "\0" * 100, "\u0001\u001f\u007f", "\ufeffx", "\uffff", "a\u2028b", " "])
def test_null_bytes_and_other_oddities_reach_the_upstream_intact(
    text: str, fake: FakeOpenAI, client: httpx.Client
) -> None:
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": [text, "other"]})
    assert response.status_code == 200
    alone = client.post("/v1/embeddings", json={"model": MODEL, "input": text})
    assert [call.texts for call in fake.calls] == [[text, "other"], [text]]
    for answer in (response, alone):
        vector = np.array(answer.json()["data"][0]["embedding"], "<f4")
        assert np.array_equal(vector, fake.expected(MODEL, text))


def test_null_is_absence_and_unknown_fields_are_ignored(fake: FakeOpenAI, client: httpx.Client) -> None:
    optional = (
        "encoding_format", "dimensions", "user", "input_type", "text_type", "output_type", "instruct",
    )  # fmt: skip
    unknown = {"api_base": "http://evil", "api_key": "sk-x", "user_config": {"a": []}, "stream": True}
    body = {"model": MODEL, "input": "hi", **dict.fromkeys(optional), **unknown}
    assert client.post("/v1/embeddings", json=body).status_code == 200
    (call,) = fake.calls
    assert set(call.json) == {"model", "input", "encoding_format"}


def test_input_type_and_its_synonym_may_agree(fake: FakeOpenAI, client: httpx.Client) -> None:
    body = {"model": MODEL, "input": "hi", "input_type": "query", "text_type": "query"}
    assert client.post("/v1/embeddings", json=body).status_code == 200
    assert len(fake.calls) == 1


def test_as_many_inputs_as_allowed_are_allowed(fake: FakeOpenAI, client: httpx.Client) -> None:
    texts = [f"text {i}" for i in range(MAX_INPUTS)]
    assert client.post("/v1/embeddings", json={"model": MODEL, "input": texts}).status_code == 200
    assert fake.rows == MAX_INPUTS


def test_a_list_of_token_ids_is_one_input_however_many_they_are(fake: FakeOpenAI, client: httpx.Client) -> None:
    ids = [9906] * (MAX_INPUTS * 2)
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": ids})
    assert response.status_code == 200
    assert [call.texts for call in fake.calls] == [["Hello" * len(ids)]]


BLANKS = 58040
"""The token id of 128 spaces, the longest text of any id."""


@pytest.mark.parametrize(
    ("ids", "param"),
    [
        ([BLANKS] * 8193, "input"),
        ([[BLANKS] * 8193, [5]], "input[0]"),
        ([[BLANKS] * 4096, [BLANKS] * 4096, [5], [5]], "input[2]"),
        ([[BLANKS] * 8191, [222] * 43], "input[1]"),
    ],
    ids=["one", "the first", "together", "halves of characters, which become three bytes each"],
)
def test_token_ids_that_stand_for_more_text_than_a_body_may_have_are_a_413(
    ids: list[Any], param: str, fake: FakeOpenAI, client: httpx.Client
) -> None:
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": ids})
    refused(response, 413, "body_too_large", param, "may stand for 1048576 bytes of text")
    assert not fake.calls


def test_and_as_much_as_a_body_may_have_is_read() -> None:
    for ids in ([BLANKS] * 8192, [[BLANKS] * 8191, [222] * 42, [5, 5]]):
        body = parse_body(json.dumps({"model": "m", "input": ids}).encode(), max_inputs=3, max_decoded=2**20)
        assert sum(len(str(text).encode()) for text in body.inputs) == body.decoded == 2**20


# --- how the body arrives --------------------------------------------------------------------------------------


def test_a_body_said_to_be_too_large_is_refused_before_it_comes(fake: FakeOpenAI, gateway: Running) -> None:
    for length in (2**20 + 1, 10**12, 2**63 - 1):
        with wire(gateway.url) as connection:
            connection.send(head("POST", "/v1/embeddings", f"Content-Length: {length}"))
            reply = connection.must_reply()
            assert reply.status_code == 413
            assert error_of(reply)["code"] == "body_too_large"
            assert reply.headers["connection"] == "close"
            assert connection.closed
    assert not fake.calls


def test_a_body_of_exactly_the_limit_is_read(fake: FakeOpenAI, client: httpx.Client) -> None:
    body = json.dumps({"model": MODEL, "input": "hi"}).encode().ljust(2**20)
    assert client.post("/v1/embeddings", content=body).status_code == 200
    response = client.post("/v1/embeddings", content=body + b" ")
    refused(response, 413, "body_too_large", None, "larger than 1048576 bytes")
    assert len(fake.calls) == 1


def test_a_growing_body_is_refused_when_it_passes_the_limit_and_no_more_is_read(
    fake: FakeOpenAI, gateway: Running
) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    much = 256 * 2**20  # far more than sockets buffer
    with wire(gateway.url) as connection:
        connection.send(head("POST", "/v1/embeddings", "Transfer-Encoding: chunked"))
        sent = 0
        try:
            while sent < much:
                connection.send(chunk)
                sent += len(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < much, "the server went on reading"
        reply = connection.reply()
        if reply is not None:  # a reset may overtake the answer if the caller does not read while it sends
            assert reply.status_code == 413
            assert error_of(reply)["code"] == "body_too_large"
    assert not fake.calls
    gateway_is_empty(gateway)


def test_a_growing_body_is_answered_as_soon_as_it_passes_the_limit(fake: FakeOpenAI, gateway: Running) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with wire(gateway.url) as connection:
        connection.send(head("POST", "/v1/embeddings", "Transfer-Encoding: chunked"))
        connection.send(chunk * 16)
        connection.send(b"1\r\n \r\n")  # without the final chunk
        reply = connection.must_reply()
        assert reply.status_code == 413
        assert error_of(reply)["code"] == "body_too_large"
        assert reply.headers["connection"] == "close"
        assert connection.closed
    assert not fake.calls
    gateway_is_empty(gateway)


def gateway_is_empty(gateway: Running) -> None:
    """After a round trip, no request is in flight."""
    assert gateway.get("/healthz").status_code == 200
    assert gateway.metric("inflight_requests") == 0


def test_a_body_that_does_not_come_in_time_is_a_408_and_the_connection_is_closed() -> None:
    whole = post({"model": MODEL, "input": "hi"})
    chunked = head("POST", "/v1/embeddings", "Transfer-Encoding: chunked") + b'1\r\n{\r\n4\r\n"mo'
    with FakeOpenAI() as fake, running(config_of(fake, server={"request_timeout": "300ms"})) as gateway:
        for part in (whole[:-1], whole[: whole.index(b"\r\n\r\n") + 4], chunked):
            with wire(gateway.url) as connection:
                connection.send(part)
                reply = connection.must_reply()
                assert reply.status_code == 408
                error = error_of(reply)
                assert (error["code"], error["type"]) == ("slow_body", "invalid_request_error")
                assert reply.headers["connection"] == "close"
                assert connection.closed
        assert not fake.calls
        assert gateway.metric("rejected_requests_total", reason="slow_body") == 3
        assert gateway.metric("requests_total", status="408") == 3
        gateway_is_empty(gateway)


# --- anything at all --------------------------------------------------------------------------------------------

bounded = settings(
    max_examples=300, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

any_text = st.text(st.characters(exclude_categories=()), max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | any_text
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=25) | st.dictionaries(any_text, inner, max_size=4), max_leaves=30
)
FIELD_NAMES = (
    "model", "input", "encoding_format", "dimensions", "user", "input_type", "text_type", "output_type", "instruct",
)  # fmt: skip
embedding_lists = st.lists(st.lists(st.integers(-2, 100_300) | scalars, max_size=5) | any_text | scalars, max_size=25)
good_values = st.sampled_from(
    [MODEL, FIXED_LENGTH, "hi", "float", "base64", "query", "document", "dense", 256, [1], ["a"]]
)
fields = st.dictionaries(st.sampled_from(FIELD_NAMES), json_values | embedding_lists | good_values, max_size=4)


def check_answer(client: httpx.Client, body: bytes) -> None:
    """Whatever was sent, the response is an answer or an error of the caller's."""
    response = client.post("/v1/embeddings", content=body)
    if response.status_code == 200:
        answer = response.json()
        assert answer["object"] == "list"
        assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
    else:
        assert 400 <= response.status_code < 500, response.text
        error = error_of(response)
        assert error["type"] == "invalid_request_error"


@bounded
@given(body=st.binary(max_size=200))
def test_random_bytes_are_the_callers_error(body: bytes, client: httpx.Client) -> None:
    check_answer(client, body)


@bounded
@given(value=json_values)
def test_random_json_is_the_callers_error(value: object, client: httpx.Client) -> None:
    check_answer(client, json.dumps(value).encode())


@bounded
@given(values=fields)
def test_random_values_in_known_fields_are_answered_or_are_the_callers_error(
    values: dict[str, object], client: httpx.Client
) -> None:
    check_answer(client, json.dumps({"model": MODEL, "input": "hi", **values}).encode())


def test_no_bad_request_costs_the_connection_that_brought_it_whole(client: httpx.Client) -> None:
    bad = itertools.islice(BODIES.values(), 5)
    for body, _, _ in bad:
        assert "connection" not in client.post("/v1/embeddings", content=body).headers
