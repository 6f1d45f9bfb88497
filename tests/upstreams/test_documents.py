import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import vectors
from app.types import Parsed
from app.upstreams import documents

FLOATS = st.floats(allow_nan=False, allow_infinity=False) | st.floats(width=32, allow_nan=False, allow_infinity=False)
NUMBERS = FLOATS | st.integers(-(2**70), 2**70)


def reply(*rows: str) -> bytes:
    """With so many numbers before that it counts as a reply of numbers."""
    listed = ",".join(f'{{"index":{i},"embedding":{row}}}' for i, row in enumerate(rows))
    return f'{{"first":[{",".join(["0.5"] * 64)}],"data":[{listed}],"usage":{{"total_tokens":7}}}}'.encode()


def read(raw: bytes) -> Parsed:
    body = documents.load(raw)
    assert body["usage"] == {"total_tokens": 7}
    return Parsed([row["index"] for row in body["data"]], [vectors.parse(row["embedding"]) for row in body["data"]])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=20), min_size=1, max_size=4))
def test_numbers_of_any_kind_become_the_same_float32_as_by_way_of_python(rows: list[list[float]]) -> None:
    printed = [repr(row) for row in rows]
    assert read(reply(*printed)).vectors == [vectors.from_numbers(orjson.loads(row)) for row in printed]


def test_a_reply_of_numbers_is_vectors_from_the_start() -> None:
    body = documents.load(reply("[1, 2.5]"))
    assert body["data"][0]["embedding"] == vectors.from_numbers([1, 2.5])


@pytest.mark.parametrize(
    "row", ["[NaN]", "[Infinity]", "[1,]", "[01]", "[0x1]", "[.5]", "[1e999]", "[1", '["\\ud800"]']
)
def test_what_is_no_json_is_refused(row: str) -> None:
    with pytest.raises(orjson.JSONDecodeError):
        documents.load(reply(row))


@pytest.mark.parametrize("row", ["[1,null]", '[1,"2"]', "[1,[2]]", "[[1],2]", "[1,{}]", "[[1,2]]", "7", "null", "{}"])
def test_what_is_no_list_of_numbers_is_no_vector(row: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        read(reply(row))


def test_an_empty_list_is_an_empty_vector() -> None:
    assert read(reply("[]")).vectors == [b""]


def test_a_nest_is_no_vector_and_no_trouble() -> None:
    for depth in (20, 500, 5000):
        with pytest.raises((TypeError, ValueError)):
            read(reply("[" * depth + "1" + "]" * depth))
