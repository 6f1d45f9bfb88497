"""An upstream's reply as a document, its lists of numbers as vectors from the start.

As many numbers as a batch has cost more to make into Python floats than everything else that is done to them;
simdjson reads them into memory directly. What is unusual in any way goes by orjson, which then has the last word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import simdjson

DEEPEST = 8
"""Levels of a reply of embeddings, at the most; the deepest known has five."""


def load(raw: bytes) -> Any:
    """Like `orjson.loads`, but a list of numbers may be a vector (float32 bytes) already. Raises `ValueError`."""
    # Worth it where there are numbers, which shows at once: a reply in base64 has a dozen commas all in all.
    if raw.count(b",", 0, 1024) > 32:
        try:
            return _document(raw)
        except (RuntimeError, TypeError, ValueError):  # the first for too deep a nest
            pass
    return orjson.loads(raw)


def _document(raw: bytes) -> Any:
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
