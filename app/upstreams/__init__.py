"""Every upstream dialect by its `type` in the configuration: one module each, one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from app.config import UpstreamKind
from app.upstreams import baidu, dashscope, gemini, lexical, ollama, openai

UPSTREAMS: Mapping[str, UpstreamKind] = MappingProxyType(
    {kind.name: kind for kind in (dashscope.KIND, baidu.KIND, openai.KIND, gemini.KIND, ollama.KIND, lexical.KIND)}
)
