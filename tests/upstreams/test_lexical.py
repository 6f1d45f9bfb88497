"""The built-in upstream: the same bytes everywhere, and similar vectors for similar spelling."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import httpx
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import vectors
from app.pipeline import contract
from app.types import Batch, Embedding, Params, Target
from app.upstreams import lexical
from app.upstreams.client import Client

ROOT = Path(__file__).parents[2]

ALIKE = [
    (
        "How do I reset my password?",
        "I forgot my password, how can I reset it?",
        "The weather in Paris is sunny.",
    ),
    ("The cat sat on the mat", "A cat is sitting on a mat", "Stock markets fell sharply on Monday"),
    ("install Python packages with pip", "how to install a Python package", "a recipe for chocolate cake"),
    ("我喜欢吃苹果", "我爱吃苹果和香蕉", "今天股市大幅下跌"),
    ("如何重置我的密码", "忘记密码了怎么重置", "北京明天的天气怎么样"),
    ("机器学习模型的训练方法", "怎样训练一个机器学习模型", "他昨天去了超市买菜"),
    ("向量数据库支持相似度检索", "在向量数据库里做相似度搜索", "我的狗今天很开心"),
]


def vector_of(text: str, dimensions: int) -> bytes:
    (vector,) = lexical.embed([text], dimensions)
    return vector


def similarity(one: str, other: str, dimensions: int = 512) -> float:
    a, b = (np.frombuffer(vector_of(text, dimensions), "<f4") for text in (one, other))
    return float(a @ b)


@pytest.mark.parametrize("dimensions", [256, 512, 1536])
@pytest.mark.parametrize(("text", "paraphrase", "unrelated"), ALIKE)
def test_a_paraphrase_is_nearer_than_an_unrelated_text(
    text: str, paraphrase: str, unrelated: str, dimensions: int
) -> None:
    near, far = similarity(text, paraphrase, dimensions), similarity(text, unrelated, dimensions)
    assert near > far + 0.15


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, World!", "hello world"),
        ("ｈｅｌｌｏ　ｗｏｒｌｄ", "hello world"),
        ("STRASSE", "straße"),
        ("你好,世界", "你好，世界！"),
    ],
)
def test_case_width_and_punctuation_make_no_difference(one: str, other: str) -> None:
    assert vector_of(one, 512) == vector_of(other, 512)


@given(st.text(min_size=1, max_size=60))
@settings(deadline=None)
def test_every_text_has_a_vector_of_unit_length(text: str) -> None:
    vector = np.frombuffer(vector_of(text, 64), "<f4")
    assert len(vector) == 64
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("text", [" ", "\n", "!!!", "🎉", "_", "的", "a", "\x00", "\ud800", "…", "-1"])
def test_texts_without_a_word_have_a_vector_and_it_is_their_own(text: str) -> None:
    assert vectors.fault(vector_of(text, 512)) is None
    assert vector_of(text, 512) != vector_of("?", 512)


@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=6))
@settings(deadline=None)
def test_what_stands_beside_a_text_does_not_alter_its_vector(texts: list[str]) -> None:
    assert lexical.embed(texts, 128) == [vector_of(text, 128) for text in texts]


def test_the_letters_of_a_call_are_hashed_a_hundred_thousand_at_a_time() -> None:
    texts = [f"{i} " + "word " * 6000 for i in range(40)]
    alone = [vector_of(text, 128) for text in texts]
    tracemalloc.start()
    together = lexical.embed(texts, 128)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert together == alone
    assert most < 250 * 130_000, "all at once would take 180 MB"


def test_another_process_with_another_hash_seed_gives_the_same_bytes() -> None:
    code = (
        "import sys; from app.upstreams.lexical import embed;sys.stdout.write(embed(['Hello 世界 🎉'], 256)[0].hex())"
    )
    for seed in ("1", "2"):
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ, cwd=ROOT
        )
        assert run.stdout == vector_of("Hello 世界 🎉", 256).hex()


def test_the_bytes_are_those_of_revision_one() -> None:
    """A change here needs a new revision in the catalogue: stored vectors would no longer be comparable."""
    found = lexical.embed(["Hello 世界", "The quick brown fox", "🎉!"], 512)
    assert hashlib.sha256(b"".join(found)).hexdigest() == (
        "c59b67a3c7598121d80c90a65af1cc04e480974165c298004a37ff128fcd3216"
    )
    assert MODEL.revision == "1"


def test_tokens_are_words_and_chinese_characters() -> None:
    assert lexical.count_tokens("Hello, world! 你好") == 4
    assert lexical.count_tokens("one") == 1


# --- as an upstream ---------------------------------------------------------------------------------

SETTINGS = lexical.LexicalSettings()
MODEL = lexical.KIND.models(SETTINGS)["lexical"]
TARGET = Target(SETTINGS.base_url, MODEL)


@pytest.mark.parametrize("copies", [1, 5000], ids=["on the loop", "in a thread"])
async def test_it_is_asked_through_the_client_and_dialect_of_any_upstream(copies: int) -> None:
    adapter, client = lexical.adapter(SETTINGS), Client(lexical.LexicalTransport(), timeout=30)
    texts = ["Hello world", "你好 " * copies]
    batch = Batch("lexical", texts, [b"", b""], Params(dimensions=256), True, 0.0)
    reply = await client.send(adapter.build_request(batch, TARGET))
    assert adapter.parse_error(reply) is None
    parsed = adapter.parse_response(reply, batch)
    assert contract.checked(parsed, [1, 1], 256) == [Embedding(vector, 1) for vector in lexical.embed(texts, 256)]
    assert parsed.tokens == 2 + 2 * copies
    await client.aclose()


async def test_unasked_it_gives_the_dimensions_of_the_catalogue() -> None:
    body = orjson.dumps({"model": "lexical", "input": ["a"]})
    request = httpx.Request("POST", "http://lexical.invalid/embeddings", content=body)
    response = await lexical.LexicalTransport().handle_async_request(request)
    [row] = orjson.loads(await response.aread())["data"]
    assert vectors.dimensions(vectors.parse([row["embedding"]])[0]) == MODEL.dimensions


@pytest.mark.parametrize("body", [b"", b"[]", b'{"model":"other","input":["a"]}', b'{"model":"lexical"}'])
async def test_it_knows_no_other_model(body: bytes) -> None:
    request = httpx.Request("POST", "http://lexical.invalid/embeddings", content=body)
    response = await lexical.LexicalTransport().handle_async_request(request)
    assert response.status_code == 404
