"""Reloads the configuration while the program runs: on request, and when its file, if it has one, has changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from app.clock import Clock
from app.config.load import ConfigError
from app.config.settings import Settings
from app.config.source import ConfigSource, ParentConfig

log = logging.getLogger(__name__)

POLL_INTERVAL = 2.0
"""Seconds between checks of the file. A change is loaded once the file has been stable for one interval."""


class ConfigWatcher:
    """`change` puts new settings in force, or raises and changes nothing; `result` is called with whether the reload
    succeeded."""

    def __init__(
        self,
        source: ConfigSource | ParentConfig,
        clock: Clock,
        change: Callable[[Settings], Awaitable[None]],
        result: Callable[[bool], None],
    ) -> None:
        self._source, self._clock, self._change, self._result = source, clock, change, result
        self._requested = asyncio.Event()
        self._reloading = False

    def ask(self) -> None:
        """Requests a reload. Must be called within the event loop."""
        self._requested.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        # A parent says when it has sent other settings.
        polling = [self._poll_file(self._source)] if isinstance(self._source, ConfigSource) else []
        await asyncio.gather(self._reload_on_request(), *polling)

    async def _poll_file(self, source: ConfigSource) -> None:
        """Requests a reload when the file is not the one that was read last and is no longer being written: again and
        again if the system cannot read it, but not while it is being read."""
        seen = source.loaded
        while True:
            await self._clock.sleep(POLL_INTERVAL)
            before, seen = seen, source.signature()
            if seen not in (None, source.loaded) and seen == before and not self._reloading:
                self.ask()

    async def _reload_on_request(self) -> None:
        while True:
            await self._requested.wait()
            self._requested.clear()
            self._reloading = True
            self._result(await self._reload())
            self._reloading = False

    async def _reload(self) -> bool:
        """Whether the current configuration is now in force. If not, nothing has changed."""
        try:
            await self._change(await asyncio.to_thread(self._source.load))
        except ConfigError as error:
            for mistake in error.mistakes:
                log.error("configuration not changed: %s", mistake)
        except Exception:
            log.exception("configuration not changed")
        else:
            return True
        return False
