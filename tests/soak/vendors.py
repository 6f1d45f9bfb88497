"""The upstreams of a soak: fakes of five vendors, each behind a proxy, and the expected vector of every text."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.fakes import FakeBaidu, FakeDashScope, FakeGemini, FakeOllama, FakeOpenAI, FakeUpstream, Vector
from tests.soak.tcp_proxy import TcpProxy

DELAY = 0.004
"""Minimum seconds of an upstream call."""


@dataclass
class Vendor:
    """One upstream: its fake, the proxy in front of it, and its configuration."""

    name: str
    fake: FakeUpstream
    proxy: TcpProxy
    config: dict[str, Any]


@dataclass
class Target:
    """A public model. `dimensions`: the lengths to request; None is the model's own."""

    model: str
    vendors: list[Vendor]
    expected: Callable[[str, int | None], Vector]
    dimensions: tuple[int | None, ...] = (None,)


@asynccontextmanager
async def vendors(seed: int) -> AsyncIterator[dict[str, Vendor]]:
    """Runs all upstreams."""
    fakes: dict[str, tuple[FakeUpstream, str, dict[str, Any]]] = {
        "openai-a": (FakeOpenAI("sk-soak", delay=DELAY), "/v1", {"type": "openai", "api_key": "sk-soak"}),
        "openai-b": (FakeOpenAI("sk-soak", base64=False, delay=DELAY), "/v1", {"type": "openai", "api_key": "sk-soak"}),
        "dashscope": (
            FakeDashScope("sk-soak", delay=DELAY), "/api/v1",
            {"type": "dashscope", "mode": "native", "api_key": "sk-soak"},
        ),
        "baidu": (FakeBaidu("ak", "sk", delay=DELAY), "", {"type": "baidu", "api_key": "ak", "secret_key": "sk"}),
        "ollama": (FakeOllama(delay=DELAY), "", {"type": "ollama"}),
        "gemini": (FakeGemini("AIza-soak", delay=DELAY), "/v1beta", {"type": "gemini", "api_key": "AIza-soak"}),
    }  # fmt: skip
    running = {}
    async with AsyncExitStack() as stack:
        for name, (fake, path, config) in fakes.items():
            stack.enter_context(fake)
            port = urlsplit(fake.url).port
            assert port is not None
            proxy = await stack.enter_async_context(TcpProxy(port, random.Random(f"{seed}/proxy/{name}")))
            whole = {**config, "base_url": f"http://127.0.0.1:{proxy.port}{path}", "timeout": "1500ms"}
            running[name] = Vendor(name, fake, proxy, whole)
        yield running


def targets(served: dict[str, Vendor]) -> list[Target]:
    """The models that traffic requests. The two OpenAI-like upstreams are deployments of one model."""

    def one(model: str, vendor: str, actual_model: str = "", dimensions: tuple[int | None, ...] = (None,)) -> Target:
        fake: Any = served[vendor].fake

        def expected(text: str, length: int | None) -> Vector:
            vector: Vector = (
                fake.expected(actual_model or model, text, length)
                if length
                else fake.expected(actual_model or model, text)
            )
            return vector

        return Target(model, [served[vendor]], expected, dimensions)

    both = one("both", "openai-a", "text-embedding-3-small", (None, None, 256, 512))
    both.vendors = [served["openai-a"], served["openai-b"]]
    return [
        both,
        one("text-embedding-v4", "dashscope", dimensions=(None, 256, 1536)),
        one("embedding-v1", "baidu"),
        one("nomic-embed-text", "ollama", "nomic-embed-text:latest"),
        one("gemini-embedding-001", "gemini", dimensions=(768, 128)),
    ]


def configuration(served: dict[str, Vendor], redis_port: int) -> dict[str, Any]:
    """The gateway's configuration, with limits small enough to be reached."""
    deployments = [{"upstream": name, "model": "text-embedding-3-small"} for name in ("openai-a", "openai-b")]
    return {
        "server": {"request_timeout": "4s", "drain": "0s"},
        "cache": {"memory": {"max_size": "8MiB"}, "redis": {"url": f"redis://127.0.0.1:{redis_port}/0"}, "ttl": "1h"},
        "upstreams": {name: vendor.config for name, vendor in served.items()},
        "models": {"both": {"deployments": deployments}},
    }
