"""Validates a tree and builds the settings: each section against its model, each upstream against its type's model,
then the rules across sections.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, cast

from pydantic import ValidationError

from app.catalog import UNSERVED
from app.config.explain import did_you_mean, explain
from app.config.kind import UpstreamKind
from app.config.settings import CAPABILITIES, DeploymentSettings, ModelSettings, Settings, UpstreamSettings
from app.config.tree import Path, Tree, dotted

_MAPPING = "must be a mapping (key: value)"


def validate(tree: Tree, kinds: Mapping[str, UpstreamKind]) -> Settings | None:
    """The settings, or None with all mistakes noted in the tree.

    The cross-section rules are checked without the parts that have mistakes, so that one mistake hides no other.
    """
    values = copy.deepcopy(tree.values)
    values["upstreams"] = _upstreams(tree, kinds)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        for mistake in explain(error, Settings, ()):
            tree.note(mistake)
        settings = _valid_part(values, error)
    _check_rules(settings, tree, kinds)
    return None if tree.mistakes else settings


def _upstreams(tree: Tree, kinds: Mapping[str, UpstreamKind]) -> dict[str, UpstreamSettings]:
    entries = tree.values["upstreams"]
    if not isinstance(entries, dict):
        tree.reject(("upstreams",), _MAPPING)
        return {}
    checked = {name: _upstream(("upstreams", name), entry, tree, kinds) for name, entry in entries.items()}
    return {name: settings for name, settings in checked.items() if settings is not None}


def _upstream(path: Path, entry: Any, tree: Tree, kinds: Mapping[str, UpstreamKind]) -> UpstreamSettings | None:
    choices = f"one of {', '.join(sorted(kinds))}"
    if not isinstance(entry, dict):
        tree.reject(path, _MAPPING)
    elif "type" not in entry:
        tree.reject((*path, "type"), f"missing; set it to {choices}")
    elif not isinstance(entry["type"], str):
        tree.reject((*path, "type"), f"must be {choices}")
    elif entry["type"] not in kinds:
        tree.reject((*path, "type"), f'unknown type "{tree.shown((*path, "type"), entry["type"])}"; {choices}')
    else:
        kind = kinds[entry["type"]]
        try:
            return kind.settings.model_validate(entry)
        except ValidationError as error:
            for mistake in explain(error, kind.settings, path):
                tree.note(mistake)
    return None


def _valid_part(values: dict[str, Any], error: ValidationError) -> Settings:
    """The settings without the parts that have mistakes. Each round removes at least one more."""
    for owner, key in [_innermost(values, details["loc"]) for details in error.errors()]:
        owner.pop(key, None)
    try:
        return Settings.model_validate(values)
    except ValidationError as remaining:
        return _valid_part(values, remaining)


def _innermost(values: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """The last mapping key on the path that exists, and its owner. Never a list item: removing one would renumber the
    others."""
    owner, key, node = values, str(path[0]), cast("Any", values)
    for step in path:
        if isinstance(node, dict) and step in node:
            owner, key, node = node, str(step), node[step]
        elif isinstance(node, list) and isinstance(step, int) and step < len(node):
            node = node[step]
        else:
            break
    return owner, key


# --- rules across sections --------------------------------------------------------------------------


def _check_rules(settings: Settings, tree: Tree, kinds: Mapping[str, UpstreamKind]) -> None:
    _check_caller_keys(settings, tree)
    _check_model_names(settings, tree)
    _check_space_names(settings, tree)
    for name, model in settings.models.items():
        _check_deployments(("models", name, "deployments"), model, tree)
        _check_single_space(("models", name, "deployments"), settings, model, tree, kinds)
        _check_capabilities(("models", name), settings, model, tree, kinds)


def _check_caller_keys(settings: Settings, tree: Tree) -> None:
    seen: dict[bytes, str] = {}
    for name, key in settings.auth.keys.items() if settings.auth else ():
        if name == "anonymous":
            tree.reject(("auth", "keys", name), "is the name of callers without a key; choose another one")
        first = seen.setdefault(key.digest(), name)
        if first != name:
            tree.reject(("auth", "keys", name), f"has the same key as {dotted(('auth', 'keys', first))}")


def _check_model_names(settings: Settings, tree: Tree) -> None:
    """Each public name has one meaning, and `upstream/model` always means that upstream's own model."""
    taken = {name: ("models", name) for name in _names(tree, "models")}
    for name, model in settings.models.items():
        _check_upstream_prefix(("models", name), name, tree)
        for index, alias in enumerate(model.aliases):
            path: Path = ("models", name, "aliases", index)
            first = taken.setdefault(alias, ("models", name))
            if first != ("models", name) or alias in settings.models or alias in model.aliases[:index]:
                tree.reject(path, f"{tree.shown(path, alias)} is a name or alias of {dotted(first)} already")
            _check_upstream_prefix(path, alias, tree)


