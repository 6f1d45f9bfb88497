"""The public models: every name that callers can request, each built into a pipeline over deployments."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from app.cache.tiers import Tiers
from app.catalog import ROLES, Model, combined, least
from app.config import CAPABILITIES, DeploymentSettings, ModelSettings, PrefixSettings, Settings
from app.errors import InvalidRequest
from app.pipeline import build
from app.pipeline.deployment import Deployment
from app.pipeline.fleet import Fleet
from app.pipeline.prepare import Prepare
from app.types import Params
from app.upstreams.upstream import Upstream

log = logging.getLogger(__name__)

_FACTS = {field.name for field in fields(Model)} - {"dimensions", "prefixes"}
_OVERRIDABLE = _FACTS & ModelSettings.model_fields.keys()
"""Facts that an operator may override, under the same name. As settings, `dimensions` is what requests get by default,
and `prefixes` define roles too."""
_SPACES_DIFFER = "its deployments are in different vector spaces"


@dataclass(frozen=True, slots=True)
class PublicModel:
    """A model as callers know it: its own name, its pipeline, and its facts."""

    name: str
    embed: Prepare
    dimensions: int | None
    """Default length of its vectors."""
    space: str
    deployments: tuple[Deployment, ...]

    @property
    def facts(self) -> Model:
        """Its facts, over all its deployments. A call's rows and tokens are as learned so far, which may be fewer than
        in the catalogue."""
        limits = [deployment.limits for deployment in self.deployments]
        return replace(
            combined([deployment.model for deployment in self.deployments]),
            max_batch=min(each.max_batch for each in limits),
            max_tokens_per_batch=least(each.max_tokens_per_batch for each in limits),
        )


class Registry:
    """Every public name, built from what the configuration names and what the upstreams list."""

    def __init__(self, settings: Settings, upstreams: Mapping[str, Upstream], fleet: Fleet, cache: Tiers) -> None:
        self._settings, self._upstreams, self._fleet, self._cache = settings, upstreams, fleet, cache
        self._configured_upstreams = {each.upstream for model in settings.models.values() for each in model.deployments}
        self._conflicts: set[str] = set()
        self.names: dict[str, PublicModel] = {}
        """Every name that can be requested, aliases included."""
        self._listed: dict[str, Mapping[str, Model]] = {}
        """By upstream, the list of models that `names` was built from."""
        self.publish()

    def outdated(self) -> bool:
        """Whether an upstream has a different list of models by now."""
        return any(upstream.models is not self._listed.get(name) for name, upstream in self._upstreams.items())

    def upstreams_to_ask(self, public: PublicModel) -> list[Upstream]:
        """The upstreams to ask for their lists before this model is used; nearly always none. It is all of the model's
        upstreams, unless the list of one is still that from which `names` was built, and that upstream is reachable or
        has the model in its list: what a list says of a model, its revision for example, may put it in another vector
        space."""
        for each in public.deployments:
            upstream = self._upstreams[each.upstream]
            published = upstream.models is self._listed[each.upstream]
            if published and (not upstream.unavailable or each.model.name in upstream.models):  # nearly always
                return []
        return [self._upstreams[each.upstream] for each in public.deployments]

    def served(self, upstream: Upstream) -> Mapping[str, Model]:
        """The models that it serves under their own names: those it lists or, if it has no list and none is configured
        for it, those it is assumed to have."""
        return upstream.models or ({} if upstream.name in self._configured_upstreams else upstream.assumed)

    def publish(self) -> None:
        """Rebuilds every name, and drops deployments that no name leads to any more because their upstream has replaced
        or dropped the model."""
        self._fleet.begin()
        self._build_names()
        self._fleet.retain({public.deployments for public in self.names.values()})

    def _build_names(self) -> None:
        """Configured models and their aliases; then listed models, by plain name and as `upstream/model`; then
        configured models that are not listed, as `upstream/model`."""
        names: dict[str, PublicModel] = {}
        for name, settings in self._settings.models.items():
            public = self._configured(name, settings)
            for each in (name, *settings.aliases):
                names[each] = public
        for name, served in self._by_plain_name().items():
            joint = None
            if len({deployment.space for deployment in served}) > 1:
                self._warn_of_conflict(name, served, "are kept apart")
            elif name not in names:
                joint = names[name] = self._public(name, tuple(served), None)
            for deployment in served:
                alone = joint if len(served) == 1 else None
                names.setdefault(deployment.name, alone or self._public(deployment.name, (deployment,), None))
        for settings in self._settings.models.values():
            for wanted in settings.deployments:
                if (name := f"{wanted.upstream}/{wanted.model}") not in names:
                    facts = self._facts(wanted, settings)
                    deployment = self._fleet.deployment(self._upstreams[wanted.upstream], facts)
                    names[name] = self._public(name, (deployment,), None)
        self.names = names
        self._listed = {name: upstream.models for name, upstream in self._upstreams.items()}

    def unfit(self) -> list[str]:
        """A line for each model whose configuration makes it refuse requests that give only model and input."""
        models = {public.name: public.embed for public in self.names.values()}
        return [f"models.{name}: {why}" for name, embed in models.items() if (why := _default_refusal(embed))]

    def apart(self) -> list[str]:
        """A line for each model that only some of its configured deployments serve, although all are available."""
        unavailable = {name for name, upstream in self._upstreams.items() if upstream.trouble}
        configured = [(name, each.deployments, self.names[name]) for name, each in self._settings.models.items()]
        return [
            f"models.{name}.deployments: {_SPACES_DIFFER}; only {_joined_names(public.deployments)} would serve it"
            for name, wanted, public in configured
            if len(public.deployments) < len(wanted) and unavailable.isdisjoint(each.upstream for each in wanted)
        ]

    def _by_plain_name(self) -> dict[str, list[Deployment]]:
        """A model whose name begins with another upstream's, as in a proxy's list, has no plain name: that name means
        the other upstream's own model, available or not. Upstreams that are only assumed to have a model come last: in
        doubt the others are right."""
        served: dict[str, list[Deployment]] = {}
        for upstream in sorted(self._upstreams.values(), key=lambda each: not each.lists_models):
            for model in self.served(upstream).values():
                deployment = self._fleet.deployment(upstream, model)
                first, slash, _ = model.name.partition("/")
                others = slash and first != upstream.name and first in self._upstreams
                served.setdefault(deployment.name if others else model.name, []).append(deployment)
        return served

    def _configured(self, name: str, settings: ModelSettings) -> PublicModel:
        deployments = [self._configured_deployment(each, settings) for each in settings.deployments]
        space = deployments[0].space
        # What the configuration alone could tell was refused at startup; a revision may still differ.
        same = tuple(deployment for deployment in deployments if deployment.space == space)
        if len(same) < len(deployments):
            self._warn_of_conflict(name, deployments, f"only {_joined_names(same)} serves it")
        return self._public(name, same, settings)

    def _configured_deployment(self, wanted: DeploymentSettings, settings: ModelSettings) -> Deployment:
        facts, space = self._facts(wanted, settings), wanted.space
        if settings.prefixes is not None:
            digest = _prefix_hash(settings.prefixes)
            facts = _with_prefixes(facts, settings.prefixes, digest)
            space = f"{space}+{digest}" if space else None
        deployment = self._fleet.deployment(self._upstreams[wanted.upstream], facts, space)
        return replace(deployment, weight=wanted.weight, priority=wanted.priority)

    def _facts(self, wanted: DeploymentSettings, settings: ModelSettings) -> Model:
        """The upstream's facts about its model, with the operator's overrides."""
        upstream = self._upstreams[wanted.upstream]
        # A dialect omits what it cannot express, and the caller would get a vector of something else.
        inexpressible = {
            field for field in CAPABILITIES if field not in upstream.adapter.capabilities and getattr(settings, field)
        }
        overrides = {
            field: value
            for field in _OVERRIDABLE
            if field not in inexpressible and (value := getattr(settings, field)) is not None
        }
        known = upstream.model(wanted.model)
        if settings.dimension_choices is not None:  # then they are the server's, and none are made here
            known = replace(known, matryoshka_dimensions=None)
        return replace(known, **overrides)

    def _public(self, name: str, deployments: tuple[Deployment, ...], settings: ModelSettings | None) -> PublicModel:
        current = self.names.get(name)
        if current is not None and current.name == name and current.deployments == deployments:
            return current  # rebuilding thousands because a list has one more would block the event loop
        first = deployments[0]
        batcher = self._fleet.batcher(deployments, configured=settings is not None)
        embed = build.pipeline(
            batcher,
            name=name,
            cache=self._cache,
            space=first.space,
            models=[deployment.model for deployment in deployments],
            settings=settings,
        )
        # At unit length they compare differently from what the upstream returns, whoever else serves that.
        space = f"{first.space};normalized" if settings and settings.normalize else first.space
        dimensions = (settings and settings.dimensions) or first.model.dimensions
        return PublicModel(name, embed, dimensions, space, deployments)

    def _warn_of_conflict(self, name: str, served: Sequence[Deployment], consequence: str) -> None:
        if name not in self._conflicts:
            self._conflicts.add(name)
            log.warning("model %s: %s and %s: %s", name, _SPACES_DIFFER, consequence, _joined_names(served))


def _joined_names(deployments: Iterable[Deployment]) -> str:
    return ", ".join(deployment.name for deployment in deployments)


def _default_refusal(prepare: Prepare) -> str | None:
    try:
        prepare.canonical(Params())
    except InvalidRequest as refusal:
        return f"a request without parameters is refused: {refusal.message}"
    return None


def _prefix_hash(prefixes: PrefixSettings) -> str:
    """Distinguishes these prefixes from others in a space's name. Prefixes affect vectors, so other prefixes make
    another space, even one that an operator has named: what was cached before they were changed is no longer found."""
    return hashlib.sha256("\0".join(getattr(prefixes, role) for role in ROLES).encode()).hexdigest()[:8]


def _with_prefixes(model: Model, prefixes: PrefixSettings, digest: str) -> Model:
    """The model with the operator's prefixes."""
    texts = tuple(getattr(prefixes, role) for role in ROLES)
    revision = f"{model.revision}+{digest}" if model.revision else f"prefixes-{digest}"
    return replace(
        model, roles=ROLES, default_role=None, prefixes=texts, instruct=False, instruction="", revision=revision
    )
