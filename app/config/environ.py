"""Configuration from the environment: overrides of single values, and upstreams when no file names any.

Overrides are decoded by pydantic-settings' EnvSettingsSource, which knows from the models which values are JSON and
which are text. It is given one variable at a time, and this module puts the result into the tree, because it reads only
the process's environment, silently ignores unknown names, and cannot match `DS_COMPAT` with a key `ds-compat`, or a
number with a list item.
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
_VERBATIM = (("headers",), ("query",))
"""Mappings of an upstream whose keys are sent as spelled: `API_VERSION` may be `api-version` or `apiVersion`."""
_LAST_NAME = 2
"""Index of the last step that may be an operator-chosen name with something below it: `auth.keys.NAME`."""

Listening = Callable[[str, int], bool]


def environment_upstreams(
    environ: Mapping[str, str], kinds: Mapping[str, UpstreamKind], listening: Listening
) -> dict[str, Any]:
    """Upstreams that vendor variables switch on, or whose server is found running at the type's default address."""
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        settings = kind.environment(environ)
        if settings is None and kind.default_address and listening(*kind.default_address):
            settings = {"type": name}
        if settings is not None:
            found[name] = settings
    return found


def built_in_upstreams(kinds: Mapping[str, UpstreamKind]) -> dict[str, Any]:
    """The upstreams that serve when no other is configured or found."""
    return {name: {"type": name} for name, kind in kinds.items() if kind.built_in}


def apply_overrides(environ: Mapping[str, str], tree: Tree) -> None:
    """Applies every `EMBEDDING_GATEWAY__…` to the tree: sections before their parts, and item 9 before item 10."""
    variables = [name for name in environ if name.upper().startswith(PREFIX)]
    for variable in sorted(variables, key=_sort_key):
        _Override(variable, tree).apply(environ[variable])


def _sort_key(variable: str) -> tuple[int, list[tuple[int, str]]]:
    """Numbers sort by their length first, hence by value."""
    steps = variable.split(_DELIMITER)
    return len(steps), [(len(step) if step.isdecimal() else 0, step) for step in steps]


class _OneVariable(EnvSettingsSource):
    """Nests and decodes a single variable as pydantic-settings does."""

    def __init__(self, variable: str, value: str) -> None:
        # `Settings` is no `BaseSettings`, which would treat `_env_file` and the like as its own parameters: a file may
        # hold any key.
        model: Any = Settings
        super().__init__(model, env_prefix=PREFIX, env_nested_delimiter=_DELIMITER, env_ignore_empty=True)
        self.env_vars = {variable.lower(): value}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:  # noqa: ARG002  # inherited
        """Decodes JSON only if it looks like a list or mapping: an upstream's own fields are unknown here, and an API
        key of digits is not a number."""
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
            copy.deepcopy(nested)  # fails here, where its origin is known, rather than in `validate`
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
        """Descends along `steps`, creating missing mappings and lists, and replaces the value at the end."""
        node: Any = self._tree.values
        path: Path = ()
        for depth, step in enumerate(steps):
            key = self._key(node, step, path)
            if key is None:
                return
            path = (*path, key)
            last = depth == len(steps) - 1
            if last or not isinstance(_get(node, key), dict | list):
                self._tree.forget(path)
                self._tree.variables.setdefault(path, self._variable)
                _set(node, key, value if last else _empty_container(steps, depth + 1))
            node = _get(node, key)
        self._tree.variables[path] = self._variable
        self._tree.written[path] = f"${self._variable}"

    def _key(self, node: Any, step: str, path: Path) -> str | int | None:
        """The existing key that `step` spells, or `step` itself as a new one; None if it was refused."""
        if isinstance(node, list):
            if step.isdecimal() and int(step) <= len(node):
                return int(step)
            self._refuse((*path, step), f"the list has {len(node)} items, numbered from 0")
            return None
        alike = [key for key in node if _normalized(key) == _normalized(step)]
        if len(alike) > 1:
            self._refuse((*path, step), f"may mean {' or '.join(alike)}")
            return None
        plain = path[2:] == ("headers",) and "_" not in step  # case does not matter in a header
        if not alike and not plain and path[:1] == ("upstreams",) and path[2:] in _VERBATIM:
            self._refuse((*path, step), f"a variable cannot spell a new key; set {path[2]} as a whole: {{..}} as JSON")
            return None
        return alike[0] if alike else step

    def _refuse(self, path: Path, text: str) -> None:
        self._tree.variables[path] = self._variable
        self._tree.reject(path, text)


def _normalized(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", name.lower())


def _empty_container(steps: tuple[str, ...], depth: int) -> dict[str, Any] | list[Any]:
    """The container to create for the step at `depth`: a list if the step is 0, except in `upstreams`, `models` and
    `auth.keys`, where 0 may be a name."""
    return [] if steps[depth] == "0" and depth > _LAST_NAME else {}


def _get(node: Any, key: str | int) -> Any:
    if isinstance(node, list):
        return node[int(key)] if int(key) < len(node) else None
    return node.get(key)


def _set(node: Any, key: str | int, value: Any) -> None:
    if isinstance(node, list) and key == len(node):
        node.append(value)
    else:
        node[key] = value
