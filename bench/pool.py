"""256 vectors shared by mock, bare application and load generator, and the rule that picks one for a text.

A vector depends on model and text, so comparing bits finds any mix-up in between.
"""

from __future__ import annotations

import base64
from functools import cache
from typing import NamedTuple
from zlib import crc32

import numpy as np
import orjson

DIMENSIONS = 1024
MODELS = ("text-embedding-3-small", "text-embedding-3-large")
"""In the gateway's catalogue, so that its facts about them (2,048 inputs per call) apply."""

_SIZE = 256
_SEEDS = {model: crc32(model.encode()) for model in MODELS}


class Vector(NamedTuple):
    """One vector, in every form in which it is sent."""

    raw: bytes
    """float32, little-endian."""
    base64: bytes
    """As JSON, in quotes."""
    short: bytes
    """As JSON numbers, each the shortest text that reads back as the same float32."""
    long: bytes
    """As JSON numbers with a double's digits, as servers that hold doubles print them."""


@cache
def vectors() -> tuple[Vector, ...]:
    """The pool: unit vectors, the same in every process."""
    numbers = np.random.default_rng(20_261_121).standard_normal((_SIZE, DIMENSIONS))
    unit = (numbers / np.linalg.norm(numbers, axis=1, keepdims=True)).astype("<f4")
    return tuple(
        Vector(
            row.tobytes(),
            b'"' + base64.b64encode(row.tobytes()) + b'"',
            orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY),
            orjson.dumps(row.astype(np.float64), option=orjson.OPT_SERIALIZE_NUMPY),
        )
        for row in unit
    )


def seed(model: str) -> int:
    """The initial checksum for this model, for `vector_index`; unknown models share one."""
    return _SEEDS.get(model, 0)


def vector_index(text: str, start: int) -> int:
    """The index of this text's vector in the pool. `start` is the model's seed."""
    return crc32(text.encode(), start) & (_SIZE - 1)
