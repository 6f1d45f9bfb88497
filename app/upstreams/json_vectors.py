"""Parses an upstream's JSON reply, decoding its vectors directly.

Converting a batch's numbers to Python floats costs more than everything else done to them; simdjson parses them
straight into memory. Base64 is decoded in place: a parser would first copy it into strings all over the heap. orjson
parses any reply that is unusual in any way, and decides whether it is valid.

Vectors are cut out and replaced by marks before the rest is parsed. This is done only if the reply has no escapes:
then every quote begins or ends a string, and only a mark begins with a NUL, which cannot be written without an escape.
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
from app.errors import UpstreamInvalidResponse, lacks_memory

try:
    import simdjson
except ImportError:  # no wheel for this platform (pyproject.toml): orjson takes three times as long
    simdjson = None  # type: ignore[assignment]

MAX_DEPTH = 8
"""Maximum levels of nesting in an embeddings reply; the deepest known has five."""

PARTS_BASE, PARTS_PER_INPUT, PARTS_PER_SPARSE = 2**13, 2**6, 2**17
"""Lists, objects and strings (keys included) of a reply, at most: a base, and as many more for each input, or for each
input with a sparse vector, which has nine for each token. In a small reply they are not counted."""
_SMALL = 2**16
"""Bytes of a reply, or of what is left of one without its vectors."""

_COMMAS_PER_PART = 4
"""Commas for each part, at most, of a long reply without its vectors: a row has fewer, prose one for 50 bytes."""

_LISTS_PER_YIELD = 16
"""Lists of numbers after which a worker thread yields to the event loop's. It must do so explicitly: numpy releases the
GIL for each list, too briefly for the other thread to take it, and so often that this one is never forced to drop
it."""

_TEXT = re.compile(rb'"embedding"[ \t\r\n]*:[ \t\r\n]*"')
"""What precedes a base64 vector."""
_LIST = re.compile(rb"\[[ \t\r\n]*+[-0-9]")
"""How a list of numbers begins."""


def load(raw: bytes | bytearray, inputs: int, *, sparse: bool = False) -> Any:
    """Like `orjson.loads`, but a list of numbers may already be a vector (float32 bytes), and so may the `embedding`
    of each item of `data`. Raises `ValueError`, `MemoryError`, and `UpstreamInvalidResponse` if there is far more in it
    than the embeddings of this many inputs: a small part takes hundreds of times as long as a number."""
    parts = PARTS_BASE + (PARTS_PER_SPARSE if sparse else PARTS_PER_INPUT) * inputs
    # Only worth it for vectors, which show at once: a base64 reply has a dozen commas in all.
    text = _TEXT.search(raw, 0, 1024)
    try:
        if text is not None:
            return _load_base64(raw, text.group(), parts)
        if simdjson is not None and raw.count(b",", 0, 1024) > 32:
            return _load_numbers(raw, parts)
    except (KeyError, RuntimeError, TypeError, ValueError):  # RuntimeError: a number of more than 64 bits
        pass
    if len(raw) > _SMALL and _count_parts(raw) > parts:
        raise UpstreamInvalidResponse("the upstream's reply has more lists, objects and strings than embeddings need")
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if lacks_memory(error):
            raise MemoryError(str(error)) from None
        raise


def _count_parts(raw: bytes | bytearray) -> int:
    """Lists, objects and strings in the reply, or more. Not the quotes within a string: a repeated input may hold
    thousands. (So a string that ends with a backslash counts for half.)"""
    return raw.count(b"[") + raw.count(b"{") + (raw.count(b'"') - raw.count(b'\\"')) // 2


def _load_base64(raw: bytes | bytearray, prefix: bytes, parts: int) -> Any:
    """The document with its base64 vectors decoded. `prefix` precedes each vector's string, which ends at the next
    quote.

    Raises `KeyError`, `TypeError` or `ValueError` if `data` is not a list of rows with one vector each, all written
    alike.
    """
    find, view, skip = raw.find, memoryview(raw), len(prefix)
    texts: list[memoryview] = []
    gaps: list[bytes | bytearray] = []
    length = end = 0
    while (at := find(prefix, end)) >= 0 and len(texts) < parts:
        begin = at + skip
        gaps.append(raw[end:begin])
        # All are taken to be as long as the last one: an earlier quote would leave a text that is not base64.
        if not raw.startswith(b'"', begin + length):
            length = find(b'"', begin) - begin
            if length < 0:
                raise ValueError("no JSON")
        end = begin + length
        texts.append(view[begin:end])
    gaps.append(raw[end:])
    body = _parse_marked(b"\\u0000".join(gaps), len(texts), parts)
    # One mark in each row and as many rows as marks: so both are in the same order.
    for row, vector in zip(body["data"], vectors.from_base64(texts), strict=True):
        if row["embedding"] != "\0":
            raise ValueError("unusual")
        row["embedding"] = vector
    return body


def _load_numbers(raw: bytes | bytearray, parts: int) -> Any:
    """The document with a vector in place of each list of numbers.

    Each list is parsed by itself, in reused memory: parsing the whole would write three times its size. A list of
    numbers ends at the first closing bracket. If it was inside a string, its mark ends the string and what follows is
    no JSON. Raises `TypeError` or `ValueError` for anything but flat lists of plain numbers.
    """
    parse, search, find = simdjson.Parser().parse, _LIST.search, raw.find
    in_thread = threading.current_thread() is not threading.main_thread()
    found: list[bytes] = []
    pieces: list[bytes | bytearray] = []
    end = 0
    with np.errstate(over="ignore"):  # becomes infinite, as in `vectors.from_numbers`
        while (match := search(raw, end)) is not None and len(found) < parts:
            begin = match.start()
            pieces += (raw[end:begin], b'"\\u0000%d"' % len(found))
            end = find(b"]", begin) + 1
            if not end:
                raise ValueError("no JSON")
            numbers = cast("simdjson.Array", parse(raw[begin:end])).as_buffer(of_type="d")
            found.append(np.frombuffer(numbers, "<f8").astype("<f4").tobytes())
            if in_thread and len(found) % _LISTS_PER_YIELD == 0:
                time.sleep(0)
    pieces.append(raw[end:])
    return _fill(_parse_marked(b"".join(pieces), len(found), parts), found, MAX_DEPTH)


def _parse_marked(text: bytes, marks: int, parts: int) -> Any:
    """Parses a text that must have this number of marks and no other escapes. (A cut-out vector has none.)"""
    if text.count(b"\\") != marks:
        raise ValueError("unusual")
    # Most of a longer one may be inputs that it repeats. Commas show what are no parts: lists of null, for instance.
    if len(text) > _SMALL + 16 * parts and (text.count(b",") > _COMMAS_PER_PART * parts or _count_parts(text) > parts):
        raise ValueError("unusual")
    return orjson.loads(text)


def _fill(value: Any, found: Sequence[bytes], depth: int) -> Any:
    if not depth:
        raise ValueError("deep")
    if isinstance(value, str):
        return found[int(value[1:])] if value.startswith("\0") else value
    if isinstance(value, dict):
        return {name: _fill(inner, found, depth - 1) for name, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, found, depth - 1) for inner in value]
    return value
