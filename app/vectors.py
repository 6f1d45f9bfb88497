"""The canonical vector, float32 little-endian bytes, and everything that is done to one.

Knows nothing of HTTP, upstreams or caches. Functions raise `ValueError` on bytes or numbers that are
no vector; what that means to a caller is for the stage that asked.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import orjson
import pybase64
from numpy.typing import NDArray


def from_numbers(numbers: Sequence[float]) -> bytes:
    """A list of numbers, as a JSON parser gives it, to float32 bytes.

    Raises `TypeError` for anything in it that is no number and `ValueError` for no list. A number beyond
    float32's range becomes infinite here and is refused by `check`.
    """
    if not isinstance(numbers, list):
        raise ValueError("not a list of numbers")
    packed = array("f", numbers)
    if sys.byteorder == "big":  # pragma: no cover
        packed.byteswap()
    return packed.tobytes()


def from_base64(texts: Iterable[str | memoryview]) -> list[bytes]:
    """Vectors in OpenAI's base64 form, float32 little-endian, to bytes. Raises `ValueError`."""
    decode = pybase64.b64decode
    found = [decode(text, None, True) for text in texts]  # validated; by position, for names take half as long again
    for raw in found:
        if len(raw) % 4:
            raise ValueError("not a whole number of float32")
    return found


def parse(values: Sequence[object]) -> list[bytes]:
    """Vectors in either form an upstream may answer in, or vectors already; an empty one for each that holds null,
    which is how NaN is often written, or is null itself. Raises `TypeError` or `ValueError`."""
    for value in values:
        if type(value) is not bytes:
            return [_parse(each) for each in values]
    return values  # type: ignore[return-value]


def _parse(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if value is None or (isinstance(value, list) and None in value):
        return b""
    if isinstance(value, str):
        return from_base64([value])[0]
    return from_numbers(value)  # type: ignore[arg-type]  # from_numbers refuses what is no list


to_base64: Callable[[bytes], bytes] = pybase64.b64encode
"""ASCII base64 of a vector: what OpenAI's SDKs ask for by default."""


def to_json(vector: bytes) -> bytes:
    """The vector as a JSON array, each number the shortest text that reads back as the same float32."""
    if not vector:
        return b"[]"
    return orjson.dumps(np.frombuffer(vector, "<f4"), option=orjson.OPT_SERIALIZE_NUMPY)


def fault(vector: bytes) -> str | None:
    """Why this cannot be an embedding ("is empty or null", "is all zero", "holds NaN or infinity"), or None."""
    if not vector:
        return "is empty or null"
    numbers = np.frombuffer(vector, "<f4")
    # One dot product settles nearly every vector: any NaN or infinity makes it so, and only zeros make
    # zero. It also overflows for huge and underflows for tiny numbers, which the exact tests then clear.
    # `vdot`, for the others warn of an overflow, and not to be warned costs more than the product.
    if 0.0 < np.vdot(numbers, numbers) < np.inf:
        return None
    if not np.isfinite(numbers).all():
        return "holds NaN or infinity"
    if not numbers.any():
        return "is all zero"
    return None


_TOGETHER = 32
"""Vectors looked at in one go: copied side by side, so many stay in the processor's cache."""


def faultless(rows: Sequence[bytes]) -> bool:
    """Whether one look at vectors of one length finds no `fault` in any. If not, each may still be without one."""
    squares = np.empty(len(rows), "<f4")
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(rows), _TOGETHER):
            some = rows[start : start + _TOGETHER]
            numbers = np.frombuffer(b"".join(some), "<f4").reshape(len(some), -1 if some[0] else 0)
            np.vecdot(numbers, numbers, out=squares[start : start + len(some)])
    return bool(squares.min() > 0 and squares.max() < np.inf)  # NaN is the least as well as the greatest


def sparse(given: object) -> bytes:
    """A list of `{"index", "value", "token"}` as JSON bytes, in the order given: the form in which the one vendor that
    has them answers. Raises `KeyError`, `TypeError` or `ValueError` for anything else, a place named twice included."""
    if not isinstance(given, list):
        raise TypeError("no list")
    rows = [{"index": row["index"], "value": row["value"], "token": row.get("token", "")} for row in given]
    for row in rows:
        index, value, token = row.values()
        if type(index) is not int or index < 0 or type(value) not in (int, float) or type(token) is not str:
            raise TypeError("no place and value")
        if not math.isfinite(value):
            raise ValueError("not finite")
    if len({row["index"] for row in rows}) < len(rows):
        raise ValueError("a place twice")
    return orjson.dumps(rows)


def dimensions(vector: bytes) -> int:
    """How many numbers the vector has."""
    return len(vector) // 4


def cosine(one: bytes, other: bytes) -> float:
    """The cosine of the angle between two vectors; 0 where their lengths differ, which leaves no angle."""
    if len(one) != len(other):
        return 0.0
    a, b = (np.frombuffer(vector, "<f4").astype(np.float64) for vector in (one, other))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def shorten(vector: bytes, dimensions: int) -> bytes:
    """The vector's first numbers, at unit length; one that has no more stays as it is. Raises `ValueError` where
    they are too few, or all zero."""
    if len(vector) < 4 * dimensions:
        raise ValueError(f"has {len(vector) // 4} dimensions, not {dimensions} or more")
    if len(vector) == 4 * dimensions:
        return vector
    return normalise(vector[: 4 * dimensions])


def mean(parts: Sequence[bytes], weights: Sequence[int]) -> bytes:
    """The direction of several vectors' weighted mean, at unit length. Raises `ValueError` where there is none."""
    total = np.zeros(len(parts[0]) // 4)
    for vector, weight in zip(parts, weights, strict=True):  # one after the other: the same sum on every machine
        total += weight * np.frombuffer(vector, "<f4").astype(np.float64)
    return _unit(total)


def normalise(vector: bytes) -> bytes:
    """The vector at unit length. Raises `ValueError` for a zero vector."""
    return _unit(np.frombuffer(vector, "<f4").astype(np.float64))


def _unit(numbers: NDArray[np.float64]) -> bytes:
    length = float(np.linalg.norm(numbers))
    if not length:
        raise ValueError("a zero vector has no direction")
    return (numbers / length).astype("<f4").tobytes()
