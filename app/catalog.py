"""Facts about known models, as data: what fits in a call, which dimensions there are, and the source of each fact.

No behaviour except looking up a name. A vendor's name may appear here and in its adapter, nowhere else. An operator
overrides a row in the configuration; an upstream that lists its models (`Upstream.discover`) adds rows at run time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Literal, TypeAlias

Role: TypeAlias = Literal["query", "document"]
MediaKind: TypeAlias = Literal["image", "video"]
TokenRule: TypeAlias = Literal["bytes", "han+words", "cl100k_base"]
ROLES: tuple[Role, ...] = ("query", "document")
ANY: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """One model as its vendor serves it. Limits are per upstream call; None means none is known."""

    name: str
    """The upstream's own name for it."""
    dimensions: int | None = None
    """Default length of a vector."""
    dimension_choices: tuple[int, ...] | None = None
    """Lengths that can be requested. None: only `dimensions`; ANY (empty): whatever the upstream takes."""
    max_batch: int = 16
    """Inputs per call."""
    max_tokens_per_input: int | None = None
    max_characters_per_input: int | None = None
    max_tokens_per_batch: int | None = None
    counted_by: TokenRule = "bytes"
    """How tokens are bounded: by bytes, as in any byte-level vocabulary, or by a vendor's own rule; `cl100k_base` is
    counted exactly."""
    cuts_silently: bool = False
    """Whether the upstream may silently truncate a longer input, so that the gateway cannot rely on a refusal."""
    roles: tuple[Role, ...] = ()
    """The roles a text can have; empty if the model does not distinguish queries from documents."""
    default_role: Role | None = None
    """The role that the upstream assumes by default: requesting it is the same as requesting none."""
    prefixes: tuple[str, ...] = ()
    """For a model that is told the role within the text: the prefix for each of `roles`. `{instruct}` stands for the
    caller's instruction."""
    instruct: bool = False
    """Whether the model takes an instruction."""
    instruction: str = ""
    """The instruction in a prefix if the caller gives none."""
    matryoshka_dimensions: tuple[int, ...] | None = None
    """Shorter lengths that the gateway makes itself, by truncating the full vector, if the model is trained for that
    (Matryoshka) and its server may not support it. Values as in `dimension_choices`."""
    sparse: bool = False
    """Whether it returns sparse vectors, with dense ones or alone."""
    images: int = 0
    """Maximum images per call; 0: it takes none."""
    videos: int = 0
    max_image_bytes: int | None = None
    """Of an image sent inline; one given by its URL is for the vendor to check."""
    revision: str = ""
    """Part of the vector space's name: the same model in another revision is another space."""
    assumed: bool = False
    """Whether nothing but the address suggests that its server has it: then no reply may name another model."""
    same_as: str = ""
    """The name used for its vector space, if an upstream knows it by several."""
    price_per_million_tokens: float | None = None
    currency: str = "USD"
    source: str = ""
    """Where these facts are from."""

    def space(self, kind: str) -> str:
        """The name of its vector space behind an upstream of type `kind`."""
        return f"{kind}/{self.same_as or self.name}{f'@{self.revision}' if self.revision else ''}"


def combined(models: Sequence[Model]) -> Model:
    """The facts of one model behind several deployments: those of the first, with these exceptions. Roles, instructions
    and sparse vectors are served if any deployment has them, images and videos if all do; an input is too long, or an
    image too large, if it is for any; and if the catalogue has lengths to shorten to for any, they apply to all."""
    if len(models) == 1:
        return models[0]
    rules = {each.counted_by for each in models if each.max_tokens_per_input is not None}
    return replace(
        models[0],
        max_tokens_per_input=least(each.max_tokens_per_input for each in models),
        max_characters_per_input=least(each.max_characters_per_input for each in models),
        # Bytes bound the tokens of every rule as it is stated: Baidu's 1.3 for a word, which has a space after it.
        counted_by=rules.pop() if len(rules) == 1 else "bytes",
        cuts_silently=any(each.cuts_silently for each in models),
        roles=tuple(role for role in ROLES if any(role in each.roles for each in models)),
        instruct=any(each.instruct for each in models),
        matryoshka_dimensions=next(
            (each.matryoshka_dimensions for each in models if each.matryoshka_dimensions is not None), None
        ),
        sparse=any(each.sparse for each in models),
        images=min(each.images for each in models),
        videos=min(each.videos for each in models),
        max_image_bytes=least(each.max_image_bytes for each in models),
    )


