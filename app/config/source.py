"""Where the settings come from, for reloading at run time, and which of them can change without a restart."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from app.config.kind import UpstreamKind
from app.config.load import UnreadableFile, find_file, from_text, load_with_origin
from app.config.settings import Settings

log = logging.getLogger(__name__)

RESTART_ONLY = ("host", "port", "workers", "metrics_port")
"""Settings of `server` that change only with a restart, as does all of `cache`."""


class ConfigSource:
    """The configuration file, chosen once; or the environment alone, until a SIGHUP finds a config.yaml.

    A file that is later missing, or newly empty, is a mistake: otherwise the environment would silently replace it, and
    the gateway would serve anybody who can reach it instead of its configured callers.
    """

    def __init__(
        self, path: str | None, environ: Mapping[str, str], kinds: Mapping[str, UpstreamKind], cwd: Path | None = None
    ) -> None:
        self._environ, self._kinds, self._cwd = environ, kinds, cwd or Path()
        self.file = find_file(path, environ, self._cwd)
        """The file as it was named; None if there is none."""
        self.loaded = self.signature()
        """The signature of the file when it was last read; None if it could not be."""
        self._had_values = False
        """Whether the file last loaded had any values. A file of comments alone may stay that way."""

    def load(self) -> Settings:
        """The current settings. Raises `ConfigError`. Blocks for some milliseconds."""
        # A file that has appeared is kept: if it vanishes again, the environment must not take its place.
        self.file = find_file(self.file, self._environ, self._cwd)
        self.loaded = self.signature()
        try:
            settings, self._had_values = load_with_origin(
                self.file, self._environ, self._kinds, cwd=self._cwd, may_be_empty=not self._had_values
            )
        except UnreadableFile:
            self.loaded = None
            raise
        return settings

    def signature(self) -> tuple[int, int, int, int] | None:
        """Changes whenever the file or its permissions do; None while there is no file."""
        try:
            stat = (self._cwd / self.file).stat() if self.file else None
        except OSError:
            return None
        return stat and (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size)


class ParentConfig:
    """Settings as text from the parent process, which reads them and sends new ones when they change."""

    def __init__(self, text: str, kinds: Mapping[str, UpstreamKind]) -> None:
        self.text, self._kinds = text, kinds

    def load(self) -> Settings:
        return from_text(self.text, self._kinds)


def applicable(running: Settings, wanted: Settings) -> Settings:
    """`wanted`, except for settings that a running program cannot change, which keep their values and are logged."""
    fixed = {name: getattr(running.server, name) for name in RESTART_ONLY}
    ignored = [f"server.{name}" for name, value in fixed.items() if getattr(wanted.server, name) != value]
    ignored += ["cache"] if wanted.cache != running.cache else []
    for name in ignored:
        log.warning("%s has changed but needs a restart; the old value stays in force", name)
    server = wanted.server.model_copy(update=fixed)
    return wanted.model_copy(update={"server": server, "cache": running.cache})
