"""Micro-benchmarks of the individual operations of a request: `python -m bench.kernels`.

Best of several repeats, in microseconds per call and per vector: other work on the machine can only add to a figure.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from typing import Any

import orjson
import pybase64

from app import tokens, vectors
from app.api.schema import parse_body
from app.cache import keys, values
from app.cache.memory import MemoryStore
from app.clock import SystemClock
from app.metrics import Metrics
from app.pipeline import contract
from app.types import Batch, Embedding, Params, Parsed, WireReply
from app.upstreams import openai
from bench import pool
from bench.mock import State
from bench.traffic import Shape, traffic

_SECONDS = 0.04
"""Length of each repeat."""
_REPEATS = 7


def timed(work: Callable[[], object]) -> float:
    """Microseconds per call: the best of a few repeats."""
    work()
    began = time.perf_counter()
    work()
    count = max(1, min(100_000, int(_SECONDS / max(1e-7, time.perf_counter() - began))))
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        for _ in range(count):
            work()
        best = min(best, (time.perf_counter() - began) / count)
    return best * 1e6


def kernels(count: int) -> dict[str, Callable[[], object]]:
    """The operations on a request of `count` texts, by name."""
    raw = traffic(Shape("hot", count, "float")).request(0).split(b"\r\n\r\n", 1)[1]
    texts = list(map(str, parse_body(raw, max_inputs=2048, max_decoded=2**20).inputs))
    params = Params(dimensions=pool.DIMENSIONS)
    derived = keys.derive("openai/text-embedding-3-small", params, texts)
    plain = [pool.vectors()[i % 256].raw for i in range(count)]
    embeddings = [Embedding(vector, 12) for vector in plain]
    store = MemoryStore(256 * 2**20, 3600.0, SystemClock(), Metrics())
    store.insert(list(zip(derived, embeddings, strict=True)))
    batch = Batch("m", texts, derived, params, True, 0.0)
    replies = {form: _reply(texts, form) for form in ("base64", "short", "long")}
    lists = [orjson.loads(pool.vectors()[i % 256].short) for i in range(count)]
    stored = [values.encode(key, each) for key, each in zip(derived, embeddings, strict=True)]
    parsed = Parsed(list(range(count)), plain, 12 * count)
    return {
        "request: parse and check": lambda: parse_body(raw, max_inputs=2048, max_decoded=2**20),
        "cache keys": lambda: keys.derive("openai/text-embedding-3-small", params, texts),
        "memory: look up, all hits": lambda: store.lookup(derived),
        "memory: insert": lambda: store.insert(list(zip(derived, embeddings, strict=True))),
        "redis value: encode": lambda: [
            values.encode(key, each) for key, each in zip(derived, embeddings, strict=True)
        ],
        "redis value: decode and check": lambda: [
            values.decode(key, each) for key, each in zip(derived, stored, strict=True)
        ],
        "upstream reply, base64: decode": lambda: openai.parse_response(replies["base64"], batch),
        "upstream reply, numbers of float32: decode": lambda: openai.parse_response(replies["short"], batch),
        "upstream reply, numbers of double: decode": lambda: openai.parse_response(replies["long"], batch),
        "- of which orjson, numbers of float32": lambda: orjson.loads(replies["short"].body),
        "- of which list to float32, array": lambda: [array("f", each).tobytes() for each in lists],
        "upstream reply, contract check": lambda: contract.checked(parsed, [12] * count, pool.DIMENSIONS),
        "bill: estimate and share": lambda: tokens.apportion(12 * count, tokens.estimates(texts)),
        "response: numbers": lambda: [vectors.to_json(vector) for vector in plain],
        "response: base64": lambda: [vectors.to_base64(vector) for vector in plain],
        "- pybase64 alone": lambda: [pybase64.b64encode(vector) for vector in plain],
    }


def _reply(texts: list[str], form: str) -> WireReply:
    state = State("A" if form == "base64" else "B", "short" if form == "base64" else form)
    request: dict[str, Any] = {"model": pool.MODELS[0], "input": texts, "encoding_format": "base64"}
    return WireReply(200, {}, b"".join(state.embed(orjson.dumps(request))))


def main() -> None:
    """Prints a table: a line per operation, for 1, 16 and 128 texts."""
    counts = (1, 16, 128)
    results = [{name: timed(work) for name, work in kernels(count).items()} for count in counts]
    head = ["operation", *(f"µs, {count}" for count in counts), "µs a vector, of 128"]
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for name in results[0]:
        row = [f"{each[name]:.2f}" for each in results]
        print(f"| {name} | {' | '.join(row)} | {results[-1][name] / counts[-1]:.3f} |")


if __name__ == "__main__":
    main()