def least(limits: Iterable[int | None]) -> int | None:
    """The lowest of the limits that are known; None if none is."""
    return min((limit for limit in limits if limit is not None), default=None)


def _rows(*models: Model) -> Mapping[str, Model]:
    return MappingProxyType({model.name: model for model in models})


def _dashscope() -> Iterable[Model]:
    page = "help.aliyun.com/zh/model-studio/text-embedding-synchronous-api"
    newer = "help.aliyun.com/zh/model-studio/text-embedding-api"
    model = partial(Model, roles=ROLES, default_role="document")
    for name in ("text-embedding-v1", "text-embedding-v2"):
        yield model(name, 1536, None, 25, 2048, source=page)
    v3 = (1024, 768, 512, 256, 128, 64)
    yield model("text-embedding-v3", 1024, v3, 10, 8192, sparse=True, source=page)
    v4 = (2048, 1536, 1024, 768, 512, 256, 128, 64)
    yield model("text-embedding-v4", 1024, v4, 10, 8192, instruct=True, sparse=True, source=page)
    full, flash = (2560, 2048, 1536, 1024, 768, 512, 256), (1024, 768, 512, 256)
    yield model("qwen3.7-text-embedding", 1024, full, 20, 128_000, instruct=True, source=newer)
    yield model("qwen3.7-text-embedding-flash", 1024, flash, 20, 128_000, instruct=True, source=newer)


def _dashscope_multimodal() -> Iterable[Model]:
    """Where sources differ, the lower limit. Images are JPG, PNG or BMP; videos by URL only."""
    page = "help.aliyun.com/zh/model-studio/multimodal-embedding-api-reference"
    small, large = 3 * 2**20, 5 * 2**20
    # It silently truncates a longer text.
    yield Model(
        "multimodal-embedding-v1", 1024, None, 20, 512,
        cuts_silently=True, images=1, videos=1, max_image_bytes=small, source=page,
    )  # fmt: skip
    vision = partial(Model, max_batch=20, max_tokens_per_input=1024, videos=8, source=page)
    sizes = {"tongyi-embedding-vision-plus": 1152, "tongyi-embedding-vision-flash": 768}
    for name, size in sizes.items():
        yield vision(name, size, images=8, max_image_bytes=small)
    for name, size in sizes.items():  # they return fewer dimensions too, but which is not documented
        yield vision(f"{name}-2026-03-06", size, ANY, images=64, max_image_bytes=large)
    full = (2560, 2048, 1536, 1024, 768, 512, 256)
    yield Model("qwen3-vl-embedding", 2560, full, 20, 32_000, images=5, videos=1, max_image_bytes=large, source=page)
    # All contents of a call are fused into one vector: one input per call.
    fused = (2048, 1024, 768, 512)
    yield Model("qwen2.5-vl-embedding", 1024, fused, 1, 32_000, images=1, videos=1, max_image_bytes=large, source=page)


def _baidu() -> Iterable[Model]:
    page = "cloud.baidu.com/doc/qianfan-api/s/Fm7u3ropn"
    rule: TokenRule = "han+words"
    yield Model("embedding-v1", 384, None, 16, 384, 1000, counted_by=rule, source=page)
    for name in ("bge-large-zh", "bge-large-en"):
        yield Model(name, 1024, None, 16, 512, 2000, counted_by=rule, source=page)
    yield Model("tao-8k", 1024, None, 1, 8192, 28_000, counted_by=rule, source=page)


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
            counted_by="cl100k_base",
            max_tokens_per_batch=300_000,
            price_per_million_tokens=price,
            source=page,
        )


