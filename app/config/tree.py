"""The configuration as plain data on its way to settings: values, what is wrong so far, and where it came from.

A mistake names its place as the operator wrote it, and never shows what a variable held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

Path: TypeAlias = tuple[str | int, ...]
"""Keys and list indexes, from the top."""


class Mistake(NamedTuple):
    """One thing to put right, in words that follow its path."""

    path: Path
    text: str
    whatever_it_holds: bool = False
    """Whether the place itself is wrong, and not what stands there."""


def dotted(path: Path) -> str:
    """`models.docs.deployments[0].upstream`, on one line whatever names there are."""
    parts = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return _printable("".join(parts).removeprefix("."))


def _printable(text: str) -> str:
    """On one line, and without what a terminal would obey, whatever the file holds."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


@dataclass(slots=True)
class Tree:
    """The top level and its history. Stages of loading change it in place, in the order of `app.config.load.load`."""

    label: str
    """Where values are from unless `variables` says otherwise: a file's name, or `environment`."""
    values: dict[str, Any] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    written: dict[Path, str] = field(default_factory=dict)
    """Values that hold a variable's, as they were written: shown instead of them."""
    unfilled: set[Path] = field(default_factory=set)
    """Places whose variables are not set."""
    variables: dict[Path, str] = field(default_factory=dict)
    """Places set by an override, and the environment variable that did."""

    def reject(self, path: Path, text: str) -> None:
        self.note(Mistake(path, text))

    def note(self, mistake: Mistake) -> None:
        """Adds a mistake, unless it is about what stands in a place whose variable is not set: that is the mistake
        there, and what else is wrong cannot be known."""
        if mistake.whatever_it_holds or not any(at[: len(mistake.path)] == mistake.path for at in self.unfilled):
            self.mistakes.append(mistake)

    def shown(self, path: Path, value: object) -> str:
        """A value fit for a message."""
        as_written = _nearest(path, self.written)
        return str(value) if as_written is None else as_written

    def forget(self, path: Path) -> None:
        """Drops what was known of a place and all below it: an override has replaced it."""
        self.mistakes = [known for known in self.mistakes if known.path[: len(path)] != path]
        self.unfilled = {at for at in self.unfilled if at[: len(path)] != path}
        self.written = {at: text for at, text in self.written.items() if at[: len(path)] != path}

    def lines(self) -> list[str]:
        """One line per mistake: where it is from, its path, what is wrong."""
        found = [(_nearest(path, self.variables) or self.label, dotted(path), text) for path, text, _ in self.mistakes]
        return [": ".join(map(_printable, filter(None, parts))) for parts in found]


def _nearest(path: Path, told: Mapping[Path, str]) -> str | None:
    """What is told of this place, or of the nearest above it."""
    return next((told[path[:length]] for length in range(len(path), 0, -1) if path[:length] in told), None)
