"""What ends a request before its time: its deadline, and a caller who hangs up."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from app.deadlines import Deadline


class ClientGone(Exception):
    """The caller hung up; there is nobody to answer."""


class Guard(Deadline):
    """A deadline that also ends the block, once `watch` was called, when the caller hangs up; it then raises
    `ClientGone`."""

    _listeners: set[Callable[[], None]] | None = None

    def watch(self, scope: MutableMapping[str, Any]) -> None:
        """From now on nothing more is to come from the caller, whose connection calls back when it is lost
        (`app.protocol`). Under a server that does not, callers who hang up are not noticed."""
        self._listeners = scope.get("extensions", {}).get("hang_up")
        if self._listeners is not None:
            self._listeners.add(self._gone)

    def _gone(self) -> None:
        self.stop(ClientGone)

    def __exit__(self, *raised: Any) -> None:
        if self._listeners is not None:
            self._listeners.discard(self._gone)
        super().__exit__(*raised)