def _names(tree: Tree, section: str) -> Collection[str]:
    """All names in a section, including those of entries with mistakes."""
    entries = tree.values.get(section)
    return entries if isinstance(entries, dict) else ()


def _check_upstream_prefix(path: Path, name: str, tree: Tree) -> None:
    upstream, slash, _ = name.partition("/")
    if slash and upstream in _names(tree, "upstreams"):
        tree.reject(path, f"begins with upstream {upstream}'s name; {upstream}/... always means its own models")


def _check_space_names(settings: Settings, tree: Tree) -> None:
    """A named space belongs to one set of deployments: otherwise vectors of two models would share cache keys."""
    taken: dict[str, tuple[str, set[tuple[str, str]]]] = {}
    for name, model in settings.models.items():
        served = {(each.upstream, each.model) for each in model.deployments}
        for index, deployment in enumerate(model.deployments):
            if deployment.space is None:
                continue
            first, owners = taken.setdefault(deployment.space, (name, served))
            if owners != served:
                path: Path = ("models", name, "deployments", index, "space")
                shown = tree.shown(path, deployment.space)
                tree.reject(path, f"{shown} is {dotted(('models', first))}'s, which has other deployments")


def _check_deployments(path: Path, model: ModelSettings, tree: Tree) -> None:
    names = _names(tree, "upstreams")
    seen: set[tuple[str, str]] = set()
    for index, deployment in enumerate(model.deployments):
        upstream_path = (*path, index, "upstream")
        if names and deployment.upstream not in names:
            shown = tree.shown(upstream_path, deployment.upstream)
            tree.reject(upstream_path, f'no upstream "{shown}"{did_you_mean(shown, names)}')
        elif (deployment.upstream, deployment.model) in seen:
            tree.reject((*path, index), "the same upstream and model as a deployment above")
        seen.add((deployment.upstream, deployment.model))


def _check_single_space(
    path: Path, settings: Settings, model: ModelSettings, tree: Tree, kinds: Mapping[str, UpstreamKind]
) -> None:
    spaces: dict[str, str] = {}
    for index, deployment in enumerate(model.deployments):
        upstream = settings.upstreams.get(deployment.upstream)
        if upstream is not None:
            kind = kinds[upstream.type]
            shown = deployment.model_copy(
                update={
                    "model": tree.shown((*path, index, "model"), deployment.model),
                    "space": deployment.space and tree.shown((*path, index, "space"), deployment.space),
                }
            )
            spaces[_space(kind, upstream, deployment)] = _space(kind, upstream, shown)
    if len(spaces) > 1:
        listed = ", ".join(spaces.values())
        advice = "if they do give equal vectors, set the same space on each"
        tree.reject(path, f"different vector spaces ({listed}); deployments of one model must share one; {advice}")


def _space(kind: UpstreamKind, settings: UpstreamSettings, deployment: DeploymentSettings) -> str:
    """Two deployments give comparable vectors if and only if their spaces are equal."""
    if deployment.space is not None:
        return deployment.space
    return kind.facts(settings, deployment.model).space(kind.name)


def _check_capabilities(
    path: Path, settings: Settings, model: ModelSettings, tree: Tree, kinds: Mapping[str, UpstreamKind]
) -> None:
    """Some upstream of the model must be able to express each capability that the operator claims for it. A built-in
    upstream must have the model, and the gateway must be able to serve it."""
    expressible: set[str] = set()
    for index, deployment in enumerate(model.deployments):
        upstream = settings.upstreams.get(deployment.upstream)
        if upstream is None:
            return
        kind = kinds[upstream.type]
        listed, known = kind.models(upstream), kind.facts(upstream, deployment.model)
        expressible |= kind.adapter(upstream).capabilities | {
            capability for capability in CAPABILITIES if getattr(known, capability)
        }
        if kind.built_in and deployment.model not in listed:
            tree.reject((*path, "deployments", index, "model"), f"must be one of {', '.join(listed)}")
        if instead := UNSERVED.get(kind.name, {}).get(deployment.model):
            tree.reject((*path, "deployments", index, "model"), instead)
    for capability in CAPABILITIES:
        if getattr(model, capability) and capability not in expressible:
            tree.reject((*path, capability), "no upstream of this model can express it; leave it out")
