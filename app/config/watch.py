"""Reads the configuration again while the program runs: when asked to, and when the file has changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from app.clock import Clock
from app.config.load import ConfigError
from app.config.settings import Settings
from app.config.source import ConfigSource, ParentConfig

log = logging.getLogger(__name__)

LOOK = 2.0
"""Seconds between two looks at the file. A change is read once it has stayed for one."""


class ConfigWatcher:
    """`change` is to put new settings in force, or raise and change nothing; `result` is told whether all went well."""

    def __init__(
        self,
        source: ConfigSource | ParentConfig,
        clock: Clock,
        change: Callable[[Settings], Awaitable[None]],
        result: Callable[[bool], None],
    ) -> None:
        self._source, self._clock, self._change, self._result = source, clock, change, result
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Has the configuration read again, soon. To be called in the event loop."""
        self._asked.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        await asyncio.gather(self._read_when_asked(), self._look_at_file())

    async def _look_at_file(self) -> None:
        """Asks when the file has changed and is not being written to any more."""
        seen = self._source.loaded
        while True:
            await self._clock.sleep(LOOK)
            before, seen = seen, self._source.signature()
            if seen is not None and seen == before and seen != self._source.loaded:
                self.ask()

    async def _read_when_asked(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._result(await self._read())

    async def _read(self) -> bool:
        """Whether the configuration as it stands is now in force. If not, nothing has changed."""
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
