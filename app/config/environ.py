"""What the environment says: overrides of single values, and upstreams when no file names any.

Overrides are read with pydantic-settings' own EnvSettingsSource, which knows from the models where a value is JSON and
where it is text. It is asked for one variable at a time and its answer is put into the tree here, since it reads the
process's environment only, leaves unknown names out without a word, and cannot match `DS_COMPAT` with a key
`ds-compat`, or a number with a list's item.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource, SettingsError

from app.config.explain import unknown_key
from app.config.kind import UpstreamKind
from app.config.settings import Settings
from app.config.tree import Path, Tree

PREFIX = "EMBEDDING_GATEWAY__"
_DELIMITER = "__"
_LAST_NAME = 2
"""The last step that may be a name of the operator's choice with something below it: `auth.keys.NAME`."""

Listening = Callable[[str, int], bool]


def environment_upstreams(
    environ: Mapping[str, str], kinds: Mapping[str, UpstreamKind], listening: Listening
) -> dict[str, Any]:
    """Upstreams that vendors' variables switch on, or that are found running where their type listens by default."""
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        settings = kind.environment(environ)
        if settings is None and kind.default_address and listening(*kind.default_address):
            settings = {}
        if settings is not None:
            found[name] = {"type": name, **settings}
    return found


def built_in_upstreams(kinds: Mapping[str, UpstreamKind]) -> dict[str, Any]:
    """What serves when nothing else is there."""
    return {name: {"type": name} for name, kind in kinds.items() if kind.built_in}


def apply_overrides(environ: Mapping[str, str], tree: Tree) -> None:
    """Puts every `EMBEDDING_GATEWAY__…` into the tree, whole sections before their parts, and item 9 before item 10."""
    variables = [name for name in environ if name.upper().startswith(PREFIX)]
    for variable in sorted(variables, key=_turn):
        _Override(variable, tree).apply(environ[variable])


def _turn(variable: str) -> tuple[int, list[tuple[int, str]]]:
    """Of numbers the shorter one is the lower."""
    steps = variable.split(_DELIMITER)
    return len(steps), [(len(step) if step.isdecimal() else 0, step) for step in steps]


class _OneVariable(EnvSettingsSource):
    """A single variable, as pydantic-settings nests and decodes it."""

    def __init__(self, variable: str, value: str) -> None:
        # No `BaseSettings`, which takes `_env_file` and its like for its own parameters: a file may hold any key.
        model: Any = Settings
        super().__init__(model, env_prefix=PREFIX, env_nested_delimiter=_DELIMITER, env_ignore_empty=True)
        self.env_vars = {variable.lower(): value}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:  # noqa: ARG002  # inherited
        """JSON only where it looks it: an upstream's own fields are unknown here, and a key of digits is no number."""
        return json.loads(value) if value.lstrip()[:1] in ("[", "{") else value


class _Override:
    def __init__(self, variable: str, tree: Tree) -> None:
        self._variable = variable
        self._tree = tree

    def apply(self, value: str) -> None:
        steps = tuple(self._variable[len(PREFIX) :].lower().split(_DELIMITER))
        if steps[0] not in Settings.model_fields or "" in steps:
            self._refuse(steps, "unknown key" if "" in steps else unknown_key(steps[0], Settings.model_fields))
            return
        try:
            nested: Any = _OneVariable(self._variable, value)()
            copy.deepcopy(nested)  # as all values are, later, when it is not known any more where one is from
        except SettingsError:
            self._refuse(steps, "not JSON; write [..] or {..} as JSON")
            return
        except RecursionError:
            self._refuse(steps, "is nested too deeply")
            return
        for step in steps:
            nested = nested[step]
        self._put(steps, None if nested == "null" else nested)

    def _put(self, steps: tuple[str, ...], value: Any) -> None:
        """Walks down, making mappings and lists where there are none, and replaces what is at the end."""
        place: Any = self._tree.values
        path: Path = ()
        for number, step in enumerate(steps):
            key = self._key(place, step, path)
            if key is None:
                return
            path = (*path, key)
            last = number == len(steps) - 1
            if last or not isinstance(_item(place, key), dict | list):
                self._tree.forget(path)
                self._tree.variables.setdefault(path, self._variable)
                _set(place, key, value if last else _begun(steps, number + 1))
            place = _item(place, key)
        self._tree.variables[path] = self._variable
        self._tree.written[path] = f"${self._variable}"

    def _key(self, place: Any, step: str, path: Path) -> str | int | None:
        """The key that is meant: the one there that reads like this, or else the name itself. None is refused."""
        if isinstance(place, list):
            if step.isdecimal() and int(step) <= len(place):
                return int(step)
            self._refuse((*path, step), f"the list has {len(place)} items, numbered from 0")
            return None
        alike = [key for key in place if _plain(key) == _plain(step)]
        if len(alike) > 1:
            self._refuse((*path, step), f"may mean {' or '.join(alike)}")
            return None
        return alike[0] if alike else step

    def _refuse(self, path: Path, text: str) -> None:
        self._tree.variables[path] = self._variable
        self._tree.reject(path, text)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", name.lower())


def _begun(steps: tuple[str, ...], number: int) -> dict[str, Any] | list[Any]:
    """What this step is the first in: a list where it is 0, but for `upstreams`, `models` and `auth.keys`, where a name
    may be that."""
    return [] if steps[number] == "0" and number > _LAST_NAME else {}


def _item(place: Any, key: str | int) -> Any:
    if isinstance(place, list):
        return place[int(key)] if int(key) < len(place) else None
    return place.get(key)


def _set(place: Any, key: str | int, value: Any) -> None:
    if isinstance(place, list) and key == len(place):
        place.append(value)
    else:
        place[key] = value
