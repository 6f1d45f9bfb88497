"""README.md is true: its tables match the program, its examples print what they say, and its links lead somewhere.

A table that no longer matches fails with its missing and surplus rows; the model table with its new text.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel, create_model
from pydantic.fields import FieldInfo

from app import errors
from app.cache.counts import Counts
from app.catalog import ANY, CATALOG, FAMILIES, Model
from app.config import Settings
from app.config.settings import UpstreamSettings
from app.errors import GatewayError
from app.metrics import Metrics
from app.upstreams import UPSTREAMS
from tests.harness import Running, running

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = "http://127.0.0.1:8080"
"""The gateway's address in the examples."""


def section(title: str) -> str:
    """The text below a heading of the second level."""
    found = re.search(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT)
    assert found, f"README.md has no section {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row in the text, including heads and rules, without backquotes."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip().replace("`", "") for cell in line.strip().strip("|").split("|")] for line in lines]


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


# --- models -----------------------------------------------------------------------------------------


def model_table() -> str:
    """The text between the markers: the catalogue as Markdown. Models that differ only in dimensions share a row."""
    lines = [
        "| type/model, which is its vector space, and dimensions | inputs | tokens per input | roles | more |",
        "| --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, ...], list[str]] = {}
    for vendor, models in CATALOG.items():
        for model in models.values():
            revision = f"@{model.revision}" if model.revision else ""
            groups.setdefault(_facts(model), []).append(_linked(f"{vendor}/{model.name}{revision}", model))
    return "\n".join([*lines, *_grouped(groups), ""])


def family_table() -> str:
    """The open models as Markdown: those with the same prefixes and limit share a row."""
    lines = [
        "| model and dimensions | tokens per input | before a query | before a document |",
        "| --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, ...], list[str]] = {}
    for _, model in FAMILIES:
        told = [f"`{each}`" if each else "–" for each in (model.prefixes or ("", ""))]
        shared = (_facts(model)[1], *(each.replace("\n", "⏎").replace("|", r"\|") for each in told))
        groups.setdefault(shared, []).append(_linked(model.name, model))
    tasks = {model.instruction for _, model in FAMILIES if model.instruction}
    told_tasks = f"`{{instruct}}` is the caller's `instruct`, or `{'`, `'.join(tasks)}`."
    return "\n".join([*lines, *_grouped(groups), "", told_tasks, ""])


def _linked(name: str, model: Model) -> str:
    source = model.source if (ROOT / model.source).exists() else f"https://{model.source}"
    return f"[`{name}`]({source}) {_dimensions(model)}"


def _grouped(groups: Mapping[tuple[str, ...], list[str]]) -> list[str]:
    return [f"| {'<br>'.join(models)} | {' | '.join(shared)} |" for shared, models in groups.items()]


def test_the_table_of_open_models_is_the_catalogue() -> None:
    found = re.search(r"(?s)<!-- families -->\n(.*?)<!-- /families -->", TEXT)
    assert found, "README.md has lost its markers <!-- families --> and <!-- /families -->"
    expected = family_table()
    assert found[1] == expected, f"put this between the markers:\n\n{expected}"


def _facts(model: Model) -> tuple[str, ...]:
    return (
        f"{model.max_batch:,}",
        f"{model.max_tokens_per_input:,}" if model.max_tokens_per_input else "–",
        ", ".join(model.roles) + (", within the text" if model.prefixes else "") or "–",
        ", ".join(_more(model)) or "–",
    )


def _dimensions(model: Model) -> str:
    usual = f"**{model.dimensions}**" if model.dimensions else "by size"
    choices = model.dimension_choices if model.matryoshka_dimensions is None else model.matryoshka_dimensions
    if choices is None:
        return usual
    if choices == ANY:
        return f"{usual} or fewer"
    return ", ".join(usual if each == model.dimensions else str(each) for each in choices)


def _more(model: Model) -> list[str]:
    told = (
        (model.instruct, "takes instructions"),
        (model.sparse, "sparse vectors too"),
        (model.images, f"images, {model.images} a call"),
        (model.videos, f"videos, {model.videos} a call"),
        (model.max_image_bytes, f"{(model.max_image_bytes or 0) // 2**20} MiB an image"),
        (model.cuts_silently, "may cut long inputs itself"),
        (model.counted_by == "han+words", "tokens are Han characters + 1.3 × words"),
        (model.max_characters_per_input, f"{model.max_characters_per_input or 0:,} characters per input"),
        (model.max_tokens_per_batch, f"{model.max_tokens_per_batch or 0:,} tokens per call"),
        (
            model.price_per_million_tokens,
            f"{model.price_per_million_tokens or 0:g} {model.currency} per million tokens",
        ),
    )
    return [text for holds, text in told if holds]


def test_the_model_table_is_the_catalogue() -> None:
    found = re.search(r"(?s)<!-- models -->\n(.*?)<!-- /models -->", TEXT)
    assert found, "README.md has lost its markers <!-- models --> and <!-- /models -->"
    expected = model_table()
    assert found[1] == expected, f"put this between the markers:\n\n{expected}"


# --- configuration ----------------------------------------------------------------------------------


def leaves(annotation: Any, field: FieldInfo | None, path: str) -> Iterator[tuple[str, FieldInfo]]:
    """Every setting within an annotation that is a value rather than a section, as `section.<name>.setting`."""
    inner = [part for part in _parts(annotation) if _is_section(part)]
    if not inner:
        assert field is not None
        yield path, field
        return
    origins = [get_origin(part) for part in _parts(annotation)]
    step = ".<name>" if dict in origins else "[]" if tuple in origins else ""
    for model in inner:
        for name, each in model.model_fields.items():
            yield from leaves(each.annotation, each, f"{path}{step}.{name}".lstrip("."))


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    if get_origin(annotation) in (Annotated, Union, types.UnionType, dict, tuple):
        for part in get_args(annotation):
            yield from _parts(part)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def settings() -> dict[str, FieldInfo]:
    """Every setting by its name in the README; those of one upstream type as `type: setting`."""
    found = dict(leaves(Settings, None, ""))
    common = UpstreamSettings.model_fields
    for kind in UPSTREAMS.values():
        for name, field in kind.settings.model_fields.items():
            own = name not in common or field.default != common[name].default
            if own and name not in ("type", "base_url"):
                found[f"{kind.name}: {name}"] = field
    return found


SETTINGS = settings()
DOCUMENTED = {row[0]: row[1] for row in rows(section("Configuration")) if row[0] not in ("setting", "---")}


def test_the_configuration_tables_name_every_setting_and_no_other() -> None:
    assert len(SETTINGS) > 50
    assert sorted(DOCUMENTED) == sorted(SETTINGS)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_default_shown_is_the_default(name: str) -> None:
    field, shown = SETTINGS[name], DOCUMENTED[name]
    if name == "upstreams.<name>.base_url":
        assert shown == "by type"
    elif field.is_required():
        assert shown == "required"
    else:
        assert field.annotation is not None
        read = None if shown == "–" else yaml.safe_load(shown)
        one: Any = create_model("One", value=(field.annotation, field))
        assert one.model_validate({"value": read}).value == field.default


def test_the_upstream_table_has_every_type_and_the_variables_that_switch_it_on() -> None:
    table = {row[0]: row for row in rows(section("Upstreams")) if row[0] not in ("type", "---")}
    assert set(table) == set(UPSTREAMS)
    for name, row in table.items():
        variables = dict.fromkeys(re.findall(r"[A-Z]+(?:_[A-Z]+)+", row[3]), "some-value")
        assert bool(variables) == (UPSTREAMS[name].environment(variables) is not None), name


# --- errors and metrics -----------------------------------------------------------------------------


def test_the_error_table_has_every_class_of_the_tree() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, GatewayError)]
    expected = {(str(each.status), each.type, each.code) for each in classes}
    shown = {(row[0], row[1], row[2]) for row in rows(section("Errors")) if row[0].isdigit()}
    assert expected <= shown, f"missing: {sorted(expected - shown)}"
    # The others are codes that an instance has instead of its class's.
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "app").rglob("*.py"))
    for status, kind, code in shown - expected:
        assert f'"{code}"' in source, f"no error has the code {code}"
        assert (status, kind) in {(told[0], told[1]) for told in expected}


