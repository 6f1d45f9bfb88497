"""The load: ready-made request bytes with changing texts, and the vectors that a correct response holds."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import orjson
import pybase64

from bench import pool

_MARK = "############"
_WORDS = "how do the mills of the gods grind, and how small"


@dataclass(frozen=True)
class Shape:
    """One scenario's requests, as plain data that can be handed to another process.

    `kind`: fresh (no text twice), hot (always the same texts) or trace (the mixed trace, `first` its seed).
    """

    kind: str
    texts: int
    encoding: str
    path: str = "/v1/embeddings"
    headers: tuple[tuple[str, str], ...] = ()
    models: tuple[str, ...] = pool.MODELS
    """The target's names for `pool.MODELS`, in the same order."""
    first: int = 0
    """Number of the first fresh request: runs that do not overlap never repeat a text."""


class Traffic(Protocol):
    """Requests by number, and what their responses must hold."""

    def request(self, number: int) -> bytes: ...
    def expected(self, number: int) -> list[int]:
        """Indexes in the pool, one per text."""
        ...


def traffic(shape: Shape) -> Traffic:
    """The requests of this shape."""
    return Trace(shape) if shape.kind == "trace" else Repeated(shape)


def _message(shape: Shape, body: bytes) -> bytes:
    lines = [f"POST {shape.path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"]
    lines += [f"{name}: {value}" for name, value in shape.headers]
    lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _body(shape: Shape, model: int, texts: list[str]) -> bytes:
    inputs = texts[0] if len(texts) == 1 else texts
    return orjson.dumps({"input": inputs, "model": shape.models[model], "encoding_format": shape.encoding})


class Repeated:
    """One template; fresh texts carry the request's number, hot ones do not."""

    def __init__(self, shape: Shape) -> None:
        self._fresh = shape.kind == "fresh"
        self._first = shape.first
        self._texts = [f"{_MARK}-{i:03d} {_WORDS}" for i in range(shape.texts)]
        template = _message(shape, _body(shape, 0, self._texts))
        self._template = template if self._fresh else template.replace(_MARK.encode(), b"%012d" % 0)

    def request(self, number: int) -> bytes:
        if not self._fresh:
            return self._template
        return self._template.replace(_MARK.encode(), b"%012d" % (self._first + number))

    def expected(self, number: int) -> list[int]:
        tag = f"{self._first + number:012d}" if self._fresh else "0" * 12
        start = pool.seed(pool.MODELS[0])
        return [pool.vector_index(text.replace(_MARK, tag), start) for text in self._texts]


class Trace:
    """The mixed trace: texts by Zipf's law, 70 % queries of one text, 30 % bulk of 64, two models at random."""

    LENGTH = 2000
    UNIVERSE = 10_000

    def __init__(self, shape: Shape) -> None:
        rng = random.Random(shape.first)
        weights = list(accumulate(1 / rank for rank in range(1, self.UNIVERSE + 1)))
        self._requests: list[tuple[int, list[str]]] = []
        for _ in range(self.LENGTH):
            count = 1 if rng.random() < 0.7 else 64
            chosen = rng.choices(range(self.UNIVERSE), cum_weights=weights, k=count)
            model = rng.randrange(len(pool.MODELS))
            self._requests.append((model, [f"{shape.first:04d}-{each:06d} {_WORDS}" for each in chosen]))
        self._messages = [_message(shape, _body(shape, model, texts)) for model, texts in self._requests]

    def request(self, number: int) -> bytes:
        return self._messages[number]

    def expected(self, number: int) -> list[int]:
        model, texts = self._requests[number]
        start = pool.seed(pool.MODELS[model])
        return [pool.vector_index(text, start) for text in texts]


def wrong_vectors(body: bytes, expected: list[int]) -> int:
    """The number of vectors in a response that are not bit-equal to the expected ones; all if it is not valid."""
    try:
        rows = sorted(orjson.loads(body)["data"], key=lambda row: row["index"])
        got = [_bits(row["embedding"]) for row in rows]
    except (KeyError, TypeError, ValueError):
        return len(expected)
    if len(got) != len(expected):
        return len(expected)
    known = pool.vectors()
    return sum(bits != known[index].raw for bits, index in zip(got, expected, strict=True))


def _bits(embedding: Any) -> bytes:
    return pybase64.b64decode(embedding) if isinstance(embedding, str) else array("f", embedding).tobytes()
