"""Fake upstreams: real HTTP/1.1 servers on loopback that answer, and fail, as vendors do."""

from . import faults
from .baidu import FakeBaidu, baidu_tokens
from .bce_signature import BadSignature, verify
from .dashscope import FakeDashScope
from .gemini import FakeGemini
from .ollama import FakeOllama, OllamaModel
from .openai import FakeOpenAI
from .upstream import Call, FakeUpstream
from .vectors import Vector, count_tokens, cut, sparse_vector, unit, vector
from .wire import Reply, Request, unused_url

__all__ = [
    "BadSignature",
    "Call",
    "FakeBaidu",
    "FakeDashScope",
    "FakeGemini",
    "FakeOllama",
    "FakeOpenAI",
    "FakeUpstream",
    "OllamaModel",
    "Reply",
    "Request",
    "Vector",
    "baidu_tokens",
    "count_tokens",
    "cut",
    "faults",
    "sparse_vector",
    "unit",
    "unused_url",
    "vector",
    "verify",
]
