"""What is cached, what is answered from the cache, and that no answer has vectors of two lengths."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace

from app import vectors
from app.cache import keys
from app.cache.memory import MemoryStore
from app.cache.tiers import Tiers
from app.clock import SystemClock
from app.errors import UpstreamInvalidResponse, UpstreamInvalidVector
from app.metrics import Metrics
from app.pipeline.cache_fill import CacheFill
from app.pipeline.cache_read import CacheRead
from app.types import Batch, BatchResult, Embedding, EmbedRequest, EmbedResult, OutputType, Params, Source


def vector(length: int) -> bytes:
    return vectors.from_numbers([1.0] * length)


def tiers() -> Tiers:
    metrics = Metrics()
    return Tiers([MemoryStore(2**20, 60, SystemClock(), metrics)], metrics, SystemClock())


def request(*texts: str, params: Params | None = None) -> EmbedRequest:
    return EmbedRequest("m", texts, params or Params(), asyncio.get_running_loop().time() + 30)


@dataclass
class Below:
    """The stages below, which cache what they embed: a vector as long as `length` says for this text."""

    cache: Tiers
    length: Callable[[str], int]
    asked: list[list[str]] = field(default_factory=list)

    async def __call__(self, request: EmbedRequest) -> EmbedResult:
        texts = list(map(str, request.inputs))
        self.asked.append(texts)
        embeddings = [Embedding(vector(self.length(text)), 1) for text in texts]
        if request.write_cache:
            self.cache.put(list(zip(request.keys, embeddings, strict=True)))
        return EmbedResult(embeddings, [Source.UPSTREAM] * len(texts), 1, ("up/m",))


async def test_where_the_cache_has_another_length_than_the_upstream_gives_now_all_is_embedded_again() -> None:
    cache = tiers()
    below = Below(cache, lambda _: 2)
    embed = CacheRead(below, cache, "space")
    await embed(request("a", "b"))
    below.length = lambda _: 3
    result = await embed(request("a", "c", "b"))
    assert below.asked == [["a", "b"], ["c"], ["a", "c", "b"]]
    assert [len(each.vector) // 4 for each in result.embeddings] == [3, 3, 3]
    assert (result.calls, result.sources) == (2, [Source.UPSTREAM] * 3)
    again = await embed(request("a", "b", "c"))
    assert [len(each.vector) // 4 for each in again.embeddings] == [3, 3, 3]
    assert (again.calls, again.sources) == (0, [Source.CACHE] * 3)


async def test_where_lengths_differ_then_as_well_there_is_no_answer() -> None:
    cache = tiers()
    below = Below(cache, len)
    embed = CacheRead(below, cache, "space")
    await embed(request("a"))
    with pytest.raises(UpstreamInvalidResponse, match="different lengths for one model") as refused:
        await embed(request("a", "bb"))
    assert below.asked == [["a"], ["bb"], ["a", "bb"]]
    assert (refused.value.calls, refused.value.no_client_retry) == (2, True)


@pytest.mark.parametrize(
    ("dimensions", "native", "output_type", "left", "asked"),
    [
        (None, 2, "dense", (3, 2), ["a"]),
        (None, 2, "dense", (3, 3), ["a", "b"]),
        (None, 2, "dense", (2, 2), []),
        (None, 2, "dense", (None, 2), ["a"]),
        (None, 2, "dense", (None, 3), ["a", "b"]),
        (2, 4, "dense", (4, 2), ["a"]),
        (2, None, "dense", (3, 3), ["a", "b"]),
        (2, None, "dense", (2, 2), []),
        (None, None, "dense", (3, 3), []),  # who knows
        (None, 2, "sparse", (0, 2), ["b"]),
    ],
)
async def test_what_is_cached_with_another_length_than_it_should_have_is_embedded(
    dimensions: int | None, native: int | None, output_type: OutputType, left: tuple[int | None, int], asked: list[str]
) -> None:
    cache, params = tiers(), Params(dimensions=dimensions, output_type=output_type)
    right = 0 if output_type == "sparse" else 2
    below = Below(cache, lambda _: right)
    sparse = b"[]" if output_type == "sparse" else None
    for key, length in zip(keys.derive("space", params, ["a", "b"]), left, strict=True):
        if length is not None:
            cache.put([(key, Embedding(vector(length), 1, sparse))])
    result = await CacheRead(below, cache, "space", native)(request("a", "b", params=params))
    assert below.asked == ([asked] if asked else [])
    assert [source is Source.CACHE for source in result.sources] == [text not in asked for text in "ab"]
    assert len({len(each.vector) for each in result.embeddings}) == 1


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("read", [True, False])
async def test_who_reads_no_cache_is_answered_from_none(read: bool, written: bool) -> None:
    cache = tiers()
    below = Below(cache, lambda _: 2)
    embed = CacheRead(below, cache, "space")
    await embed(request("a"))
    result = await embed(replace(request("a", "b"), read_cache=read, write_cache=written))
    assert below.asked == [["a"], ["b"] if read else ["a", "b"]]
    assert result.sources == [Source.CACHE if read else Source.UPSTREAM, Source.UPSTREAM]
    await embed(request("b"))
    assert below.asked[2:] == ([] if written else [["b"]])


@pytest.mark.parametrize("store", [True, False])
async def test_of_a_call_that_brought_some_vectors_these_are_cached_if_they_may_be(store: bool) -> None:
    cache, error, good = tiers(), UpstreamInvalidVector("NaN"), Embedding(vector(2), 1)

    async def embed(batch: Batch) -> BatchResult:
        return BatchResult([error, good])

    batch = Batch("m", ["a", "b"], [b"a" * 32, b"b" * 32], Params(), store, deadline=0)
    assert (await CacheFill(embed, cache)(batch)).outcomes == [error, good]
    assert await cache.get(batch.keys) == [None, good if store else None]
