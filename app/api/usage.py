"""What a request's inputs came to: for its answer, its log line and its metrics alike."""

from __future__ import annotations

from msgspec import Struct

from app.types import EmbedResult, Source


class Usage(Struct):
    """Inputs by where their vectors came from; tokens of all of them, and of those that cost nothing."""

    tokens: int
    upstream: int = 0
    cached: int = 0
    shared: int = 0
    """Inputs asked once for several."""
    cached_tokens: int = 0
    shared_tokens: int = 0

    @classmethod
    def of(cls, result: EmbedResult) -> Usage:
        """The tokens of pieces that cost nothing count as what they are, whatever became of the rest of their input."""
        sources, each = result.sources, [embedding.tokens for embedding in result.embeddings]
        count, tokens = len(sources), sum(each)
        upstream = sources.count(Source.UPSTREAM)
        if upstream == count:
            return cls(tokens, count, cached_tokens=result.cached_tokens, shared_tokens=result.shared_tokens)
        cached = sources.count(Source.CACHE)
        if cached == count:
            return cls(tokens, cached=count, cached_tokens=tokens)
        pairs = list(zip(each, sources, strict=True))
        return cls(
            tokens,
            upstream,
            cached,
            shared=count - upstream - cached,
            cached_tokens=sum(its for its, source in pairs if source is Source.CACHE) + result.cached_tokens,
            shared_tokens=sum(its for its, source in pairs if source is Source.INFLIGHT) + result.shared_tokens,
        )
