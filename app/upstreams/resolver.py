"""The addresses of upstreams' hosts, looked up so that a slow or failing name server costs as few calls as it can."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import errno
import socket
from functools import partial
from typing import Any, TypeAlias

from app.descriptors import require_descriptor

PATIENCE = 1.0
"""Seconds before the addresses of the last lookup are used: a lost packet costs a resolver 5 s."""
TTL = 600.0
"""Seconds for which the addresses of the last lookup may stand in for those of one that fails for the moment."""
TIMEOUT = 120.0
"""Seconds after which a lookup is given up. glibc asks three silent name servers for 30 s, once for each domain that it
tries."""

_Addresses: TypeAlias = list[tuple[Any, ...]]
"""As `socket.getaddrinfo` returns them."""
_Name: TypeAlias = tuple[str, int]
"""A host, as DNS takes it, and a port."""


class Resolver:
    """Lookups on one event loop. One per name runs at a time and outlives callers that give up, so that a name server
    that does not answer is not asked once per caller. While it does not answer, or cannot tell, the last addresses
    serve (RFC 8767)."""

    def __init__(self) -> None:
        self._lookups: dict[_Name, asyncio.Future[_Addresses]] = {}
        self._last: dict[_Name, tuple[float, _Addresses]] = {}
        """The last addresses, and until when they may be used."""

    async def addresses(self, host: str, port: int) -> _Addresses:
        """Raises `OSError`: `socket.gaierror` from the lookup, `TimeoutError` if it is given up, or EAGAIN without a
        thread for it."""
        name = host, port
        lookup = self._lookups.get(name)
        if lookup is None:
            lookup = self._lookups[name] = _look_up(host, port)
            lookup.add_done_callback(partial(self._lookup_done, name))
        valid_until, last = self._last.get(name, (0.0, []))
        if asyncio.get_running_loop().time() >= valid_until:
            return await asyncio.shield(lookup)
        try:
            async with asyncio.timeout(PATIENCE):
                return await asyncio.shield(lookup)
        except TimeoutError:
            return last
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                return last
            raise

    def _lookup_done(self, name: _Name, lookup: asyncio.Future[_Addresses]) -> None:
        del self._lookups[name]
        if lookup.cancelled():
            return
        error = lookup.exception()  # which marks it as retrieved, for when all callers have gone
        if error is None:
            self._last[name] = asyncio.get_running_loop().time() + TTL, lookup.result()
        elif isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
            self._last.pop(name, None)  # they may be another's by now


def _look_up(host: str, port: int) -> asyncio.Future[_Addresses]:
    """Runs in its own thread: the event loop's are few, and one dead name would hold up every upstream. Without
    memory a thread may end before it has begun, or before it can report: hence the time limit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Addresses] = loop.create_future()

    def settle(addresses: _Addresses, error: Exception | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(addresses)
        else:
            future.set_exception(error)

    def resolve() -> None:
        addresses: _Addresses = []
        failed: Exception | None = None
        try:
            require_descriptor()  # without one, a process's first lookup reports an unknown host
            addresses = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
        except Exception as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the event loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, addresses, failed)

    try:
        _thread.start_new_thread(resolve, ())  # `threading.Thread` would wait here for one that never begins
    except RuntimeError as error:  # no more threads, which Python reports without an errno
        raise OSError(errno.EAGAIN, str(error)) from error
    timer = loop.call_later(TIMEOUT, settle, [], TimeoutError())
    future.add_done_callback(lambda _: timer.cancel())
    return future
