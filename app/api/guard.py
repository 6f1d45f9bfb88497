"""Ends a request early: at its deadline, or when its caller disconnects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app.api.asgi import Scope
from app.deadlines import Deadline


class ClientGone(Exception):
    """The caller disconnected; there is no one to answer."""


class Guard(Deadline):
    """A deadline that, once `watch` has been called, also ends its block when the caller disconnects, by raising
    `ClientGone`."""

    _listeners: set[Callable[[], None]] | None = None

    def watch(self, scope: Scope) -> None:
        """To be called when the request has been read. The connection calls back when it is lost (`app.http.protocol`);
        under a server without that extension, disconnects go unnoticed."""
        self._listeners = scope.get("extensions", {}).get("hang_up")
        if self._listeners is not None:
            self._listeners.add(self._disconnected)

    def _disconnected(self) -> None:
        self.stop(ClientGone)

    def __exit__(self, *raised: Any) -> None:
        if self._listeners is not None:
            self._listeners.discard(self._disconnected)
        super().__exit__(*raised)