def _gemini() -> Iterable[Model]:
    page = "ai.google.dev/gemini-api/docs/embeddings"
    yield Model("gemini-embedding-001", 3072, ANY, 100, 2048, cuts_silently=True, roles=ROLES, source=page)
    # These ignore or refuse the role parameter. text-embedding-004 is shut down.
    prefixes = ("task: search result | query: ", "title: none | text: ")
    for name in ("gemini-embedding-2", "gemini-embedding-2-preview"):
        yield Model(name, 3072, ANY, 100, 8192, cuts_silently=True, roles=ROLES, prefixes=prefixes, source=page)


def _lexical() -> Iterable[Model]:
    choices = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
    # A text's letters are hashed all at once, at 150 bytes of memory each: a longer text would take too much.
    yield Model(
        "lexical", 512, choices, 256, max_characters_per_input=100_000, revision="1", source="app/upstreams/lexical.py"
    )


CATALOG: Mapping[str, Mapping[str, Model]] = MappingProxyType(
    {
        "dashscope": _rows(*_dashscope(), *_dashscope_multimodal()),
        "baidu": _rows(*_baidu()),
        "openai": _rows(*_openai()),
        "gemini": _rows(*_gemini()),
        "lexical": _rows(*_lexical()),
    }
)
"""Vendor -> model name -> facts. A vendor that is not here is asked for its models."""


# --- models that many servers serve ---------------------------------------------------------------------

_SEARCH = "Represent this sentence for searching relevant passages: "
_SEARCH_ZH = "为这个句子生成表示以用于检索相关文章："
_WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
_CARD = "huggingface.co/"


_ByPattern: TypeAlias = Iterable[tuple[str, Model]]
"""Models, each with the pattern that its names match."""


def _nomic() -> _ByPattern:
    page = _CARD + "nomic-ai/nomic-embed-text-"
    model = partial(Model, dimensions=768, roles=ROLES, prefixes=("search_query: ", "search_document: "))
    # Ollama's unversioned name is 1.5.
    yield (
        r"nomic-embed-text(-v1\.5)?",
        model("nomic-embed-text-v1.5", matryoshka_dimensions=(768, 512, 256, 128, 64), source=page + "v1.5"),
    )
    yield r"nomic-embed-text-v1", model("nomic-embed-text-v1", source=page + "v1")
    v2 = model(
        "nomic-embed-text-v2-moe", matryoshka_dimensions=(768, 256), max_tokens_per_input=512, source=page + "v2-moe"
    )
    yield r"nomic-embed-text-v2-moe", v2


def _e5() -> _ByPattern:
    model = partial(Model, max_tokens_per_input=512, roles=ROLES, prefixes=("query: ", "passage: "))
    for pattern, form in ((r"e5-{}(-v2)?", "e5-{}-v2"), ("multilingual-e5-{}", "multilingual-e5-{}")):
        for size, length in (("small", 384), ("base", 768), ("large", 1024)):
            name = form.format(size)
            yield pattern.format(size), model(name, length, source=f"{_CARD}intfloat/{name}")


def _bge() -> _ByPattern:
    model = partial(Model, max_tokens_per_input=512, roles=ROLES)
    for language, prefix in (("en", _SEARCH), ("zh", _SEARCH_ZH)):
        for size, length in (("small", 384 if language == "en" else 512), ("base", 768), ("large", 1024)):
            name, pattern = f"bge-{size}-{language}-v1.5", rf"bge-{size}-{language}(-v1\.5)?"
            if name == "bge-large-en-v1.5":
                pattern += "|bge-large"  # Ollama's name for it
            yield pattern, model(name, length, prefixes=(prefix, ""), source=f"{_CARD}BAAI/{name}")
    yield r"bge-m3", Model("bge-m3", 1024, source=_CARD + "BAAI/bge-m3")


def _mxbai() -> _ByPattern:
    yield (
        r"mxbai-embed-large(-v1)?",
        Model(
            "mxbai-embed-large-v1",
            1024,
            matryoshka_dimensions=ANY,
            max_tokens_per_input=512,
            roles=ROLES,
            prefixes=(_SEARCH, ""),
            source="mixedbread.ai/docs/embeddings/mxbai-embed-large-v1",
        ),
    )


