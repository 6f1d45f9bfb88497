"""The scenarios, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scenario:
    """The requests sent to a target, and how it is set up for them."""

    name: str
    about: str
    kind: str
    """Kind of texts: fresh, hot or trace (`bench.traffic.Shape`)."""
    texts: int
    encoding: str
    connections: int
    latency: float = 0.0
    """Seconds the upstream takes."""
    caches: tuple[str, ...] = ("none",)
    """The caches that peers are measured with: none, memory, redis. A peer without such a cache is left out."""
    own_cache: str = "memory"
    """The cache that the gateway is measured with."""
    numbers_only: bool = False
    """Whether the gateway is measured over an upstream of kind B as well."""
    bare: bool = False
    """Whether to measure a bare ASGI application that sends the same bytes, as a limit."""

    @property
    def requests(self) -> int | None:
        """The number of requests in a run; None if it is limited by time."""
        return 2000 if self.kind == "trace" else None


SCENARIOS: dict[str, Scenario] = {
    each.name: each
    for each in (
        Scenario("S1", "one new text, float", "fresh", 1, "float", 16, numbers_only=True),
        Scenario("S2", "16 new texts, float", "fresh", 16, "float", 16, numbers_only=True),
        Scenario("S3", "128 new texts, float", "fresh", 128, "float", 4, numbers_only=True),
        Scenario("S4", "the same text, float", "hot", 1, "float", 16, caches=("memory",), bare=True),
        Scenario("S4b16", "the same 16 texts, float", "hot", 16, "float", 16, caches=("memory",), bare=True),
        Scenario("S5", "one new text, base64", "fresh", 1, "base64", 16),
        Scenario("S5b16", "16 new texts, base64", "fresh", 16, "base64", 16),
        Scenario("S5b128", "128 new texts, base64", "fresh", 128, "base64", 4),
        Scenario("C1", "one new text, float, one at a time", "fresh", 1, "float", 1, numbers_only=True),
        Scenario("L50", "one new text, float, upstream of 50 ms", "fresh", 1, "float", 64, 0.05, numbers_only=True),
        Scenario("L50c256", "one new text, float, upstream of 50 ms", "fresh", 1, "float", 256, 0.05),
        Scenario("R", "the same text, in Redis only", "hot", 1, "float", 16, 0.0, ("redis",), "redis", bare=True),
        Scenario(
            "Rb16", "the same 16 texts, in Redis only", "hot", 16, "float", 16, 0.0, ("redis",), "redis", bare=True
        ),
        Scenario(
            "R5", "one new text, base64, Redis asked and told", "fresh", 1, "base64", 16, 0.0, ("redis",), "redis"
        ),
        Scenario(
            "M",
            "mixed trace: 70 % one text, 30 % bulk of 64, two models, texts by Zipf's law, base64, upstream of 50 ms",
            "trace",
            1,
            "base64",
            32,
            0.05,
            ("none", "memory"),
            numbers_only=True,
        ),
    )
}

QUICK = ("S1", "S2", "S3", "S4", "S4b16", "S5", "S5b128", "C1", "L50", "R", "M")
"""What `make bench-quick` runs."""
