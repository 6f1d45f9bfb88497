import base64
import json
import subprocess
import sys
import threading
import time
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import vectors
from app.errors import UpstreamInvalidResponse
from app.types import Parsed
from app.upstreams import json_vectors

FLOATS = st.floats(allow_nan=False, allow_infinity=False) | st.floats(width=32, allow_nan=False, allow_infinity=False)
NUMBERS = FLOATS | st.integers(-(2**70), 2**70)


def reply(*rows: str) -> bytes:
    """A reply with enough numbers first to count as a reply of numbers."""
    listed = ",".join(f'{{"index":{i},"embedding":{row}}}' for i, row in enumerate(rows))
    return f'{{"first":[{",".join(["0.5"] * 64)}],"data":[{listed}],"usage":{{"total_tokens":7}}}}'.encode()


def read(raw: bytes) -> Parsed:
    body = json_vectors.load(raw, 4)
    assert body["usage"] == {"total_tokens": 7}
    return Parsed([row["index"] for row in body["data"]], vectors.parse([row["embedding"] for row in body["data"]]))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=20), min_size=1, max_size=4))
def test_numbers_of_any_kind_become_the_same_float32_as_by_way_of_python(rows: list[list[float]]) -> None:
    printed = [repr(row) for row in rows]
    assert read(reply(*printed)).vectors == [vectors.from_numbers(orjson.loads(row)) for row in printed]


def test_a_reply_of_numbers_is_vectors_from_the_start() -> None:
    pytest.importorskip("simdjson", reason="it is not there for this Python: numbers are vectors a step later")
    body = json_vectors.load(reply("[1, 2.5]"), 1)
    assert body["data"][0]["embedding"] == vectors.from_numbers([1, 2.5])


def test_of_many_lists_of_numbers_other_threads_get_a_turn_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simdjson", reason="it is not there for this Python: the lists are read all at once")
    turns: list[float] = []
    monkeypatch.setattr(time, "sleep", turns.append)
    read(reply(*["[1, 2.5]"] * 100))
    assert turns == [], "on the event loop's thread there is nobody to give one to"
    aside = threading.Thread(target=read, args=[reply(*["[1, 2.5]"] * 100)])
    aside.start()
    aside.join()
    assert turns == [0] * 6


