"""Shows what a configuration would serve, and tries it: the command `embedding-gateway check`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from app.config import CacheSettings, Settings
from app.gateway import Gateway
from app.main import create_app
from app.pipeline.deployment import Deployment
from app.registry import PublicModel
from app.types import Embedding

PROBE_TIMEOUT = 30.0
"""Seconds that `check --probe` waits for one deployment."""


def check(settings: Settings, origin: str, show: Callable[[str], None], *, probe: bool) -> list[str]:
    """Passes `show` the table of models, and with `probe` what became of a text on each deployment, line by line.
    Returns what is wrong with them, one line each; mistakes in the configuration, which is from `origin`, as
    `load` tells them."""
    # Without its cache: a check leaves no embedding behind, and in Redis no access token either.
    uncached = settings.model_copy(update={"cache": CacheSettings(memory=None)})
    return asyncio.run(_report(create_app(uncached).gateway, origin, show, probe=probe))


async def _report(gateway: Gateway, origin: str, show: Callable[[str], None], *, probe: bool) -> list[str]:
    await gateway.refresh()
    try:
        rows: list[tuple[str, ...]] = [
            ("MODEL", "DIMENSIONS", "INPUTS/CALL", "TOKENS/INPUT", "VECTOR SPACE", "DEPLOYMENTS")
        ]
        rows += [_row(name, public) for name, public in sorted(gateway.names.items()) if _is_listed(name, public)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        complete = not any(upstream.trouble for upstream in gateway.upstreams.values())
        registry = gateway.registry
        mistakes = registry.unfit() + registry.apart() + (gateway.unserved() if complete else [])
        if complete and not gateway.names:
            mistakes.append("upstreams: no model is served")
        failed = await _probe(gateway, show) if probe else []
        return [f"{origin}: {mistake}" for mistake in mistakes] + failed
    finally:
        await gateway.aclose()


def _is_listed(name: str, public: PublicModel) -> bool:
    """Whether the table shows this name: `upstream/model` only if the model has no shorter name."""
    return name == public.name or public.deployments[0].name != name


def _row(name: str, public: PublicModel) -> tuple[str, ...]:
    facts = public.facts
    label = name if name == public.name else f"{name} (alias of {public.name})"
    return (
        label,
        str(public.dimensions or "?"),
        str(facts.max_batch),
        str(facts.max_tokens_per_input or "?"),
        public.space,
        ", ".join(deployment.name for deployment in public.deployments),
    )


async def _probe(gateway: Gateway, show: Callable[[str], None]) -> list[str]:
    deployments = {each.name: each for public in gateway.names.values() for each in public.deployments}
    upstreams = gateway.upstreams.items()
    failed = [f"{name}: cannot list its models: {each.trouble}" for name, each in upstreams if each.trouble]
    used = {each.upstream for each in deployments.values()}
    failed += [
        f"{name}: it has no list of models at its base_url, and none is configured for it"
        for name, each in upstreams
        if not each.lists_models and name not in used
    ]
    for name, deployment in sorted(deployments.items()):
        trouble = await _probe_one(deployment)
        show(f"probe {name}: {trouble or 'ok'}")
        if trouble:
            failed.append(f"{name}: {trouble}")
    return failed


async def _probe_one(deployment: Deployment) -> str | None:
    outcome = await deployment.ask("probe", PROBE_TIMEOUT)
    if outcome is None:
        return f"no answer within {PROBE_TIMEOUT:g} s"
    return None if isinstance(outcome, Embedding) else f"{outcome.code}: {outcome.message}"
