"""Parses a YAML file's text into plain data: safe, strict about keys, `${VAR}` substituted. Knows no settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from app.config.tree import Path, Tree, dotted

_MAX_VALUES = 100_000
_NAME_FREE = {
    "undefined alias": "an alias (*name) that is not defined; a value that begins with * must be in quotes",
    "duplicate anchor": "an anchor (&name) that is already defined; a value that begins with & must be in quotes",
    "tag handle": "a tag (!name) that is not allowed here",
    "determine a constructor": "a tag (!name) that is not allowed here",
}
"""Parser messages that quote a name from the file, which may be an unquoted API key, and our wording without it."""
_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}|\$\{")


class _Loader(yaml.SafeLoader):
    """YAML's safe subset without dates: a model called 2024-05-01 is text."""


_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag != "tag:yaml.org,2002:timestamp"
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str, environ: Mapping[str, str], tree: Tree) -> None:
    """Fills the tree with values and mistakes. Text that is not valid YAML leaves it without values."""
    try:
        values = _parse(text, tree)
    except (yaml.YAMLError, ValueError, LookupError, OverflowError, RecursionError) as error:
        tree.reject((), _syntax_message(error, text.splitlines()))
        return
    if isinstance(values, dict):
        tree.values = _Substitution(environ, tree).substitute(values, ())
    elif values is not None:
        tree.reject((), "must be a mapping: lines of `key: value`")


def _parse(text: str, tree: Tree) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _reject_duplicate_keys(node, (), tree, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _syntax_message(error: Exception, lines: list[str]) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        line, column = error.problem_mark.line, error.problem_mark.column
        unquoted = line < len(lines) and "${" in lines[line]
        hint = "; inside [..] and {..} a ${VAR} must be in quotes" if unquoted else ""
        return f"line {line + 1}, column {column + 1}: {_parser_message(error)}{hint}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"character {error.position + 1} is one that YAML does not allow"
    if isinstance(error, KeyError):
        return "holds a !!bool that is neither true nor false"
    return "is nested too deeply" if isinstance(error, RecursionError) else "holds a number that cannot be read"


def _parser_message(error: yaml.MarkedYAMLError) -> str:
    problem, context = error.problem or "not YAML", error.context or ""
    if "'\\t'" in problem:
        return "a tab; indent with spaces"
    for theirs, ours in _NAME_FREE.items():
        if theirs in problem or theirs in context:
            return ours
    if problem.startswith("but "):
        return f"{context}, {problem}"
    start, found = error.context_mark, error.problem_mark
    since = f" from line {start.line + 1}" if start and found and start.line < found.line else ""
    return f"{problem} {context}{since}".rstrip()


def _reject_duplicate_keys(node: yaml.Node, path: Path, tree: Tree, open_nodes: dict[yaml.Node, bool]) -> None:
    """Names both lines of a duplicate key, of which YAML silently keeps the last. Raises for a node that contains
    itself."""
    if node in open_nodes:
        if open_nodes[node]:
            raise yaml.constructor.ConstructorError(None, None, f"{dotted(path)} contains itself", node.start_mark)
        return
    open_nodes[node] = True
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _reject_duplicate_keys(item, (*path, index), tree, open_nodes)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines and key.tag != "tag:yaml.org,2002:merge":
                tree.reject((*path, name), f"given twice, in lines {lines[name]} and {line}")
            lines.setdefault(name, line)
            _reject_duplicate_keys(value, (*path, name), tree, open_nodes)
    open_nodes[node] = False


class _Substitution:
    """Copies plain data, substituting references to variables. Text whose variable is not set stays as it is."""

    def __init__(self, environ: Mapping[str, str], tree: Tree) -> None:
        self._environ = environ
        self._tree = tree
        self._count = 0

    def substitute(self, value: Any, path: Path) -> Any:
        self._count += 1
        if self._count > _MAX_VALUES:  # a few aliases of aliases make millions
            return self._tree.reject(path[:1], f"holds more than {_MAX_VALUES} values")
        if isinstance(value, dict):
            return {key: self.substitute(item, (*path, key)) for key, item in value.items() if self._is_text(key, path)}
        if isinstance(value, list):
            return [self.substitute(item, (*path, index)) for index, item in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            return self._substitute_text(value, path)
        return value

    def _is_text(self, key: object, path: Path) -> bool:
        if not isinstance(key, str):
            self._tree.reject((*path, str(key)), "a key must be text; put it in quotes")
        return isinstance(key, str)

    def _substitute_text(self, text: str, path: Path) -> str | None:
        names: list[str] = []
        missing: list[str] = []
        malformed = False

        def value_of(match: re.Match[str]) -> str:
            nonlocal malformed
            name, default = match[1], match[2]
            if name is None:
                malformed = malformed or match[0] == "${"
                return "${"
            names.append(name)
            value = self._environ.get(name) or default
            if value is None:
                missing.append(name)
            return value or ""

        replaced = _REFERENCE.sub(value_of, text)
        if malformed:
            self._tree.reject(
                path, "a '${' that is not a reference; write ${NAME}, ${NAME:-default}, or $${ for a plain ${"
            )
        elif missing:
            self._tree.reject(path, _unset(missing))
        if names:
            self._tree.written[path] = text
        if malformed or missing:
            self._tree.unfilled.add(path)
            return text
        return None if replaced == "null" and text.endswith(":-null}") else replaced


def _unset(names: list[str]) -> str:
    listed = list(dict.fromkeys(names))
    if len(listed) == 1:
        return f"the environment variable {listed[0]} is not set or empty"
    return f"the environment variables {', '.join(listed)} are not set or empty"
