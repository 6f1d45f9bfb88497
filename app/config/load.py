"""Loads the settings from YAML and environment: finds the file, substitutes variables, applies overrides, validates,
and reports all mistakes at once.

The order of `load` is the order of precedence, lowest first: file or vendor variables, then `EMBEDDING_GATEWAY__…`.
Touches only the file, the one that SSL_CERT_FILE names and, if no upstreams are named, the default ports of upstream
types.
"""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from app.config.check import validate
from app.config.environ import Listening, apply_overrides, built_in_upstreams, environment_upstreams
from app.config.file import read_yaml
from app.config.kind import UpstreamKind
from app.config.settings import Settings
from app.config.tree import Tree

VARIABLE = "EMBEDDING_GATEWAY_CONFIG"
DEFAULT_FILE = "config.yaml"
ENVIRONMENT = "environment"
"""What mistakes are said to be in if there is no file."""


class ConfigError(Exception):
    """The configuration cannot be used. `mistakes` has one readable line per mistake; no line holds a secret, or the
    value of a variable."""

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


class UnreadableFile(ConfigError):
    """The system could not read the file just now, and may be able to later without the file having changed."""


def listens(host: str, port: int) -> bool:
    """Whether something accepts connections there. Takes at most a fifth of a second."""
    try:
        with socket.create_connection((host, port), timeout=0.2):
            return True
    except OSError:
        return False


def load(
    path: str | None,
    environ: Mapping[str, str],
    kinds: Mapping[str, UpstreamKind],
    *,
    cwd: Path | None = None,
    listening: Listening = listens,
) -> Settings:
    """The settings from the file at `path` (`--config`), else from the file that `find_file` finds, else from the
    environment alone.

    Raises `ConfigError`. An empty environment variable counts as unset.
    """
    return load_with_origin(path, environ, kinds, cwd=cwd or Path(), listening=listening)[0]


def load_with_origin(
    path: str | None,
    environ: Mapping[str, str],
    kinds: Mapping[str, UpstreamKind],
    *,
    cwd: Path,
    listening: Listening = listens,
    may_be_empty: bool = True,
) -> tuple[Settings, bool]:
    """The settings as from `load`, and whether they came from a file that was not empty. Unless the file
    `may_be_empty`, also raises `ConfigError` if it is."""
    environ = {name: value for name, value in environ.items() if value}
    file = find_file(path, environ, cwd)
    tree = Tree(label=file or ENVIRONMENT)
    if file is not None:
        named = f" (named by {VARIABLE})" if file == environ.get(VARIABLE) else ""
        _read_file(cwd / file, environ, tree, named)
        if not (may_be_empty or tree.values or tree.mistakes):
            tree.reject((), "is empty")
    elif "REDIS_URL" in environ:
        tree.values["cache"] = {"redis": {"url": environ["REDIS_URL"]}}
        tree.variables["cache", "redis"] = "REDIS_URL"
    certificates = _certificate_mistakes(environ)
    from_file = file is not None and bool(tree.values)
    # A file that cannot be read is one mistake; any other would only follow from its missing content.
    if not any(mistake.path == () for mistake in tree.mistakes):
        settings = _complete(tree, environ, kinds, listening)
        if settings is not None and not certificates:
            return settings, from_file
    raise ConfigError([*tree.lines(), *certificates])


def as_text(settings: Settings) -> str:
    """The settings as text for another process, secrets included; `from_text` is the inverse."""
    values = settings.model_dump(exclude_unset=True, serialize_as_any=True)
    return json.dumps(values, default=SecretStr.get_secret_value)


def from_text(text: str, kinds: Mapping[str, UpstreamKind]) -> Settings:
    """The settings that the same program passed to `as_text`."""
    tree = Tree(label="parent", values=json.loads(text))
    settings = validate(tree, kinds)
    if settings is None:
        raise ConfigError(tree.lines())
    return settings


def find_file(path: str | None, environ: Mapping[str, str], cwd: Path) -> str | None:
    """The configuration file, as it was named; None if there is none. A file named explicitly need not exist."""
    return path or environ.get(VARIABLE) or (DEFAULT_FILE if _exists(cwd / DEFAULT_FILE) else None)


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # in a directory this user may not search
        return False


def _read_file(file: Path, environ: Mapping[str, str], tree: Tree, named: str) -> None:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        tree.reject((), f"no such file{named}")
    except OSError as error:
        tree.reject((), f"cannot be read: {error.strerror}")
        if not isinstance(error, PermissionError | IsADirectoryError):  # mending those changes the file
            raise UnreadableFile(tree.lines()) from error
    except UnicodeDecodeError:
        tree.reject((), "is not UTF-8 text")
    else:
        read_yaml(text, environ, tree)


def _certificate_mistakes(environ: Mapping[str, str]) -> list[str]:
    """What is wrong with the trusted certificates' file. OpenSSL would ignore it and refuse every upstream instead."""
    if file := environ.get("SSL_CERT_FILE"):
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
        except ssl.SSLError:
            return ["SSL_CERT_FILE: holds no certificate in PEM format"]
        except OSError as error:
            return [f"SSL_CERT_FILE: cannot be read: {error.strerror}"]
    return []


def _complete(
    tree: Tree, environ: Mapping[str, str], kinds: Mapping[str, UpstreamKind], listening: Listening
) -> Settings | None:
    values = tree.values
    _drop_empty(values)
    if "auth" in values and values["auth"] is None:
        tree.reject(("auth",), "is empty; add keys, or leave it out to serve anybody")
    if values.get("upstreams") in (None, {}):
        values["upstreams"] = environment_upstreams(environ, kinds, listening)
        tree.variables |= {("upstreams", name): "environment" for name in values["upstreams"]}
    apply_overrides(environ, tree)
    _drop_empty(values)
    if values.get("upstreams") in (None, {}):
        values["upstreams"] = built_in_upstreams(kinds)
    return validate(tree, kinds)


def _drop_empty(values: dict[str, Any]) -> None:
    """Drops empty sections: `cache:` with every line below it commented out counts as absent. An empty `auth:` is
    refused instead."""
    for section in ("server", "cache", "upstreams", "models"):
        if section in values and values[section] is None:
            del values[section]
