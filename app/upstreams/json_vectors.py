"""An upstream's reply as a document, its vectors as vectors from the start.

To make Python floats of a batch's numbers costs more than everything else that is done to them; simdjson reads them
into memory directly. Base64 is decoded where it stands: a parser would first make strings of it, another copy all over
the heap. A reply that is unusual in any way is parsed by orjson, which has the last word.

Vectors are cut out before the rest is parsed, and marks put in their place. This is done only where a reply has no
escapes: then every quote begins or ends a string, and only a mark begins with a NUL, which takes an escape.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import orjson

from app import vectors

try:
    import simdjson
except ImportError:  # where it has no wheel (pyproject.toml): orjson does the same, in three times the time
    simdjson = None  # type: ignore[assignment]

DEEPEST = 8
"""Levels of nesting in a reply of embeddings, at most; the deepest known has five."""

_TURN = 16
"""Lists of numbers after which a thread gives the event loop's thread a turn. It must do so itself: numpy lets go of
the interpreter for each list, too briefly for the other thread to take it, and so often that this one is never made
to."""

_TEXT = re.compile(rb'"embedding"[ \t\r\n]*:[ \t\r\n]*"')
"""What stands before a vector in base64."""
_LIST = re.compile(rb"\[[ \t\r\n]*[-0-9]")
"""What a list of numbers begins with."""


def load(raw: bytes | bytearray) -> Any:
    """Like `orjson.loads`, but a list of numbers may be a vector (float32 bytes) already, and so may be the `embedding`
    of each of `data`. Raises `ValueError`."""
    # Worth it where there are vectors, which shows at once: a reply in base64 has a dozen commas all in all.
    text = _TEXT.search(raw, 0, 1024)
    try:
        if text is not None:
            return _around_base64(raw, text.group())
        if simdjson is not None and raw.count(b",", 0, 1024) > 32:
            return _around_numbers(raw)
    except (KeyError, RuntimeError, TypeError, ValueError):  # a RuntimeError for a number of more than 64 bits
        pass
    return orjson.loads(raw)


def _around_base64(raw: bytes | bytearray, before: bytes) -> Any:
    """The document with its rows' vectors in place. `before` is what stands before each: what follows, up to the next
    quote, is all of its string.

    Raises `KeyError`, `TypeError` or `ValueError` for what is not a list of rows with a vector each, written alike.
    """
    find, view, skip = raw.find, memoryview(raw), len(before)
    texts: list[memoryview] = []
    between: list[bytes | bytearray] = []
    length = end = 0
    while (at := find(before, end)) >= 0:
        begin = at + skip
        between.append(raw[end:begin])
        # Where the last one ended, this one will: were there a quote before, what is in between would be no base64.
        if not raw.startswith(b'"', begin + length):
            length = find(b'"', begin) - begin
            if length < 0:
                raise ValueError("no JSON")
        end = begin + length
        texts.append(view[begin:end])
    between.append(raw[end:])
    body = _without_escapes(b"\\u0000".join(between), len(texts))
    # One mark in each row, and as many rows as marks: then they are in the same order.
    for row, vector in zip(body["data"], vectors.from_base64(texts), strict=True):
        if row["embedding"] != "\0":
            raise ValueError("unusual")
        row["embedding"] = vector
    return body


def _around_numbers(raw: bytes | bytearray) -> Any:
    """The document with a vector in place of each list of numbers.

    Each list is parsed alone, in memory that is at hand: a parse of the whole writes three times its size. A list ends
    with the first bracket that closes one, or else it is none of numbers. A mark within a string would end it, and what
    follows would be no JSON. Raises `TypeError` or `ValueError` for what is not plain numbers in plain lists.
    """
    parse, search, find = simdjson.Parser().parse, _LIST.search, raw.find
    aside = threading.current_thread() is not threading.main_thread()
    found: list[bytes] = []
    pieces: list[bytes | bytearray] = []
    end = 0
    with np.errstate(over="ignore"):  # becomes infinite, as in `vectors.from_numbers`
        while (begins := search(raw, end)) is not None:
            begin = begins.start()
            pieces += (raw[end:begin], b'"\\u0000%d"' % len(found))
            end = find(b"]", begin) + 1
            if not end:
                raise ValueError("no JSON")
            numbers = cast("simdjson.Array", parse(raw[begin:end])).as_buffer(of_type="d")
            found.append(np.frombuffer(numbers, "<f8").astype("<f4").tobytes())
            if aside and len(found) % _TURN == 0:
                time.sleep(0)
    pieces.append(raw[end:])
    return _filled(_without_escapes(b"".join(pieces), len(found)), found, DEEPEST)


def _without_escapes(text: bytes, marks: int) -> Any:
    """The document, if it has this number of marks and no other escape; what was cut out has none, or was no vector."""
    if text.count(b"\\") != marks:
        raise ValueError("unusual")
    return orjson.loads(text)


def _filled(value: Any, found: Sequence[bytes], depth: int) -> Any:
    if not depth:
        raise ValueError("deep")
    if isinstance(value, str):
        return found[int(value[1:])] if value.startswith("\0") else value
    if isinstance(value, dict):
        return {name: _filled(inner, found, depth - 1) for name, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, found, depth - 1) for inner in value]
    return value
