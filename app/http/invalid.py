"""Logs what is sent to the port but is not HTTP, at most once a minute, and never its bytes, which may hold a key."""

from __future__ import annotations

import logging
from collections.abc import Callable

from app.logs import Seldom

log = logging.getLogger(__name__)

_PROTOCOLS = {
    b"\x16\x03": "TLS, but this port speaks plain HTTP",
    b"PROXY ": "the PROXY protocol (v1), which is not supported",
    b"\r\n\r\n\0\r\nQUIT\n": "the PROXY protocol (v2), which is not supported",
    b"PRI * HTTP/2": "HTTP/2 without TLS, which is not supported",
}
"""Other protocols that misconfigured load balancers and clients speak, by how they begin."""
LONGEST_START = max(map(len, _PROTOCOLS))


class InvalidHttpLog:
    """`count` is called for each attempt. `now` returns the seconds of a monotonic clock."""

    def __init__(self, count: Callable[[], None], now: Callable[[], float]) -> None:
        self._count, self._seldom = count, Seldom(now)
        self._attempts = 0
        """Since the last line."""

    def __call__(self, client: tuple[str, int] | None, start: bytes, problem: str) -> None:
        """`start`: the first bytes; `problem`: what to log unless they are those of a known protocol."""
        self._count()
        self._attempts += 1
        if not self._seldom():
            return
        problem = next((name for begin, name in _PROTOCOLS.items() if start.startswith(begin)), problem)
        peer = client[0] if client else "an unknown address"
        log.warning("invalid HTTP from %s: %s (%d since the last such line)", peer, problem, self._attempts)
        self._attempts = 0
