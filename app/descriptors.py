"""File descriptors: whether one is left, where code would fail without saying so."""

from __future__ import annotations

import socket


def require_descriptor() -> None:
    """Raises `OSError` if no file descriptor is left, ahead of code that would not report it."""
    socket.socket(socket.AF_UNIX).close()  # unlike opening a file, this depends on no path
