"""The architecture, enforced: imports run one way, and each foreign library has one door."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.upstreams import UPSTREAMS

APP = Path(__file__).parent.parent / "app"

RANKS = [
    {"errors", "catalog", "clock", "deadlines", "descriptors", "tasks", "data", ""},
    {"types"},
    {"vectors", "tokens", "limits", "config", "metrics", "logs"},
    {"upstreams", "cache"},
    {"pipeline"},
    {"registry"},
    {"gateway"},
    {"api"},
    {"http", "workers"},
    {"main"},
    {"serve", "check"},
    {"cli"},
    {"__main__"},
]
"""Rooms from the lowest rank to the highest; a room may import from itself and from lower ranks, not from its own."""

DOORS = {
    "fastapi": {"api"},
    "fastapi_offline": {"api"},
    "starlette": {"api"},
    "prometheus_client": {"metrics"},
    "redis": {"cache"},
    "aiohappyeyeballs": {"upstreams"},
    "httptools": {"upstreams"},
    "simdjson": {"upstreams"},
    "uvicorn": {"http", "serve"},
    "yaml": {"config"},
    "sqlite3": {"cache"},
    "cryptography": {"upstreams"},
    "tiktoken": {"tokens"},
}


def room(module: str) -> str:
    """The room of a module: `cache` for `app.cache.redis`."""
    return [*module.split("."), ""][1]


def rank(name: str) -> int:
    return next(i for i, rooms in enumerate(RANKS) if name in rooms)


def modules() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(APP.rglob("*.py")):
        parts = file.relative_to(APP.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(file.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out"
            for alias in node.names:
                yield f"{node.module}.{alias.name}" if node.module == "app" else str(node.module)


every_module = pytest.mark.parametrize(
    ("name", "tree"), list(modules()), ids=lambda value: value if isinstance(value, str) else ""
)


@every_module
def test_imports_run_one_way(name: str, tree: ast.Module) -> None:
    own = room(name)
    for target in imported(tree):
        if target.split(".")[0] != "app":
            continue
        other = room(target) if target != "app.__version__" else ""
        assert other == own or rank(other) < rank(own), f"{name} imports {target}"


def test_the_readmes_table_of_rooms_has_all_of_them_and_imports_run_up_it() -> None:
    """Rooms in one row have the same rank."""
    text = (APP.parent / "README.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"(?m)^\| (`app/.*?) \|", text)
    table = [re.findall(r"`app/(\w+)(?:\.py|/)`", cell) for cell in first_cells]
    places = {name: place for place, row in enumerate(table) for name in row}
    rooms = {room(name) for name, _ in modules()} - {"", "__main__", "data"}
    assert set(places) == rooms
    for name, tree in modules():
        for target in imported(tree):
            if room(name) in rooms and room(target) in rooms and target.startswith("app."):
                assert places[room(target)] <= places[room(name)], f"{name} imports {target}"


@every_module
def test_each_foreign_library_has_one_door(name: str, tree: ast.Module) -> None:
    for target in imported(tree):
        allowed = DOORS.get(target.split(".")[0])
        assert allowed is None or room(name) in allowed, f"{name} imports {target}"


@every_module
def test_no_code_outside_the_upstreams_and_the_catalogue_names_a_vendor(name: str, tree: ast.Module) -> None:
    if room(name) in {"upstreams", "catalog"}:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value.lower() not in UPSTREAMS, f"{name}:{node.lineno} says {node.value!r}"
        if isinstance(node, ast.Name | ast.Attribute):
            word = node.id if isinstance(node, ast.Name) else node.attr
            assert word.lower() not in UPSTREAMS, f"{name}:{node.lineno} says {word}"


@every_module
def test_no_module_says_global(name: str, tree: ast.Module) -> None:
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)], name


def test_a_file_is_short_enough_to_read() -> None:
    long = {file.name: lines for file in APP.rglob("*.py") if (lines := len(file.read_text().splitlines())) > 400}
    assert not long