def test_the_metrics_table_has_every_metric_with_its_labels() -> None:
    collectors = Metrics().registry._collector_to_names  # there is no public attribute
    expected = {_described(each) for each in collectors if isinstance(each, MetricWrapperBase)}
    table = [row for row in rows(section("Metrics and logs")) if row[0] not in ("metric", "---")]
    shown = {(row[0], row[1], frozenset(filter(None, row[2].split(", ")))) for row in table}
    assert shown == expected


def test_the_metrics_table_has_every_result_of_a_cache_tier() -> None:
    metrics = Metrics()
    Counts(metrics, "redis")
    (row,) = [row for row in rows(section("Metrics and logs")) if row[0] == "cache_operations_total"]
    (family,) = [each for each in metrics.registry.collect() if each.name == "embedding_gateway_cache_operations"]
    told = {sample.labels[label] for sample in family.samples for label in ("operation", "result")}
    assert told <= set(re.findall(r"[a-z]+", row[3]))


def _described(metric: MetricWrapperBase) -> tuple[str, str, frozenset[str]]:
    family = next(iter(metric.describe()))
    name = family.name.removeprefix("embedding_gateway_")
    labels = frozenset(metric._labelnames)  # there is no public attribute
    return name + ("_total" if family.type == "counter" else ""), family.type, labels


