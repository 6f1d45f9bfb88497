"""The example file loads as it is, and shows every setting."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from app.config import CacheSettings, ModelSettings, ServerSettings, Settings
from app.config.load import ConfigError, as_text, from_text, load
from app.upstreams import UPSTREAMS
from tests.config.kinds import nobody_listens

FILE = Path(__file__).parents[2] / "config.example.yaml"
TEXT = FILE.read_text(encoding="utf-8")
VARIABLES = dict.fromkeys(re.findall(r"[A-Z][A-Z_]+_KEY\b", TEXT.split("server:")[0]), "")
VARIABLES = {name: f"a-{name.lower()}" for name in VARIABLES}


def read(path: Path, variables: dict[str, str]) -> Settings:
    return load(str(path), variables, UPSTREAMS, listening=nobody_listens)


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every settings model within an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from sections(field.annotation)
    elif get_origin(annotation) in (Annotated, Union, types.UnionType, dict, tuple):
        for part in get_args(annotation):
            yield from sections(part)


MODELS = {model for root in (Settings, *(kind.settings for kind in UPSTREAMS.values())) for model in sections(root)}
FIELDS = sorted((model.__name__, name) for model in MODELS for name in model.model_fields)


def test_the_example_loads_with_the_variables_it_names() -> None:
    settings = read(FILE, VARIABLES)
    assert set(settings.upstreams) >= {"dashscope", "ds-compat", "baidu", "openai", "gemini", "ollama", "built-in"}
    assert settings.upstreams["dashscope"].api_key is not None
    assert settings.upstreams["dashscope"].api_key.get_secret_value() == "a-dashscope_api_key"


def test_settings_are_the_same_after_they_were_text(tmp_path: Path) -> None:
    """Workers get them from their parent as text."""
    settings = read(FILE, VARIABLES)
    assert from_text(as_text(settings), UPSTREAMS) == settings
    (tmp_path / "config.yaml").write_text("")
    assert from_text(as_text(read(tmp_path / "config.yaml", {})), UPSTREAMS) == read(tmp_path / "config.yaml", {})


def test_the_overrides_it_tells_of_are_taken() -> None:
    told = dict(re.findall(r"#   (EMBEDDING_GATEWAY__\w+)=('[^']*'|\S+)", TEXT))
    assert len(told) == 5
    for name, value in told.items():
        read(FILE, {**VARIABLES, name: value.strip("'")})


@pytest.mark.parametrize("variable", sorted(VARIABLES))
def test_the_example_needs_each_variable_it_names(variable: str) -> None:
    rest = {name: value for name, value in VARIABLES.items() if name != variable}
    with pytest.raises(ConfigError, match=f"variable {variable} is not set"):
        read(FILE, rest)


@pytest.mark.parametrize(("model", "field"), FIELDS)
def test_the_example_shows_every_setting(model: str, field: str) -> None:
    assert re.search(rf"(^|[\s#{{]){field}:", TEXT), f"{model}.{field} is not in config.example.yaml"


@pytest.mark.parametrize("name", UPSTREAMS)
def test_the_example_shows_every_upstream_type(name: str) -> None:
    assert re.search(rf"type: {name}\b", TEXT)


@pytest.mark.parametrize("section", ["server", "cache"])
def test_what_the_example_calls_the_value_without_it_is(section: str) -> None:
    shown = read(FILE, VARIABLES)
    default: BaseModel = ServerSettings() if section == "server" else CacheSettings()
    for field in type(default).model_fields:
        if (section, field) != ("cache", "disk"):
            assert getattr(getattr(shown, section), field) == getattr(default, field), field


def test_no_model_setting_was_forgotten_by_the_walk() -> None:
    assert ModelSettings in MODELS
    assert len(FIELDS) > 60


@pytest.mark.parametrize("block", ["redis", "baidu-iam", "qianfan"])
def test_what_is_commented_out_would_load_too(block: str, tmp_path: Path) -> None:
    text = re.sub(rf"(?m)^  # ({block}:.*)\n((?:  #   .*\n)+)", lambda m: _uncommented(m[0]), TEXT)
    assert text != TEXT
    names = {"BAIDU_ACCESS_KEY", "BAIDU_IAM_SECRET_KEY", "QIANFAN_API_KEY"}
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    settings = read(tmp_path / "config.yaml", VARIABLES | dict.fromkeys(names, "x"))
    assert block in settings.upstreams or settings.cache.redis is not None


def _uncommented(text: str) -> str:
    return re.sub(r"(?m)^  # ", "  ", text)


def test_the_example_is_plain_yaml() -> None:
    assert isinstance(yaml.safe_load(TEXT), dict)
