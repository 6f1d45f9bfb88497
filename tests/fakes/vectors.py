"""Deterministic vectors for the fake upstreams, and the ways vendors print them.

A vector depends on everything that may alter it (model, text, length, role), so any mix-up
in the code under test shows as a difference. Tests recompute it and compare bit for bit.
"""

import base64
import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

Vector = NDArray[np.float32]
Text = str | list[int]
"""One input: a text, or the ids of its tokens (which give a different vector)."""

T = TypeVar("T")


def vector(model: str, text: str | Sequence[int], dimensions: int, **options: object) -> Vector:
    """Return the float32 vector of unit length, shape ``(dimensions,)``.

    `options` are the other parameters that alter the vector (``text_type="query"``,
    ``task_type=...``). A value of None, like an absent one, stands for the upstream's default.
    """
    content = text if isinstance(text, str) else list(text)
    chosen = sorted((name, str(value)) for name, value in options.items() if value is not None)
    seed = hashlib.sha256(json.dumps([model, content, dimensions, chosen]).encode()).digest()
    drawn = np.random.default_rng(int.from_bytes(seed)).standard_normal(dimensions)
    return unit(drawn)


def unit(values: NDArray[Any]) -> Vector:
    """Scale to unit length, by a norm that does not depend on how the machine sums."""
    wide: NDArray[np.float64] = values.astype(np.float64)
    scaled: Vector = (wide / math.sqrt(math.fsum((wide * wide).tolist()))).astype(np.float32)
    return scaled


def cut(native: Vector, dimensions: int) -> Vector:
    """Keep the first `dimensions` values and scale them to unit length again."""
    return unit(native[:dimensions])


def sparse_vector(model: str, text: str) -> list[dict[str, Any]]:
    """Return DashScope's form of a sparse vector: one ``{index, value, token}`` per word."""
    found = []
    for token in dict.fromkeys(text.split()):
        draw = random.Random(f"{model}\0{text}\0{token}")
        found.append({"index": draw.randrange(250_000), "value": round(draw.random(), 4), "token": token})
    return found


def count_tokens(text: str | Sequence[int]) -> int:
    """Count tokens by the fakes' own rule: the ids, or a quarter of the UTF-8 bytes, at least 1."""
    if not isinstance(text, str):
        return max(1, len(text))
    return max(1, math.ceil(len(text.encode()) / 4))


@dataclass
class Row:
    """One vector of an answer, before it is printed; payload faults change it.

    `value` is an array, or whatever a fault puts in its place. `nonfinite` says how NaN and
    infinity are written in JSON: as the bare words or as null.
    """

    index: int
    text: Text
    value: Any
    nonfinite: str = "literal"


def numbers(row: Row, dtype: type[np.floating[Any]] = np.float64) -> Any:
    """Return what to print for a row as a JSON array of numbers.

    float64 prints the exact value of the float32 (what the clouds do), float32 the shortest
    decimal that reads back as it (what Go's encoder does); both survive the round trip.
    """
    value = row.value
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == np.float32:
        value = value.astype(dtype)
    if np.isfinite(value).all():
        return np.ascontiguousarray(value)
    words = (json.dumps(float(number)) for number in value)  # NaN, Infinity, -Infinity
    if row.nonfinite == "null":
        words = (word if word[-1].isdigit() else "null" for word in words)
    return orjson.Fragment("[" + ",".join(words) + "]")


def base64_floats(row: Row) -> Any:
    """Return what to print for a row as base64 of little-endian float32."""
    if not isinstance(row.value, np.ndarray):
        return row.value
    with np.errstate(over="ignore"):  # a fault may put a value there that float32 cannot hold
        return base64.b64encode(row.value.astype("<f4").tobytes()).decode()


def shuffled(items: Sequence[T], seed: object) -> list[T]:
    """Return the items in another order (if there are at least two), the same in every run."""
    mixed = list(items)
    random.Random(str(seed)).shuffle(mixed)
    return mixed[::-1] if mixed == list(items) else mixed


def texts_in(value: object) -> list[Text]:
    """Read an OpenAI-like `input`: a text, token ids, or a list of either; [] if it is neither."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Sequence):
        return []
    if value and all(isinstance(item, int) for item in value):
        return [list(value)]
    return [item for item in value if isinstance(item, str | list)]
