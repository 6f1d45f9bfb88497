"""The tree to settings: every section against its model, every upstream against its type's,
then what must fit together.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, cast

from pydantic import ValidationError

from app.config.explain import did_you_mean, explain
from app.config.kind import UpstreamKind
from app.config.settings import CAPABILITIES, DeploymentSettings, ModelSettings, Settings, UpstreamSettings
from app.config.tree import Path, Tree, dotted

_MAPPING = "must be a mapping (key: value)"


def validate(tree: Tree, kinds: Mapping[str, UpstreamKind]) -> Settings | None:
    """The settings, or None with all that stands against them noted in the tree.

    What has a mistake is left out and the rest looked at as a whole, so that one mistake hides no other.
    """
    values = copy.deepcopy(tree.values)
    values["upstreams"] = _upstreams(tree, kinds)
    try:
        sound = Settings.model_validate(values)
    except ValidationError as error:
        for mistake in explain(error, Settings, ()):
            tree.note(mistake)
        sound = _sound_part(values, error)
    _hold_to_rules(sound, tree, kinds)
    return None if tree.mistakes else sound


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


def _sound_part(values: dict[str, Any], error: ValidationError) -> Settings:
    """The settings without what has mistakes. Every round leaves out something more."""
    for owner, key in [_innermost(values, details["loc"]) for details in error.errors()]:
        owner.pop(key, None)
    try:
        return Settings.model_validate(values)
    except ValidationError as remaining:
        return _sound_part(values, remaining)


def _innermost(values: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """The last key on the path that is there, and its owner. No list's item: without it the others' numbers change."""
    owner, key, place = values, str(path[0]), cast("Any", values)
    for step in path:
        if isinstance(place, dict) and step in place:
            owner, key, place = place, str(step), place[step]
        elif isinstance(place, list) and isinstance(step, int) and step < len(place):
            place = place[step]
        else:
            break
    return owner, key


# --- what must fit together -------------------------------------------------------------------------


def _hold_to_rules(settings: Settings, tree: Tree, kinds: Mapping[str, UpstreamKind]) -> None:
    _callers_differ(settings, tree)
    _names_differ(settings, tree)
    _spaces_differ(settings, tree)
    for name, model in settings.models.items():
        _deployments_exist(("models", name, "deployments"), model, tree)
        _one_space(("models", name, "deployments"), settings, model, tree, kinds)
        _can_be_told(("models", name), settings, model, tree, kinds)


def _callers_differ(settings: Settings, tree: Tree) -> None:
    seen: dict[bytes, str] = {}
    for name, key in settings.auth.keys.items() if settings.auth else ():
        if name == "anonymous":
            tree.reject(("auth", "keys", name), "is what callers without a key are counted as; choose another name")
        first = seen.setdefault(key.digest(), name)
        if first != name:
            tree.reject(("auth", "keys", name), f"has the same key as {dotted(('auth', 'keys', first))}")


def _names_differ(settings: Settings, tree: Tree) -> None:
    """Every public name means one thing, and `upstream/model` always that upstream's own model."""
    taken = {name: ("models", name) for name in _names(tree, "models")}
    for name, model in settings.models.items():
        _means_an_upstream(("models", name), name, tree)
        for index, alias in enumerate(model.aliases):
            path: Path = ("models", name, "aliases", index)
            first = taken.setdefault(alias, ("models", name))
            if first != ("models", name) or alias in settings.models or alias in model.aliases[:index]:
                tree.reject(path, f"{tree.shown(path, alias)} is a name or alias of {dotted(first)} already")
            _means_an_upstream(path, alias, tree)


def _names(tree: Tree, section: str) -> Collection[str]:
    """All names of a section, of entries with mistakes too."""
    entries = tree.values.get(section)
    return entries if isinstance(entries, dict) else ()


def _means_an_upstream(path: Path, name: str, tree: Tree) -> None:
    upstream, slash, _ = name.partition("/")
    if slash and upstream in _names(tree, "upstreams"):
        tree.reject(path, f"begins with upstream {upstream}'s name; {upstream}/... always means its own models")


def _spaces_differ(settings: Settings, tree: Tree) -> None:
    """A space that is named belongs to one set of deployments, or two models' vectors would have the same cache
    keys."""
    taken: dict[str, tuple[str, set[tuple[str, str]]]] = {}
    for name, model in settings.models.items():
        served = {(each.upstream, each.model) for each in model.deployments}
        for index, deployment in enumerate(model.deployments):
            if deployment.space is None:
                continue
            first, same = taken.setdefault(deployment.space, (name, served))
            if same != served:
                path: Path = ("models", name, "deployments", index, "space")
                told = tree.shown(path, deployment.space)
                tree.reject(path, f"{told} is {dotted(('models', first))}'s, whose deployments are others")


def _deployments_exist(path: Path, model: ModelSettings, tree: Tree) -> None:
    names = _names(tree, "upstreams")
    seen: set[tuple[str, str]] = set()
    for index, deployment in enumerate(model.deployments):
        place = (*path, index, "upstream")
        if names and deployment.upstream not in names:
            shown = tree.shown(place, deployment.upstream)
            tree.reject(place, f'no upstream "{shown}"{did_you_mean(shown, names)}')
        elif (deployment.upstream, deployment.model) in seen:
            tree.reject((*path, index), "the same upstream and model as a deployment above")
        seen.add((deployment.upstream, deployment.model))


def _one_space(
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
        tree.reject(path, f"different vector spaces ({listed}); deployments of one model must share one")


def _space(kind: UpstreamKind, settings: UpstreamSettings, deployment: DeploymentSettings) -> str:
    """Two deployments give comparable vectors if and only if this is equal."""
    if deployment.space is not None:
        return deployment.space
    return kind.facts(settings, deployment.model).space(kind.name)


def _can_be_told(
    path: Path, settings: Settings, model: ModelSettings, tree: Tree, kinds: Mapping[str, UpstreamKind]
) -> None:
    """An upstream of the model must have a word for what the operator says that it takes; and a built-in upstream must
    have the model."""
    told: set[str] = set()
    for index, deployment in enumerate(model.deployments):
        upstream = settings.upstreams.get(deployment.upstream)
        if upstream is None:
            return
        kind = kinds[upstream.type]
        listed, known = kind.models(upstream), kind.facts(upstream, deployment.model)
        told |= kind.adapter(upstream).capabilities | {fact for fact in CAPABILITIES if getattr(known, fact)}
        if kind.built_in and deployment.model not in listed:
            tree.reject((*path, "deployments", index, "model"), f"must be one of {', '.join(listed)}")
    for fact in CAPABILITIES:
        if getattr(model, fact) and fact not in told:
            tree.reject((*path, fact), "no upstream of this model has a word for it; leave it out")
