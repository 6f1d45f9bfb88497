"""Totals over a request's inputs, for its response, its log line and its metrics."""

from __future__ import annotations

from msgspec import Struct

from app.types import EmbedResult, Source


class Usage(Struct):
    """Inputs by the source of their vectors; tokens of all inputs, and those that cost nothing."""

    tokens: int
    upstream: int = 0
    cached: int = 0
    shared: int = 0
    """Inputs that shared the embedding of an identical input."""
    cached_tokens: int = 0
    shared_tokens: int = 0

    @classmethod
    def of(cls, result: EmbedResult) -> Usage:
        """Tokens of pieces that cost nothing are counted as such, whatever the source of the rest of their input."""
        sources, token_counts = result.sources, [embedding.tokens for embedding in result.embeddings]
        count, tokens = len(sources), sum(token_counts)
        upstream = sources.count(Source.UPSTREAM)
        if upstream == count:
            return cls(tokens, count, cached_tokens=result.cached_tokens, shared_tokens=result.shared_tokens)
        cached = sources.count(Source.CACHE)
        if cached == count:
            return cls(tokens, cached=count, cached_tokens=tokens)
        pairs = list(zip(token_counts, sources, strict=True))
        return cls(
            tokens,
            upstream,
            cached,
            shared=count - upstream - cached,
            cached_tokens=sum(count for count, source in pairs if source is Source.CACHE) + result.cached_tokens,
            shared_tokens=sum(count for count, source in pairs if source is Source.INFLIGHT) + result.shared_tokens,
        )
