"""The configuration as plain data on its way to settings: values, the mistakes so far, and where each came from.

A mistake names its place as the operator wrote it, and never shows a variable's value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

Path: TypeAlias = tuple[str | int, ...]
"""Keys and list indexes, from the top."""


class Mistake(NamedTuple):
    """One mistake: its path, and the text that follows the path in a message."""

    path: Path
    text: str
    whatever_it_holds: bool = False
    """Whether the key itself is wrong, whatever its value."""


def dotted(path: Path) -> str:
    """The path as `models.docs.deployments[0].upstream`, on one line whatever the names contain."""
    parts = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return _printable("".join(parts).removeprefix("."))


def _printable(text: str) -> str:
    """Escapes line breaks and terminal control characters, which the file may contain."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@dataclass(slots=True)
class Tree:
    """The top-level mapping and its history. The stages of loading modify it in place, in the order of
    `app.config.load.load`."""

    label: str
    """Where values are from, unless `variables` says otherwise: a file's name, or `environment`."""
    values: dict[str, Any] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    written: dict[Path, str] = field(default_factory=dict)
    """The original text of values that contain a variable's value; it is shown in their place."""
    unfilled: set[Path] = field(default_factory=set)
    """Paths whose variables are not set."""
    variables: dict[Path, str] = field(default_factory=dict)
    """Paths set by an override, with the name of its environment variable."""

    def reject(self, path: Path, text: str) -> None:
        self.note(Mistake(path, text))

    def note(self, mistake: Mistake) -> None:
        """Adds a mistake, unless it is about a value whose variable is not set: the unset variable is the mistake, and
        nothing else can be known about the value."""
        if mistake.whatever_it_holds or not any(at[: len(mistake.path)] == mistake.path for at in self.unfilled):
            self.mistakes.append(mistake)

    def shown(self, path: Path, value: object) -> str:
        """A value as it may appear in a message."""
        as_written = _nearest(path, self.written)
        return str(value) if as_written is None else as_written

    def forget(self, path: Path) -> None:
        """Drops what was known of a path and everything below it, because an override replaces it."""
        self.mistakes = [mistake for mistake in self.mistakes if mistake.path[: len(path)] != path]
        self.unfilled = {at for at in self.unfilled if at[: len(path)] != path}
        self.written = {at: text for at, text in self.written.items() if at[: len(path)] != path}

    def lines(self) -> list[str]:
        """One line per mistake: its origin, its path, what is wrong."""
        rows = [(_nearest(path, self.variables) or self.label, dotted(path), text) for path, text, _ in self.mistakes]
        return [": ".join(map(_printable, filter(None, parts))) for parts in rows]


def _nearest(path: Path, texts: Mapping[Path, str]) -> str | None:
    """The text for this path or its nearest ancestor."""
    return next((texts[path[:length]] for length in range(len(path), 0, -1) if path[:length] in texts), None)
