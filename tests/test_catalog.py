"""The catalogue: lookup by name, and what every row must have."""

from __future__ import annotations

import time

import pytest

from app.catalog import CATALOG, FAMILIES, Model, TokenRule, combined, family

ROWS = [*(model for models in CATALOG.values() for model in models.values()), *(model for _, model in FAMILIES)]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("nomic-embed-text", "nomic-embed-text-v1.5"),
        ("nomic-embed-text:latest", "nomic-embed-text-v1.5"),
        ("nomic-embed-text:137m-v1.5-q4_0", "nomic-embed-text-v1.5"),
        ("nomic-ai/nomic-embed-text-v1.5", "nomic-embed-text-v1.5"),
        ("text-embedding-nomic-embed-text-v1.5", "nomic-embed-text-v1.5"),
        ("nomic-embed-text-v1.5.Q8_0.gguf", "nomic-embed-text-v1.5"),
        ("hf.co/nomic-ai/nomic-embed-text-v1.5-GGUF:Q8_0", "nomic-embed-text-v1.5"),
        ("nomic-ai/nomic-embed-text-v1", "nomic-embed-text-v1"),
        ("intfloat/e5-large-v2", "e5-large-v2"),
        ("intfloat/multilingual-e5-base", "multilingual-e5-base"),
        ("BAAI/bge-large-en-v1.5", "bge-large-en-v1.5"),
        ("bge-large", "bge-large-en-v1.5"),
        ("BAAI/bge-small-zh", "bge-small-zh-v1.5"),
        ("bge-m3:567m", "bge-m3"),
        ("mixedbread-ai/mxbai-embed-large-v1", "mxbai-embed-large-v1"),
        ("mxbai-embed-large:335m-v1-fp16", "mxbai-embed-large-v1"),
        ("snowflake-arctic-embed:22m", "snowflake-arctic-embed"),
        ("Snowflake/snowflake-arctic-embed-m-long", "snowflake-arctic-embed-m-long"),
        ("snowflake-arctic-embed2", "snowflake-arctic-embed-l-v2.0"),
        ("Qwen/Qwen3-Embedding-0.6B", "qwen3-embedding-0.6b"),
        ("qwen3-embedding:8b", "qwen3-embedding"),
        ("google/embeddinggemma-300m", "embeddinggemma-300m"),
        ("intfloat/e5-mistral-7b-instruct", None),
        ("my/bge-large-en-v1.5-tuned", None),
        ("text-embedding-3-small", None),
        ("", None),
    ],
)
def test_an_open_model_is_known_by_its_name_whoever_serves_it(name: str, known: str | None) -> None:
    found = family(name)
    assert (found and found.name) == known


@pytest.mark.parametrize(
    "name",
    ["a-q4" + "_q4" * 14 + "!", "-4bit" * 50 + "x", "-fp16" * 50 + ":", "/" * 255 + "\n", "-q4" + "_q4" * 10**6 + "!"],
)
def test_no_name_that_a_caller_or_an_upstream_may_think_up_takes_long(name: str) -> None:
    started = time.thread_time()
    assert family(name) is None
    assert time.thread_time() - started < 0.1


def test_a_name_that_tells_the_size_tells_the_length() -> None:
    """That length may be requested; without the size, any length is refused, as for other models with only one."""
    lengths = {"xs": 384, "s": 384, "m": 768, "m-long": 768, "l": 1024}
    for size, length in lengths.items():
        found = family(f"Snowflake/snowflake-arctic-embed-{size}")
        assert found
        assert found.dimensions == length


def test_every_row_is_found_by_its_own_name() -> None:
    for _, model in FAMILIES:
        assert family(model.name) is model


@pytest.mark.parametrize("model", ROWS, ids=lambda model: model.name)
def test_a_row_says_where_it_is_from_and_a_prefix_for_each_role_or_none(model: Model) -> None:
    assert model.source
    assert len(model.prefixes) in (0, len(model.roles))
    assert any("{instruct}" in prefix for prefix in model.prefixes) == bool(model.instruction)
    assert model.instruct or not model.instruction
    if model.matryoshka_dimensions and model.dimensions:
        assert max(model.matryoshka_dimensions) == model.dimensions


@pytest.mark.parametrize(
    ("first", "second", "rule"),
    [
        (Model("m", None, None, 1, 512, counted_by="han+words"), Model("m", None, None, 1, 512), "bytes"),
        (
            Model("m", None, None, 1, 9, counted_by="han+words"),
            Model("m", None, None, 1, 9, counted_by="cl100k_base"),
            "bytes",
        ),
        # One without a limit has nothing to count.
        (Model("m", None, None, 1, 9, counted_by="cl100k_base"), Model("m"), "cl100k_base"),
        (Model("m"), Model("m"), "bytes"),
    ],
)
def test_deployments_that_count_tokens_differently_are_counted_by_what_bounds_them_all(
    first: Model, second: Model, rule: TokenRule
) -> None:
    assert combined([first, second]).counted_by == combined([second, first]).counted_by == rule
