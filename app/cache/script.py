"""Lua scripts on the Redis server: sent by hash, and in full where the server does not know them yet."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from redis.exceptions import NoScriptError

from app.cache.connections import Command, Connections


class Script:
    """One script. Raises what `Connections.exchange` raises."""

    def __init__(self, source: bytes) -> None:
        self._source = source
        self._sha = hashlib.sha1(source, usedforsecurity=False).hexdigest().encode()

    async def run(
        self, connections: Connections, calls: Sequence[Sequence[bytes]], then: Sequence[Command] = ()
    ) -> list[object]:
        """One reply per call and per command in `then`, in one round trip. If the server does not know the script, it
        takes a second one, in which `then` follows again. A call is the number of its keys, the keys, and the
        arguments."""
        replies = await connections.exchange([*[(b"EVALSHA", self._sha, *call) for call in calls], *then])
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            in_full: list[Command] = [(b"EVAL", self._source, *calls[i]) for i in unknown]
            again = unknown + list(range(len(calls), len(replies)))
            for i, reply in zip(again, await connections.exchange([*in_full, *then]), strict=True):
                replies[i] = reply
        return replies


RELEASE = Script(b"""
for i = 1, #KEYS do
  if redis.call('GET', KEYS[i]) == ARGV[1] then redis.call('DEL', KEYS[i]) end
end
""")
"""KEYS: claims. ARGV: the replica that made them. Claims of other replicas stay."""
