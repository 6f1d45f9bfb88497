"""Every upstream with its fake, its configuration and the expected vector of each text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from tests.fakes import FakeBaidu, FakeDashScope, FakeGemini, FakeOllama, FakeOpenAI, FakeUpstream, Vector
from tests.harness import Running, running


@dataclass
class Case:
    """An upstream: its fake, its configuration, one of its models, and the expected vector of a text."""

    fake: FakeUpstream
    config: dict[str, Any]
    model: str
    expected: Callable[[str], Vector]
    rows: int
    longest: int = 400
    models: dict[str, Any] = field(default_factory=dict)
    """Public models with defaults of their own, if `model` is one."""


def _cases() -> dict[str, Callable[[], Case]]:
    def dashscope(mode: str, model: str, rows: int) -> Case:
        fake = FakeDashScope(api_key="sk-canary-dashscope")
        base = "/api/v1" if mode == "native" else "/compatible-mode/v1"
        config = {"type": "dashscope", "mode": mode, "api_key": "sk-canary-dashscope", "base_url": base}
        return Case(fake, config, model, lambda text: fake.expected(model, text), rows)

    def baidu(config: dict[str, Any], model: str, rows: int) -> Case:
        fake = FakeBaidu(
            api_key="canary-ak", secret_key="canary-sk", access_key="canary-iam-ak",
            iam_secret_key="canary-iam-sk", v2_key="bce-v3/ALTAK-canary/canary",
        )  # fmt: skip
        return Case(fake, {"type": "baidu", **config}, model, lambda text: fake.expected(model, text), rows, 200)

    token = {"api_key": "canary-ak", "secret_key": "canary-sk"}
    iam = {"auth": "iam", "access_key": "canary-iam-ak", "secret_key": "canary-iam-sk"}
    v2 = {"mode": "v2", "api_key": "bce-v3/ALTAK-canary/canary", "base_url": "/v2"}

    def ollama() -> Case:
        fake = FakeOllama()
        model = "nomic-embed-text"
        return Case(fake, {"type": "ollama"}, model, lambda text: fake.expected(f"{model}:latest", text), 16)

    def openai(**parts: Any) -> Case:
        fake = FakeOpenAI(api_key="sk-canary-openai", **parts)
        config = {"type": "openai", "api_key": "sk-canary-openai", "base_url": "/v1"}
        model = "text-embedding-3-small"
        return Case(fake, config, model, lambda text: fake.expected(model, text), 2048)

    def gemini(model: str, prefix: str = "", task_type: str | None = None, **defaults: Any) -> Case:
        fake = FakeGemini(api_key="AIza-canary")
        config = {"type": "gemini", "api_key": "AIza-canary", "base_url": "/v1beta"}
        models = {"public": {"deployments": [{"upstream": "up", "model": model}], **defaults}} if defaults else {}
        length = defaults.get("dimensions")

        def expected(text: str) -> Vector:
            return fake.expected(model, prefix + text, length, task_type=task_type)

        return Case(fake, config, "public" if models else model, expected, 100, models=models)

    native = {"v1": 25, "v2": 25, "v3": 10, "v4": 10}
    cases: dict[str, Callable[[], Case]] = {}
    for version, rows in native.items():
        model = f"text-embedding-{version}"
        cases[f"dashscope native {model}"] = partial(dashscope, "native", model, rows)
        cases[f"dashscope compatible {model}"] = partial(dashscope, "compatible", model, rows)
    cases["dashscope native qwen3.7-text-embedding"] = partial(dashscope, "native", "qwen3.7-text-embedding", 20)
    for model, rows in {"embedding-v1": 16, "bge-large-zh": 16, "bge-large-en": 16, "tao-8k": 1}.items():
        cases[f"baidu token {model}"] = partial(baidu, token, model, rows)
    cases["baidu iam"] = partial(baidu, iam, "embedding-v1", 16)
    cases["baidu v2"] = partial(baidu, v2, "embedding-v1", 16)
    cases["ollama"] = ollama
    cases["openai base64"] = openai
    cases["openai numbers only"] = partial(openai, base64=False)
    first, second = "gemini-embedding-001", "gemini-embedding-2"
    question, answer = "task: search result | query: ", "title: none | text: "
    query, document = "RETRIEVAL_QUERY", "RETRIEVAL_DOCUMENT"
    cases["gemini"] = partial(gemini, first)
    cases["gemini query"] = partial(gemini, first, task_type=query, input_type="query", dimensions=768)
    cases["gemini document"] = partial(gemini, first, task_type=document, input_type="document", dimensions=128)
    cases["gemini 2"] = partial(gemini, second)
    cases["gemini 2 query"] = partial(gemini, second, question, input_type="query", dimensions=1536)
    cases["gemini 2 document"] = partial(gemini, second, answer, input_type="document", dimensions=256)
    return cases


CASES = _cases()


@contextmanager
def gateway_for(case: Case, **config: Any) -> Iterator[Running]:
    with case.fake:
        base = case.fake.url + str(case.config.get("base_url", ""))
        upstream = {**case.config, "base_url": base, "max_concurrency": 4}
        whole = {"cache": {"memory": None}, "models": case.models, **config, "upstreams": {"up": upstream}}
        with running(whole) as gateway:
            yield gateway


def mixed_texts(count: int, longest: int) -> list[str]:
    """Distinct texts of very different lengths, Chinese and English, the same in every run."""
    rng = random.Random(count)
    words = ["风急天高猿啸哀", "渚清沙白鸟飞回", "quick", "brown", "fox", "embedding", "ünïcödé", "🙂"]
    texts = []
    for i in range(count):
        text = f"{i}"
        length = rng.choice([1, 5, 20, longest])
        while len(text) < length:
            text += " " + rng.choice(words)
        texts.append(text[:longest])
    return texts


def vectors_of(answer: dict[str, Any]) -> list[Vector]:
    assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
    return [np.array(row["embedding"], "<f4") for row in answer["data"]]


def dashscope_alone(fake: FakeDashScope, **more: Any) -> dict[str, Any]:
    """A configuration with one upstream, DashScope's native API, and all its models under their own names."""
    upstream = {"type": "dashscope", "api_key": "sk-fake", "base_url": fake.url + "/api/v1"}
    return {"upstreams": {"up": upstream}, **more}
