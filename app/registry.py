"""What callers can ask for: public model names, built into pipelines over deployments."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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

_FACTS = (
    "max_batch",
    "max_tokens_per_input",
    "max_characters_per_input",
    "cuts_silently",
    "max_tokens_per_batch",
    "dimension_choices",
    "instruct",
    "sparse",
    "images",
    "videos",
    "price_per_million_tokens",
)
"""What an operator may know better than the catalogue: fields of both `ModelSettings` and `Model`."""
_APART = "its deployments are in different vector spaces"


@dataclass(frozen=True, slots=True)
class PublicModel:
    """A model as callers know it: its own name, its pipeline, and what can be said about it."""

    name: str
    embed: Prepare
    dimensions: int | None
    """Length of the vectors for callers that ask for none."""
    space: str
    deployments: tuple[Deployment, ...]

    @property
    def facts(self) -> Model:
        """What is true of the model behind all its deployments. Rows and tokens of a call are those learned so far,
        which may be fewer than the catalogue has."""
        limits = [deployment.limits for deployment in self.deployments]
        return replace(
            combined([deployment.model for deployment in self.deployments]),
            max_batch=min(each.max_batch for each in limits),
            max_tokens_per_batch=least(each.max_tokens_per_batch for each in limits),
        )


class Registry:
    """Every name there is, made of what the configuration names and the upstreams list, over what serves it."""

    def __init__(self, settings: Settings, upstreams: Mapping[str, Upstream], fleet: Fleet, cache: Tiers) -> None:
        self._settings, self._upstreams, self._fleet, self._cache = settings, upstreams, fleet, cache
        self._conflicts: set[str] = set()
        self.names: dict[str, PublicModel] = {}
        """Every name that can be asked for, aliases included."""
        self._listed: dict[str, Mapping[str, Model]] = {}
        """By upstream, the list of models that `names` was made from."""
        self.publish()

    def outdated(self) -> bool:
        """Whether an upstream lists other models now."""
        return any(upstream.models is not self._listed.get(name) for name, upstream in self._upstreams.items())

    def unlisted(self, public: PublicModel) -> list[Upstream]:
        """The upstreams to ask for their lists before this model is used; nearly always none. All of its upstreams,
        unless one has the list that `names` was made from and is in reach, or had the model in it: what a list says of
        a model, a revision for example, may make it another vector space."""
        for each in public.deployments:
            upstream = self._upstreams[each.upstream]
            published = upstream.models is self._listed[each.upstream]
            if published and (not upstream.unavailable or each.model.name in upstream.models):  # nearly always
                return []
        return [self._upstreams[each.upstream] for each in public.deployments]

    def publish(self) -> None:
        """Makes every name anew, and lets go of deployments that none leads to any more, whose model its upstream has
        replaced or dropped."""
        self._fleet.begin()
        self._name_all()
        self._fleet.retain({public.deployments for public in self.names.values()})

    def _name_all(self) -> None:
        """Configured models and their aliases; then the upstreams' own names, plain and as `upstream/model`; then
        `upstream/model` of what is configured and not listed."""
        names: dict[str, PublicModel] = {}
        for name, settings in self._settings.models.items():
            public = self._configured(name, settings)
            for each in (name, *settings.aliases):
                names[each] = public
        for name, served in self._by_plain_name().items():
            combined = None
            if len({deployment.space for deployment in served}) > 1:
                self._warn_of_spaces(name, served, "are kept apart")
            elif name not in names:
                combined = names[name] = self._public(name, tuple(served), None)
            for deployment in served:
                alone = combined if len(served) == 1 else None
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
        """A line for each model that is configured in a way in which it refuses requests that say no more than model
        and input."""
        models = {public.name: public.embed for public in self.names.values()}
        return [f"models.{name}: {why}" for name, embed in models.items() if (why := _unfit(embed))]

    def apart(self) -> list[str]:
        """A line for each model that not all deployments serve which it is configured to have, though all are there."""
        unavailable = {name for name, upstream in self._upstreams.items() if upstream.trouble}
        configured = [(name, each.deployments, self.names[name]) for name, each in self._settings.models.items()]
        return [
            f"models.{name}.deployments: {_APART}; only {_named(public.deployments)} would serve it"
            for name, wanted, public in configured
            if len(public.deployments) < len(wanted) and unavailable.isdisjoint(each.upstream for each in wanted)
        ]

    def _by_plain_name(self) -> dict[str, list[Deployment]]:
        """A model whose name begins with another upstream's, as a proxy's list may have it, has no plain name: that one
        means the other's own models, whether or not they are there."""
        served: dict[str, list[Deployment]] = {}
        for upstream in self._upstreams.values():
            for model in upstream.models.values():
                deployment = self._fleet.deployment(upstream, model)
                first, slash, _ = model.name.partition("/")
                others = slash and first != upstream.name and first in self._upstreams
                served.setdefault(deployment.name if others else model.name, []).append(deployment)
        return served

    def _configured(self, name: str, settings: ModelSettings) -> PublicModel:
        deployments = [self._configured_deployment(each, settings) for each in settings.deployments]
        space = deployments[0].space
        # What the configuration alone could tell was refused at start; a revision may differ all the same.
        same = tuple(deployment for deployment in deployments if deployment.space == space)
        if len(same) < len(deployments):
            self._warn_of_spaces(name, deployments, f"only {_named(same)} serves it")
        return self._public(name, same, settings)

    def _configured_deployment(self, wanted: DeploymentSettings, settings: ModelSettings) -> Deployment:
        facts, space = self._facts(wanted, settings), wanted.space
        if settings.prefixes is not None:
            mark = _mark(settings.prefixes)
            facts = _told_by(facts, settings.prefixes, mark)
            space = f"{space}+{mark}" if space else None
        deployment = self._fleet.deployment(self._upstreams[wanted.upstream], facts, space)
        return replace(deployment, weight=wanted.weight, priority=wanted.priority)

    def _facts(self, wanted: DeploymentSettings, settings: ModelSettings) -> Model:
        """What is known of the upstream's model, and what the operator knows better."""
        upstream = self._upstreams[wanted.upstream]
        # What a dialect has no word for would be left out of a call, and the caller given a vector of something else.
        mute = {
            field for field in CAPABILITIES if field not in upstream.adapter.capabilities and getattr(settings, field)
        }
        better = {
            field: value for field in _FACTS if field not in mute and (value := getattr(settings, field)) is not None
        }
        known = upstream.model(wanted.model)
        if settings.dimension_choices is not None:  # its server's then, and not those that are made here
            known = replace(known, matryoshka_dimensions=None)
        return replace(known, **better)

    def _public(self, name: str, deployments: tuple[Deployment, ...], settings: ModelSettings | None) -> PublicModel:
        known = self.names.get(name)
        if known is not None and known.name == name and known.deployments == deployments:
            return known  # to make thousands anew because a list has one more would hold everybody up
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
        # Brought to unit length they compare differently from what the upstream gives, whoever else serves that.
        space = f"{first.space};normalized" if settings and settings.normalize else first.space
        dimensions = (settings and settings.dimensions) or first.model.dimensions
        return PublicModel(name, embed, dimensions, space, deployments)

    def _warn_of_spaces(self, name: str, served: Sequence[Deployment], so: str) -> None:
        if name not in self._conflicts:
            self._conflicts.add(name)
            log.warning("model %s: %s and %s: %s", name, _APART, so, _named(served))


def _named(deployments: Iterable[Deployment]) -> str:
    return ", ".join(deployment.name for deployment in deployments)


def _unfit(prepare: Prepare) -> str | None:
    try:
        prepare.prepared(Params())
    except InvalidRequest as refusal:
        return f"a request without parameters is refused: {refusal.message}"
    return None


def _mark(prefixes: PrefixSettings) -> str:
    """Tells these prefixes from others in a space's name. They alter vectors, so vectors made with others are in
    another space, even one an operator has named: what was cached before they were changed is not found any more."""
    return hashlib.sha256("\0".join(getattr(prefixes, role) for role in ROLES).encode()).hexdigest()[:8]


def _told_by(model: Model, prefixes: PrefixSettings, mark: str) -> Model:
    """The model with the operator's prefixes."""
    texts = tuple(getattr(prefixes, role) for role in ROLES)
    revision = f"{model.revision}+{mark}" if model.revision else f"prefixes-{mark}"
    return replace(
        model, roles=ROLES, default_role=None, prefixes=texts, instruct=False, instruction="", revision=revision
    )