def _arctic() -> _ByPattern:
    page, name = _CARD + "Snowflake/snowflake-arctic-embed-", "snowflake-arctic-embed"
    model = partial(Model, roles=ROLES, prefixes=(_SEARCH, ""))
    # The first generation was not trained to be truncated. Under the unversioned name, a server's tag tells the size.
    yield name, model(name, source=page + "l")
    for size, dimensions in (("xs", 384), ("s", 384), ("m", 768), ("m-long", 768), ("l", 1024)):
        yield f"{name}-{size}", model(f"{name}-{size}", dimensions, source=page + size)
    yield rf"{name}-m-v1\.5", model(f"{name}-m-v1.5", 768, matryoshka_dimensions=(768, 256), source=page + "m-v1.5")
    model = partial(Model, roles=ROLES, prefixes=("query: ", ""))
    yield (
        rf"{name}(2|-l-v2\.0)",
        model(f"{name}-l-v2.0", 1024, matryoshka_dimensions=(1024, 256), source=page + "l-v2.0"),
    )
    yield rf"{name}-m-v2\.0", model(f"{name}-m-v2.0", 768, matryoshka_dimensions=(768, 256), source=page + "m-v2.0")


def _others() -> _ByPattern:
    yield (
        r"embeddinggemma(-300m)?",
        Model(
            "embeddinggemma-300m",
            768,
            matryoshka_dimensions=(768, 512, 256, 128),
            roles=ROLES,
            prefixes=("task: search result | query: ", "title: none | text: "),
            source="ai.google.dev/gemma/docs/embeddinggemma/model_card",
        ),
    )
    # A name without a size may be any of them: the server's tag, or the server, tells.
    for suffix, qwen_length in (("", None), ("-0.6b", 1024), ("-4b", 2560), ("-8b", 4096)):
        yield (
            rf"qwen3-embedding{re.escape(suffix)}",
            Model(
                f"qwen3-embedding{suffix}",
                qwen_length,
                matryoshka_dimensions=ANY,
                roles=ROLES,
                prefixes=("Instruct: {instruct}\nQuery:", ""),
                instruct=True,
                instruction=_WEB_SEARCH,
                source=f"{_CARD}Qwen/Qwen3-Embedding{(suffix or '-0.6b').upper()}",
            ),
        )


FAMILIES: tuple[tuple[re.Pattern[str], Model], ...] = tuple(
    (re.compile(pattern), model)
    for rows in (_nomic(), _e5(), _bge(), _mxbai(), _arctic(), _others())
    for pattern, model in rows
)
"""Open models by the pattern of their names, wherever they are served. Limits that only a server knows (length and
number of inputs) are not here, unless the model itself allows no more."""

# Before the bare name: an owner. After it: a tag, a file format, a quantisation. The repetitions are possessive because
# clients name models too: with backtracking, a name of 65 characters takes seconds.
_PACKAGING = r"([-._@](gguf|ggml|onnx|mlx|awq|gptq|int8|fp8|fp16|f16|bf16|f32|i?q\d(_\w+)?|\d+bit))*+"
_DECORATED_NAME = re.compile(rf"^(.*/)?(text-embedding-)?(?P<name>.*?){_PACKAGING}(:[\w.-]+)?{_PACKAGING}$")


_MAX_NAME_LENGTH = 256
"""Characters; no known name has half as many."""


def family(name: str) -> Model | None:
    """The facts known about a model whoever serves it, found by its name without owner, tag and packaging."""
    match = _DECORATED_NAME.match(name.lower()) if len(name) <= _MAX_NAME_LENGTH else None
    bare = match["name"] if match else ""
    return next((model for pattern, model in FAMILIES if pattern.fullmatch(bare)), None)


UNSERVED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "dashscope": MappingProxyType(
            {
                name: f"{name} takes files and answers hours later; use text-embedding-v4, any number of texts at once"
                for name in ("text-embedding-async-v1", "text-embedding-async-v2")
            }
        )
    }
)
"""By type of upstream: models that the vendor has and the gateway cannot serve, and what to use instead."""
