"""When a connection is read from, and what the system holds of it."""

from __future__ import annotations

import asyncio
import fcntl
import sys
from collections.abc import Collection
from typing import Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

MAX_PIPELINED = 16
"""Pipelined requests that may wait on a connection; reading resumes when there are fewer."""
_HEADER_OVERHEAD = 150
"""Bytes of memory that a header takes besides its name and value, which may be as short as two bytes."""


class Flow(FlowControl):
    """Pauses reading while many requests wait, or many bytes of their heads and bodies: uvicorn resumes whenever a body
    is received, and they would pile up. While few wait, reading goes on, or a disconnect would not be noticed."""

    pipeline: Collection[tuple[RequestResponseCycle, Any]] = ()

    def resume_reading(self) -> None:
        if self.read_paused and len(self.pipeline) < MAX_PIPELINED and self._bytes_waiting() <= HIGH_WATER_LIMIT:
            super().resume_reading()

    def _bytes_waiting(self) -> int:
        waiting = [cycle for cycle, _ in self.pipeline]
        heads = sum(
            _HEADER_OVERHEAD + len(name) + len(value) for cycle in waiting for name, value in cycle.scope["headers"]
        )
        return heads + sum(len(cycle.body) for cycle in waiting)


def buffered(transport: asyncio.Transport, request: int) -> int:
    """Bytes in the kernel's buffers: unacknowledged (TIOCOUTQ) or unread (FIONREAD); 0 if the system does not say."""
    try:
        count = fcntl.ioctl(transport.get_extra_info("socket").fileno(), request, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(count, sys.byteorder)
