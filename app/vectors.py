"""The canonical vector, float32 little-endian bytes, and every operation on it.

Knows nothing of HTTP, upstreams or caches. Functions raise `ValueError` on bytes or numbers that are not a vector; what
that means to the caller is for the calling stage to decide.
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

_ONE, _ZERO = b"\x00\x00\x80\x3f", bytes(4)
"""As float32."""


def from_numbers(numbers: Sequence[float]) -> bytes:
    """Packs a list of numbers, as a JSON parser returns it, into float32 bytes.

    Raises `TypeError` if an element is not a number and `ValueError` if it is not a list. A number beyond float32's
    range becomes infinite here and is reported by `fault`.
    """
    if not isinstance(numbers, list):
        raise ValueError("not a list of numbers")
    packed = array("f", numbers)
    if sys.byteorder == "big":  # pragma: no cover
        packed.byteswap()
    vector = packed.tobytes()
    # true and false are ints to Python. Looking at every type takes longer than packing, and few vectors hold a 1 or 0.
    if (_ONE in vector or _ZERO in vector) and bool in map(type, numbers):
        raise TypeError("not a number")
    return vector


def from_base64(texts: Iterable[str | memoryview]) -> list[bytes]:
    """Decodes vectors in OpenAI's base64 form, float32 little-endian. Raises `ValueError`."""
    decode = pybase64.b64decode
    decoded = [decode(text, None, True) for text in texts]  # validate=True; keywords take half as long again
    for raw in decoded:
        if len(raw) % 4:
            raise ValueError("not a whole number of float32")
    return decoded


def parse(values: Sequence[object]) -> list[bytes]:
    """Vectors in either form that upstreams answer in, base64 or a list of numbers, as bytes; bytes pass unchanged. One
    that is null, or holds null, as NaN is often written, becomes empty. Raises `TypeError` or `ValueError`."""
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
    return from_numbers(value)  # type: ignore[arg-type]  # from_numbers refuses anything but a list


to_base64: Callable[[bytes], bytes] = pybase64.b64encode
"""A vector as ASCII base64, the form that OpenAI's SDKs request by default."""


def to_json(vector: bytes) -> bytes:
    """The vector as a JSON array, each number the shortest text that parses to the same float32."""
    if not vector:
        return b"[]"
    return orjson.dumps(np.frombuffer(vector, "<f4"), option=orjson.OPT_SERIALIZE_NUMPY)


def fault(vector: bytes) -> str | None:
    """Why this cannot be an embedding ("is empty or null", "is all zero", "holds NaN or infinity"), or None."""
    if not vector:
        return "is empty or null"
    numbers = np.frombuffer(vector, "<f4")
    # One dot product settles nearly every vector: any NaN or infinity propagates to it, and only zeros give zero. It
    # also overflows for huge and underflows for tiny numbers, which the exact tests then clear. `vdot`, because the
    # other products warn on overflow, and suppressing that costs more than the product.
    if 0.0 < np.vdot(numbers, numbers) < np.inf:
        return None
    if not np.isfinite(numbers).all():
        return "holds NaN or infinity"
    if not numbers.any():
        return "is all zero"
    return None


_CHUNK = 32
"""Vectors checked in one step: they are copied side by side, and this many fit in the processor's cache."""


def faultless(rows: Sequence[bytes]) -> bool:
    """Whether a quick check of vectors of one length shows that none has a `fault`. If not, they may all still be
    good."""
    squares = np.empty(len(rows), "<f4")
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            numbers = np.frombuffer(b"".join(chunk), "<f4").reshape(len(chunk), -1 if chunk[0] else 0)
            np.vecdot(numbers, numbers, out=squares[start : start + len(chunk)])
    return bool(squares.min() > 0 and squares.max() < np.inf)  # a NaN is both the minimum and the maximum


def sparse(entries: object) -> bytes:
    """A list of `{"index", "value", "token"}` as JSON bytes, in the order given: the form in which the only vendor with
    sparse vectors answers. Raises `KeyError`, `TypeError` or `ValueError` for anything else, including a repeated
    index."""
    if not isinstance(entries, list):
        raise TypeError("no list")
    rows = [{"index": row["index"], "value": row["value"], "token": row.get("token", "")} for row in entries]
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
    """The cosine similarity of two vectors; 0 if their lengths differ."""
    if len(one) != len(other):
        return 0.0
    a, b = (np.frombuffer(vector, "<f4").astype(np.float64) for vector in (one, other))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def shorten(vector: bytes, dimensions: int) -> bytes:
    """The vector's first numbers, at unit length; one of exactly that length is returned unchanged. Raises `ValueError`
    if there are too few, or all are zero."""
    if len(vector) < 4 * dimensions:
        raise ValueError(f"has {len(vector) // 4} dimensions, not {dimensions} or more")
    if len(vector) == 4 * dimensions:
        return vector
    return normalise(vector[: 4 * dimensions])


def mean(parts: Sequence[bytes], weights: Sequence[int]) -> bytes:
    """The weighted mean of several vectors, at unit length. Raises `ValueError` if it is zero."""
    total = np.zeros(len(parts[0]) // 4)
    for vector, weight in zip(parts, weights, strict=True):  # one after another: the same sum on every machine
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
