"""Facts about known models, as data: what fits in a call, which dimensions there are, where the fact is from.

No behaviour. A vendor's name may stand here and in its adapter, nowhere else. An operator overrides
a row in the configuration; an upstream that lists its models (`Upstream.discover`) adds rows at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

Role: TypeAlias = Literal["query", "document"]
ROLES: tuple[Role, ...] = ("query", "document")
ANY: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """One model as its vendor serves it. Limits are per upstream call; None means none is known."""

    name: str
    """The upstream's own name for it."""
    dimensions: int | None = None
    """Length of a vector when none is asked for."""
    dimension_choices: tuple[int, ...] | None = None
    """Lengths that can be asked for: None, only `dimensions`; ANY (empty), whatever the upstream takes."""
    max_batch: int = 16
    """Inputs per call."""
    max_tokens_per_input: int | None = None
    max_characters_per_input: int | None = None
    max_tokens_per_batch: int | None = None
    roles: tuple[Role, ...] = ()
    """What a text can be said to be for; empty where the model does not tell queries from documents."""
    default_role: Role | None = None
    """What the upstream takes a text for when it is not told: asking for it by name is asking for nothing."""
    prefixes: tuple[str, ...] = ()
    """Where a role is told within the text: what goes before the text, one for each of `roles`."""
    instruct: bool = False
    """Whether the model takes an instruction."""
    revision: str = ""
    """Told apart in the vector space: the same name with another revision is another space."""
    price_per_million_tokens: float | None = None
    currency: str = "USD"
    source: str = ""
    """Where these facts are from."""


def _rows(*models: Model) -> Mapping[str, Model]:
    return MappingProxyType({model.name: model for model in models})


def _dashscope() -> Iterable[Model]:
    page = "help.aliyun.com/zh/model-studio/text-embedding-synchronous-api"
    for name in ("text-embedding-v1", "text-embedding-v2"):
        yield Model(name, 1536, None, 25, 2048, roles=ROLES, default_role="document", source=page)
    v3 = (1024, 768, 512, 256, 128, 64)
    yield Model("text-embedding-v3", 1024, v3, 10, 8192, roles=ROLES, default_role="document", source=page)
    v4 = (2048, 1536, 1024, 768, 512, 256, 128, 64)
    yield Model(
        "text-embedding-v4", 1024, v4, 10, 8192, roles=ROLES, default_role="document", instruct=True, source=page
    )
    newer = "help.aliyun.com/zh/model-studio/text-embedding-api"
    full = (2560, 2048, 1536, 1024, 768, 512, 256)
    yield Model(
        "qwen3.7-text-embedding",
        1024,
        full,
        20,
        128_000,
        roles=ROLES,
        default_role="document",
        instruct=True,
        source=newer,
    )
    flash = (1024, 768, 512, 256)
    yield Model(
        "qwen3.7-text-embedding-flash",
        1024,
        flash,
        20,
        128_000,
        roles=ROLES,
        default_role="document",
        instruct=True,
        source=newer,
    )


def _baidu() -> Iterable[Model]:
    page = "cloud.baidu.com/doc/qianfan-api/s/Fm7u3ropn"
    yield Model("embedding-v1", 384, None, 16, 384, 1000, source=page)
    for name in ("bge-large-zh", "bge-large-en"):
        yield Model(name, 1024, None, 16, 512, 2000, source=page)
    yield Model("tao-8k", 1024, None, 1, 8192, 28_000, source=page)


def _openai() -> Iterable[Model]:
    page = "developers.openai.com/api/reference/resources/embeddings"
    for name, size, choices, price in (
        ("text-embedding-3-small", 1536, ANY, 0.02),
        ("text-embedding-3-large", 3072, ANY, 0.13),
        ("text-embedding-ada-002", 1536, None, 0.10),
    ):
        yield Model(
            name,
            size,
            choices,
            max_batch=2048,
            max_tokens_per_input=8192,
            max_tokens_per_batch=300_000,
            price_per_million_tokens=price,
            source=page,
        )


def _gemini() -> Iterable[Model]:
    page = "ai.google.dev/gemini-api/docs/embeddings"
    yield Model("gemini-embedding-001", 3072, ANY, 100, 2048, roles=ROLES, source=page)
    # These ignore or refuse the parameter for the role. text-embedding-004 is shut down.
    prefixes = ("task: search result | query: ", "title: none | text: ")
    for name in ("gemini-embedding-2", "gemini-embedding-2-preview"):
        yield Model(name, 3072, ANY, 100, 8192, roles=ROLES, prefixes=prefixes, source=page)


def _lexical() -> Iterable[Model]:
    choices = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
    yield Model("lexical", 512, choices, 256, revision="1", source="app/upstreams/lexical.py")


CATALOG: Mapping[str, Mapping[str, Model]] = MappingProxyType(
    {
        "dashscope": _rows(*_dashscope()),
        "baidu": _rows(*_baidu()),
        "openai": _rows(*_openai()),
        "gemini": _rows(*_gemini()),
        "lexical": _rows(*_lexical()),
    }
)
"""Vendor -> model name -> facts. A vendor that is not here is asked for its models."""
