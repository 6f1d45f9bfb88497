"""What cutting long texts costs other requests."""

from __future__ import annotations

import asyncio
import gc
import math
import struct
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.catalog import Model
from app.pipeline.lengths import at_most
from app.pipeline.long_inputs import LongInputs
from app.types import Embedding, EmbedRequest, EmbedResult, Input, OnLongInput, Params, Source

MODEL = Model("counted", max_tokens_per_input=8192, counted_by="cl100k_base")


async def test_threads_are_left_to_others_between_two_long_texts() -> None:
    order = []

    async def embed(request: EmbedRequest) -> EmbedResult:
        order.append("cut")
        count = len(request.inputs)
        return EmbedResult([Embedding(b"\0\0\x80?", 1)] * count, [Source.UPSTREAM] * count)

    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    texts = [f"{number} " + "今天天气很好" * 15_000 for number in range(20)]
    request = EmbedRequest("counted", texts, Params(), math.inf, on_long_input="split")
    asked = asyncio.create_task(LongInputs(embed, [MODEL], None)(request))
    await asyncio.sleep(0)
    order.append(await asyncio.to_thread(lambda: "other"))
    assert (await asked).split == len(texts)
    assert order == ["other", "cut"]


@pytest.mark.parametrize(("policy", "found"), [("split", (0.6, 0.8)), ("truncate", (3, 4))])
async def test_what_is_split_has_unit_length_also_where_but_one_piece_is_more_than_space(
    policy: OnLongInput, found: tuple[float, float]
) -> None:
    async def embed(request: EmbedRequest) -> EmbedResult:
        assert len(request.inputs) == 1
        return EmbedResult([Embedding(struct.pack("<2f", 3, 4), 1)], [Source.UPSTREAM])

    model = Model("bounded", max_characters_per_input=100)
    request = EmbedRequest("bounded", ["word" + " " * 1_000], Params(), math.inf, on_long_input=policy)
    result = await LongInputs(embed, [model], None)(request)
    assert struct.unpack("<2f", result.embeddings[0].vector) == pytest.approx(found)


BY_WORDS = Model("bge-large-zh", max_tokens_per_input=512, max_characters_per_input=2000, counted_by="han+words")
SILENT = Model("bge-large-zh-v1.5", max_tokens_per_input=512, cuts_silently=True)


@pytest.mark.parametrize("models", [[BY_WORDS, SILENT], [SILENT, BY_WORDS]], ids=["by words", "silent"])
async def test_each_piece_fits_deployments_that_count_differently_whichever_comes_first(models: list[Model]) -> None:
    """A vendor's rule counts English words; the tokenizer of another's server takes two or three tokens for each."""
    pieces: list[Input] = []

    async def embed(request: EmbedRequest) -> EmbedResult:
        pieces.extend(request.inputs)
        return EmbedResult([Embedding(b"\0\0\x80?", 1)] * len(request.inputs), [Source.UPSTREAM] * len(request.inputs))

    text = "abcdefg123 " * 170
    assert at_most(text, "han+words") < 512
    result = await LongInputs(embed, models, None)(EmbedRequest("m", [text], Params(), math.inf, on_long_input="split"))
    assert result.split == 1
    assert "".join(map(str, pieces)) == text
    assert max(len(str(piece).encode()) for piece in pieces) <= 512


class Texts(list[str]):
    """A list that takes weak references, to tell whether it has been freed."""


@pytest.mark.parametrize("policy", ["error", "truncate"])
async def test_texts_that_were_looked_at_are_gone_without_the_garbage_collector(policy: OnLongInput) -> None:
    async def embed(request: EmbedRequest) -> EmbedResult:
        return EmbedResult([Embedding(b"\0\0\x80?", 1)] * len(request.inputs), [Source.UPSTREAM] * len(request.inputs))

    model, texts = Model("bounded", max_tokens_per_input=400), Texts(["word " * 100])
    gone = weakref.ref(texts)
    gc.collect()
    gc.disable()
    try:
        await LongInputs(embed, [model], None)(EmbedRequest("bounded", texts, Params(), math.inf, on_long_input=policy))
        del texts
        assert gone() is None
    finally:
        gc.enable()
