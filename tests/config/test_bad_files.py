"""Every file in `bad/` is refused with exactly the mistakes in its header (`#>`), with its environment (`# with`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.config.load import ConfigError, load
from tests.config.kinds import KINDS, nobody_listens

BAD = Path(__file__).parent / "bad"


def expected(text: str) -> list[str]:
    return [line.removeprefix("#> ") for line in text.splitlines() if line.startswith("#>")]


def variables(text: str) -> dict[str, str]:
    first = text.splitlines()[0]
    pairs = first.removeprefix("# with ").split() if first.startswith("# with ") else []
    return dict(pair.split("=", 1) for pair in pairs)


@pytest.mark.parametrize("file", sorted(path.name for path in BAD.glob("*.yaml")))
def test_a_bad_file_is_refused_with_one_readable_line_per_mistake(file: str) -> None:
    text = (BAD / file).read_text(encoding="utf-8")
    with pytest.raises(ConfigError) as refusal:
        load(file, variables(text), KINDS, cwd=BAD, listening=nobody_listens)
    assert refusal.value.mistakes == [f"{file}: {line}" for line in expected(text)]
    assert str(refusal.value) == "\n".join(refusal.value.mistakes)


@pytest.mark.parametrize("file", sorted(path.name for path in BAD.glob("*.yaml")))
def test_a_mistake_is_told_without_the_validators_jargon(file: str) -> None:
    lines = "\n".join(expected((BAD / file).read_text(encoding="utf-8"))).lower()
    assert lines
    for word in ("input should", "pydantic", "value error", "valid string", "valid integer", "traceback", "value-of-a"):
        assert word not in lines


def test_a_file_that_is_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: no such file$"):
        load("nowhere.yaml", {}, KINDS, cwd=tmp_path, listening=nobody_listens)
    with pytest.raises(ConfigError, match=r"^away/x\.yaml: no such file \(named by EMBEDDING_GATEWAY_CONFIG\)$"):
        load(None, {"EMBEDDING_GATEWAY_CONFIG": "away/x.yaml"}, KINDS, cwd=tmp_path, listening=nobody_listens)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"^config\.yaml: cannot be read: Is a directory$"):
        load(None, {}, KINDS, cwd=tmp_path, listening=nobody_listens)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"server: {host: '\xff\xfe'}", "is not UTF-8 text"),
        (b"server: {host: 'a\x01'}", "character 18 is one that YAML does not allow"),
        (b"a: " + b"[" * 2000, "is nested too deeply"),
        (b"server: {port: " + b"9" * 5000 + b"}", "holds a number that cannot be read"),
        (b"server: {port: 0b_}", "holds a number that cannot be read"),
        (b"server: {port: !!int ''}", "holds a number that cannot be read"),
        (b"server: {port: " + b"1:" * 200 + b"1.5}", "holds a number that cannot be read"),
        (b"server: {port: !!bool abc}", "holds a !!bool that is neither true nor false"),
        (b"server: {host: !!timestamp abc}", "line 1, column 16: a tag (!name) that is not allowed here"),
    ],
)
def test_what_is_hardly_yaml_is_one_line_too(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        load(None, {}, KINDS, cwd=tmp_path, listening=nobody_listens)
    assert refusal.value.mistakes == [f"config.yaml: {line}"]


@pytest.mark.parametrize("nothing", ["[]", "0", "false", "''"])
def test_what_is_no_mapping_is_not_taken_for_no_upstreams(tmp_path: Path, nothing: str) -> None:
    (tmp_path / "config.yaml").write_text(f"upstreams: {nothing}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^config\.yaml: upstreams: must be a mapping \(key: value\)$"):
        load(None, {}, KINDS, cwd=tmp_path, listening=nobody_listens)


def test_aliases_of_aliases_are_not_followed_without_end(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    (tmp_path / "config.yaml").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(ConfigError, match="holds more than 100000 values"):
        load(None, {}, KINDS, cwd=tmp_path, listening=nobody_listens)
