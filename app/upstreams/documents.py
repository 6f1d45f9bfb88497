"""An upstream's reply as a document, its vectors as vectors from the start.

As many numbers as a batch has cost more to make into Python floats than everything else that is done to them;
simdjson reads them into memory directly. Base64 is decoded where it stands: as strings, which a parser makes of it, it
would be written to memory once more, all over the heap. What is unusual in any way goes by orjson, which then has the
last word.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import orjson
import simdjson

from app import vectors

DEEPEST = 8
"""Levels of a reply of embeddings, at the most; the deepest known has five."""


_TEXT = re.compile(rb'"embedding"[ \t\r\n]*:[ \t\r\n]*"')
"""What stands before a vector in base64."""


def load(raw: bytes | bytearray) -> Any:
    """Like `orjson.loads`, but a list of numbers may be a vector (float32 bytes) already, and so may be the `embedding`
    of each of `data`. Raises `ValueError`."""
    # Worth it where there are vectors, which shows at once: a reply in base64 has a dozen commas all in all.
    text = _TEXT.search(raw, 0, 1024)
    try:
        if text is not None:
            return _around_base64(raw, text.group())
        if raw.count(b",", 0, 1024) > 32:
            return _document(raw)
    except (KeyError, RuntimeError, TypeError, ValueError):  # a RuntimeError for too deep a nest
        pass
    return orjson.loads(raw)


def _around_base64(raw: bytes | bytearray, before: bytes) -> Any:
    """The document with a mark in place of each vector, parsed; then with the vectors in place of the marks.

    Where no string has an escape in it, a quote begins or ends one, so that what follows a key up to the next quote is
    all of its string. And no string but a mark is a NUL, which would take an escape. Raises `KeyError`, `TypeError` or
    `ValueError` for what is not a list of rows with a vector each, written alike.
    """
    if b"\\" in raw:
        raise ValueError("unusual")
    find, view, skip = raw.find, memoryview(raw), len(before)
    found: list[bytes] = []
    between: list[bytes | bytearray] = []
    end = 0
    while (at := find(before, end)) >= 0:
        begin = at + skip
        between.append(raw[end:begin])
        end = find(b'"', begin)
        found.append(vectors.from_base64(view[begin:end]))
    between.append(raw[end:])
    body = orjson.loads(b"\\u0000".join(between))
    # One mark in each row, and as many rows as marks: then they are in the same order.
    for row, vector in zip(body["data"], found, strict=True):
        if row["embedding"] != "\0":
            raise ValueError("unusual")
        row["embedding"] = vector
    return body


def _document(raw: bytes | bytearray) -> Any:
    """Raises `TypeError` or `ValueError` for what is not plain numbers in plain lists, or no JSON."""
    lists = [0]
    document = _value(simdjson.Parser().parse(raw), lists, DEEPEST)
    # A list within a list of numbers would be read as part of it: then there are more lists than we have seen.
    if raw.count(b"[") != lists[0]:
        raise ValueError("unusual")
    return document


def _value(value: object, lists: list[int], depth: int) -> object:
    if not depth:
        raise ValueError("deep")
    if isinstance(value, simdjson.Object):
        # Not items(), which would make Python floats of all that is below.
        return {name: _value(value[name], lists, depth - 1) for name in value}
    if isinstance(value, simdjson.Array):
        lists[0] += 1
        if len(value) and isinstance(value[0], int | float):
            with np.errstate(over="ignore"):  # becomes infinite, as in `vectors.from_numbers`
                return np.frombuffer(value.as_buffer(of_type="d"), "<f8").astype("<f4").tobytes()
        return [_value(inner, lists, depth - 1) for inner in value]
    return value
