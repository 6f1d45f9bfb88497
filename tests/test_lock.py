"""The lock files determine what is installed: pinned by version and hash, and free of known vulnerabilities."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOCKS = ("requirements.lock", "requirements-dev.lock")

SAFE = {
    "starlette": ("1.3.1", "CVE-2026-48710 (Host), CVE-2026-54283 (forms)"),
    "h11": ("0.16", "CVE-2025-43859"),
    "redis": ("4.5.5", "CVE-2023-28859"),
}
"""Package -> the first version without what was found in it, and that. `.ci/audit` asks for others, where it can."""


def pinned(lock: str) -> dict[str, str]:
    """Name -> version; every line of the file must be a requirement with its hashes."""
    found: dict[str, str] = {}
    for requirement in (ROOT / lock).read_text().replace("\\\n", " ").splitlines():
        match = re.fullmatch(r"([a-z0-9._-]+)==(\S+)(?: ; [^-]+?)?(?:\s+--hash=sha256:[0-9a-f]{64})+\s*", requirement)
        assert match, requirement[:100]
        found[match[1]] = match[2]
    return found


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_is_pinned_by_version_and_hash(lock: str) -> None:
    assert len(pinned(lock)) > 20


def test_development_has_everything_the_program_has_in_the_same_version() -> None:
    program, development = map(pinned, LOCKS)
    assert program.items() <= development.items()


@pytest.mark.parametrize("lock", LOCKS)
def test_no_pin_is_below_what_is_known_to_be_safe(lock: str) -> None:
    held = pinned(lock)
    for name, (least, why) in SAFE.items():
        if name in held:
            assert numbers(held[name]) >= numbers(least), why


def test_what_is_installed_is_what_is_locked() -> None:
    for name in ("fastapi", "starlette", "uvicorn", "httpx", "redis", "orjson", "cryptography"):
        assert version(name) == pinned("requirements.lock")[name]
