"""Where the settings come from, to be read again while the program runs; and what of them can change then."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from app.config.kind import UpstreamKind
from app.config.load import find_file, from_text, load_with_origin
from app.config.settings import Settings

log = logging.getLogger(__name__)

FIXED = ("host", "port", "workers", "metrics_port")
"""Settings of `server` that hold from start to end; so does all of `cache`."""


class ConfigSource:
    """The file that counts, decided once; or the environment alone, until SIGHUP finds a config.yaml.

    A file that is gone later, or empty and was not before, is a mistake then: otherwise the environment would silently
    take its place, and whoever reaches the gateway that of its callers.
    """

    def __init__(
        self, path: str | None, environ: Mapping[str, str], kinds: Mapping[str, UpstreamKind], cwd: Path | None = None
    ) -> None:
        self._environ, self._kinds, self._cwd = environ, kinds, cwd or Path()
        self.file = find_file(path, environ, self._cwd)
        """As it was named; None where there is none."""
        self.loaded = self.signature()
        """The signature of what was last read."""
        self._said = False
        """Whether the file that was last loaded said anything; one of comments alone may stay as it is."""

    def load(self) -> Settings:
        """The settings as they are now. Raises `ConfigError`. Blocks for some milliseconds."""
        # One that has come stays the file, or the environment would take its place when it is gone again.
        self.file = find_file(self.file, self._environ, self._cwd)
        self.loaded = self.signature()
        settings, self._said = load_with_origin(
            self.file, self._environ, self._kinds, cwd=self._cwd, may_be_empty=not self._said
        )
        return settings

    def signature(self) -> tuple[int, int, int, int] | None:
        """Differs when the file does, or who may read it; None while there is no file."""
        try:
            stat = (self._cwd / self.file).stat() if self.file else None
        except OSError:
            return None
        return stat and (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size)


class ParentConfig:
    """Settings as text from another process, which has read them and says when there are others."""

    loaded = None

    def __init__(self, text: str, kinds: Mapping[str, UpstreamKind]) -> None:
        self.text, self._kinds = text, kinds

    def load(self) -> Settings:
        return from_text(self.text, self._kinds)

    def signature(self) -> None:
        """There is no file to look at."""


def applicable(running: Settings, wanted: Settings) -> Settings:
    """`wanted` as far as a running program can follow it. What it cannot follow is said."""
    fixed = {name: getattr(running.server, name) for name in FIXED}
    stuck = [f"server.{name}" for name, value in fixed.items() if getattr(wanted.server, name) != value]
    stuck += ["cache"] if wanted.cache != running.cache else []
    for name in stuck:
        log.warning("%s has changed, which takes a restart; the old value stays in force", name)
    server = wanted.server.model_copy(update=fixed)
    return wanted.model_copy(update={"server": server, "cache": running.cache})