# --- examples ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with running({"upstreams": {"lexical": {"type": "lexical"}}}) as gateway:
        yield gateway


def python_example(library: str) -> str:
    return next(block for block in blocks("python") if library in block)


def printed(code: str) -> list[str]:
    """What an example claims to print, in comments at the ends of its lines."""
    return re.findall(r"(?m)  (?:#|//) (.*)$", code)


def output(code: str, gateway: Running) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code.replace(SHOWN, gateway.url), {})
    return out.getvalue().splitlines()


def test_curl_prints_what_is_shown(gateway: Running) -> None:
    command = next(block for block in blocks("sh") if block.startswith("curl"))
    found = re.fullmatch(rf"curl -s {SHOWN}(\S+) -d '(.*)'\n", command)
    assert found
    answer = gateway.post(found[2].encode(), path=found[1]).text
    start, end = blocks("json")[0].rstrip().split("…")
    assert answer.startswith(start)
    assert answer.endswith(end)


def test_the_openai_example_prints_what_it_says(gateway: Running) -> None:
    code = python_example("from openai")
    assert output(code, gateway) == printed(code)


def test_the_langchain_example_prints_what_it_says(gateway: Running) -> None:
    """It runs unchanged, and so without a download: LangChain's tokeniser needs one, which tests/clients provides."""
    code = python_example("langchain")
    assert output(code, gateway) == printed(code)


def test_the_node_example_prints_what_it_says(gateway: Running) -> None:
    folder = ROOT / "tests" / "clients" / "node"
    node = shutil.which("node")
    if not node or not (folder / "node_modules" / "openai").is_dir():
        pytest.skip("node or OpenAI's SDK for it is not installed; tests/clients installs the SDK where node is")
    code = blocks("js")[0]
    command = [node, "--input-type=module", "--eval", code.replace(SHOWN, gateway.url)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == printed(code)


def test_the_mistakes_shown_are_what_is_said(tmp_path: Path) -> None:
    from app.config.load import ConfigError, load

    (tmp_path / "bad.yaml").write_text("server: {prot: 1}\ncache: {redis: {}}\n")
    with pytest.raises(ConfigError) as raised:
        load("bad.yaml", {}, UPSTREAMS, cwd=tmp_path, listening=lambda *_: False)
    assert sorted(raised.value.mistakes) == sorted(blocks("text", section("Configuration"))[0].splitlines())


def test_the_yaml_shown_loads() -> None:
    from tests.harness import settings_of

    for block in blocks("yaml"):
        variables: Mapping[str, str] = dict.fromkeys(re.findall(r"\$\{(\w+)\}", block), "a-key")
        assert settings_of(yaml.safe_load(block), variables).models


@pytest.mark.parametrize("path", re.findall(r"`(?:GET )?(/[a-z0-9/._]+)`", section("HTTP")))
def test_every_route_named_is_there(path: str, gateway: Running) -> None:
    response = gateway.get(path)
    if "embeddings" in path:
        assert response.status_code == 405
    else:
        assert response.status_code == 200


# --- the rest ---------------------------------------------------------------------------------------


def test_every_make_target_named_exists() -> None:
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)(?=[`\s])", "".join(re.findall(r"`[^`]+`|```.*?```", TEXT, re.S))))
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert {"run", "test", "lint"} <= named <= targets


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)\s]+)\)", TEXT))))
def test_every_link_leads_somewhere(target: str) -> None:
    if target.startswith("#"):
        titles = re.findall(r"(?m)^#+ (.*)$", TEXT)
        assert target[1:] in {title.lower().replace(" ", "-") for title in titles}
    elif "://" not in target:
        assert (ROOT / target.split("#")[0]).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:app|tests|deploy)/[\w/.]*)`", TEXT))))
def test_every_path_named_is_there(path: str) -> None:
    assert "name" in path or (ROOT / path).exists()