def test_and_the_same_where_there_is_no_simdjson(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ("[1, 2.5]", "[1e-3, -7, 0.1]", f"[{2**70}, 3.4028236e38]")
    with_it = read(reply(*rows)).vectors
    monkeypatch.setattr(json_vectors, "simdjson", None)
    assert read(reply(*rows)).vectors == with_it
    with pytest.raises(orjson.JSONDecodeError):
        json_vectors.load(reply("[NaN]"), 1)


@pytest.mark.parametrize(
    "row", ["[NaN]", "[Infinity]", "[1,]", "[01]", "[0x1]", "[.5]", "[1e999]", "[1", '["\\ud800"]']
)
def test_what_is_no_json_is_refused(row: str) -> None:
    with pytest.raises(orjson.JSONDecodeError):
        json_vectors.load(reply(row), 1)


@pytest.mark.parametrize(
    "row",
    [
        '[1,"2"]',
        "[1,[2]]",
        "[[1],2]",
        "[1,{}]",
        "[[1,2]]",
        "7",
        "{}",
        "[1,true]",
        "[false]",
        "[0.5,true]",
        "[0.5,false]",
    ],
)
def test_what_is_no_list_of_numbers_is_no_vector(row: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        read(reply(row))


@pytest.mark.parametrize("row", ["[1,null]", "[null, 1]", "null", "[]"])
def test_what_is_null_is_an_empty_vector_for_the_contract_check(row: str) -> None:
    assert read(reply("[1, 2]", row)).vectors == [vectors.from_numbers([1, 2]), b""]


CAPABILITIES = st.sampled_from(["", "\0", "\0000", "a[1]", "[1", "1]", '","b":[1,2],"c":"', "[", "]", "embedding", "é"])
LISTS = st.lists(st.integers(-9, 9) | st.floats(-1, 1), min_size=1, max_size=3)
VALUES = st.recursive(
    LISTS.map(json.dumps)
    | CAPABILITIES.map(lambda word: json.dumps(word, ensure_ascii=False))
    | st.sampled_from(
        ["7", "null", "true", "[]", "{}", "[true]", "[1, null]", "[ -1\n]", "[1,[2]]", "[[1],2]", "[1 2]"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(st.tuples(st.sampled_from("ab"), inner), max_size=3).map(
            lambda pairs: "{" + ", ".join(f'"{name}": {value}' for name, value in pairs) + "}"  # names may repeat
        )
    ),
    max_leaves=6,
)


def packed(value: Any) -> Any:
    """The value with every list of only numbers replaced by a vector."""
    if isinstance(value, dict):
        return {name: packed(inner) for name, inner in value.items()}
    if isinstance(value, list):
        if value and all(type(each) in (int, float) for each in value):
            return vectors.from_numbers(value)
        return [packed(inner) for inner in value]
    return value


@settings(max_examples=800, deadline=None)
@given(VALUES)
def test_numbers_are_read_as_by_way_of_python_whatever_stands_around_them(value: str) -> None:
    raw = f'{{"first":[{",".join(["0.5"] * 64)}],"rest":{value}}}'.encode()
    try:
        expected = orjson.loads(raw)
    except orjson.JSONDecodeError:
        with pytest.raises(orjson.JSONDecodeError):
            json_vectors.load(raw, 4)
    else:
        assert packed(json_vectors.load(raw, 4)) == packed(expected)


def test_an_empty_list_is_an_empty_vector() -> None:
    assert read(reply("[]")).vectors == [b""]


def test_a_nest_is_no_vector_and_no_trouble() -> None:
    for depth in (20, 500, 5000):
        with pytest.raises((TypeError, ValueError)):
            read(reply("[" * depth + "1" + "]" * depth))


ROW = f'{{"index":0,"embedding":[{",".join(["0.5"] * 64)}]}}'


@pytest.mark.parametrize(
    "part", ["[1]", "[]", "{}", '""', '{"embedding":""}', '"a":1', "[[1]]"], ids=lambda part: part.replace('"', "'")
)
@pytest.mark.parametrize("first", ["", ROW, '{"embedding":"AAAAAQ=="}'], ids=["", "numbers", "base64"])
def test_what_has_far_more_in_it_than_embeddings_is_not_read(first: str, part: str) -> None:
    parts = ",".join([part] * (2**20 // len(part)))
    inner = f"{{{parts}}}" if part.endswith("1") else parts
    raw = f'{{"data":[{first}{first and ","}{inner}]}}'.encode()
    with pytest.raises(UpstreamInvalidResponse, match="more lists"):
        json_vectors.load(raw, 1)


def test_and_what_has_as_much_as_sparse_vectors_have_is() -> None:
    entries = ",".join(f'{{"index":{i},"value":0.5,"token":"\\"[{i}"}}' for i in range(8192))
    raw = f'{{"data":[{ROW},{{"index":1,"embedding":[],"sparse_embedding":[{entries}]}}]}}'.encode()
    assert len(json_vectors.load(raw, 2, sparse=True)["data"][1]["sparse_embedding"]) == 8192


def test_quotes_in_an_input_that_the_reply_repeats_are_no_strings_of_it() -> None:
    document = json.dumps({f"key {i}": i for i in range(10_000)})
    raw = json.dumps({"data": [{"index": 0, "embedding": [0.5], "text": document}]}).encode()
    assert json_vectors.load(raw, 1)["data"][0]["text"] == document


def test_a_reply_that_repeats_long_inputs_is_vectors_from_the_start() -> None:
    rows = ",".join(f'{ROW[:-1]},"text":"{"a long input, " * 200}"}}' for _ in range(256))
    body = json_vectors.load(f'{{"data":[{rows}]}}'.encode(), 256)
    assert all(type(row["embedding"]) is bytes for row in body["data"])


@pytest.mark.parametrize("value", ["null", "true"])
def test_but_one_with_countless_other_values_is_left_to_the_parser(value: str) -> None:
    raw = f'{{"data":[{ROW}],"rest":[{",".join([value] * 2**17)}]}}'.encode()
    assert type(json_vectors.load(raw, 1)["data"][0]["embedding"]) is list


# --- base64 ------------------------------------------------------------------------------------------------

VECTORS = st.binary(min_size=4, max_size=40).map(lambda raw: base64.b64encode(raw[: len(raw) // 4 * 4]).decode())
ODD: st.SearchStrategy[Any] = st.sampled_from(
    ["", "\0", "\\u0000", "embedding", '"embedding":"AAAA"', "AAAA", "A AA", "é", 7, None, [], {}, [0.5]]
)
KEYS = st.sampled_from(["embedding", "index", "object", "data", "\0"])
ROWS = st.one_of(
    VECTORS.map(lambda text: {"object": "embedding", "index": 0, "embedding": text}),
    VECTORS.map(lambda text: {"embedding": text}),
    st.dictionaries(KEYS, VECTORS | ODD | st.dictionaries(KEYS, VECTORS | ODD, max_size=2), max_size=3),
    ODD,
)


def whole(body: Any) -> Any:
    """The document with each row's base64 decoded to a vector, or to the error that decoding raises."""
    if not isinstance(body, dict) or not isinstance(body.get("data"), list):
        return body
    rows = [row for row in body["data"] if isinstance(row, dict) and "embedding" in row]
    for row in rows:
        try:
            (row["embedding"],) = vectors.parse([row["embedding"]])
        except (TypeError, ValueError) as error:
            row["embedding"] = type(error)
    return body


@settings(max_examples=600, deadline=None)
@given(st.lists(ROWS, max_size=4), st.sampled_from([(",", ":"), (", ", ": "), (",\n", "\t: ")]), VECTORS | ODD)
def test_base64_is_read_as_by_way_of_strings_whatever_stands_around_it(
    rows: list[Any], separators: tuple[str, str], beside: Any
) -> None:
    raw = json.dumps({"data": rows, "embedding": beside}, separators=separators).encode()
    assert whole(json_vectors.load(raw, 4)) == whole(orjson.loads(raw))


@pytest.mark.parametrize("raw", [
    rb'{"data":[{"embedding":"AAAAAQ=="},{"embedding":"AAAAAg==","embedding":"AAAAAw=="}]}',
    rb'{"data":[{"embedding":"AAAAAQ==","embedding":"AAAAAg=="},{"object":"embedding"}]}',
    rb'{"data":[{"embedding":"AAAAAQ==","embedding": "AAAAAg=="},{"embedding":"AAAAAw=="}]}',
    rb'{"data":[{"embedding": "AAAAAQ==","embedding":"AAAAAg=="},{"embedding": "AAAAAw=="}]}',
    rb'{"data":[{"embedding":"AAAAAQ=="},{"embedding":"AAAAAg=="},{"embedding" :"AAAAAw=="}]}',
    rb'{"embedding":"AAAAAQ==","data":[{"embedding":"AAAAAg=="}]}',
    rb'{"data":[{"embedding":"\u0000"},{"embedding":"AAAAAg=="}]}',
    rb'{"data":[{"embedding":"AAAAAg=="},{"embedding":"\u0000"}]}',
    rb'{"data":[{"embedding":"AAAAAQ==","a":{"embedding":"AAAAAg=="}},{"embedding" :"\u0000"}]}',
    rb'{"data":[{"a\"embedding":"AAAAAQ==","embedding" :"\u0000"},{"embedding":"AAAAAg=="}]}',
    # Vectors of different lengths: there may or may not be a quote where the length of the one before would end it.
    rb'{"data":[{"embedding":"AAAAAQAAAAIAAAADAAAABAAAAAU="},{"embedding":"AAAABA==","x":"vvvvvvvvv...."}]}',
    rb'{"data":[{"embedding":"AAAAAQ=="},{"embedding":""},{"embedding":"AAAABQAAAAYAAAAH"}]}',
])  # fmt: skip
def test_rows_that_are_written_oddly_get_no_other_rows_vector(raw: bytes) -> None:
    assert whole(json_vectors.load(raw, 4)) == whole(orjson.loads(raw))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"data":[{"embedding":"AAAAAA==}]}',
        b'{"data":[{"embedding":"AAAAAA=="}]',
        b'{"data":[{"embedding":"AAAAAA=="}]}}',
        b'{"data":[{"x"embedding":"AAAAAA=="}]}',
        b'{"data":[{"embedding":"AAAAAA=="}]}"',
        b'{"data":[{"embedding":"AAAAAA=="},]}',
        b'{"data":[{"embedding":"AAAA\x00A=="}]}',
        b'{"data":[{"embedding":"AAAA\xffA=="}]}',
        b'{"data":[{"embedding":"AAAAAA=="}],"x":"\x01"}',
    ],
)
def test_base64_in_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(orjson.JSONDecodeError):
        json_vectors.load(raw, 4)


def test_a_reply_in_base64_is_vectors_from_the_start() -> None:
    body = json_vectors.load(b'{"data":[{"index":0,"embedding":"AACAPw=="},{"index":1,"embedding":"AAAAQA=="}]}', 2)
    assert [row["embedding"] for row in body["data"]] == [vectors.from_numbers([1]), vectors.from_numbers([2])]


def test_a_reply_that_there_is_no_memory_to_parse_is_not_taken_for_bad_json() -> None:
    ended = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True, check=False)
    assert ended.stdout.split() == ["MemoryError", "dict"], ended.stderr


STARVED = """
import resource
from app.upstreams import json_vectors
raw = b'{"data": "%s"}' % (b"x" * 2**23)
def tried():
    try:
        print(type(json_vectors.load(raw, 1)).__name__)
    except Exception as error:
        print(type(error).__name__)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (size + 2**24, before[1]))
tried()
resource.setrlimit(resource.RLIMIT_AS, before)
tried()
"""
