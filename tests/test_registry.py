"""The registry of public names, and the work of building it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.cache.tiers import Tiers
from app.clock import SystemClock
from app.gateway import Gateway
from app.metrics import Metrics
from app.pipeline.batcher import Batcher
from app.upstreams.openai import unlisted_model
from tests.counting import counting_calls
from tests.harness import settings_of


def test_twice_as_many_models_are_twice_the_work() -> None:
    """Counted in function calls."""

    def work(count: int) -> int:
        names = [f"model-{number}" for number in range(count)]
        settings = settings_of(
            {
                "upstreams": {"up": {"type": "openai", "base_url": "http://127.0.0.1:9/v1"}},
                "models": {name: {"deployments": [{"upstream": "up", "model": name}]} for name in names},
            }
        )
        metrics, clock = Metrics(), SystemClock()
        cache = Tiers([], metrics, clock)
        with counting_calls() as counted:
            Gateway(settings, cache, metrics, clock)
        return counted.calls

    work(1)
    assert work(800) < 2.3 * work(400)


def test_a_list_that_has_one_model_more_costs_that_one() -> None:
    """And the upstream's other models remain the same objects."""
    settings = settings_of({"upstreams": {name: {"type": "openai", "base_url": "http://no/v1"} for name in ("a", "b")}})
    metrics, clock = Metrics(), SystemClock()
    gateway = Gateway(settings, Tiers([], metrics, clock), metrics, clock)

    def listing(count: int) -> int:
        for upstream in gateway.upstreams.values():
            upstream.models = {name: unlisted_model(name) for name in (f"model-{number}" for number in range(count))}
        with counting_calls() as counted:
            gateway.registry.publish()
        return counted.calls

    first = listing(400)
    before = dict(gateway.names)
    assert listing(401) < first / 4
    assert len(gateway.names) == 3 * 401
    assert all(gateway.names[name] is public for name, public in before.items())
    listing(1)
    assert set(gateway.names) == {"model-0", "a/model-0", "b/model-0"}


async def test_one_that_is_out_stays_out_when_a_list_says_something_else_of_it() -> None:
    """As vLLM's list does after a restart with another `--max-model-len`: callers would get another model's vectors."""
    settings = settings_of({"upstreams": {name: {"type": "openai", "base_url": "http://no/v1"} for name in ("a", "b")}})
    metrics, clock = Metrics(), SystemClock()
    gateway = Gateway(settings, Tiers([], metrics, clock), metrics, clock)
    for length in (512, 256):
        for upstream in gateway.upstreams.values():
            upstream.models = {"m": replace(unlisted_model("m"), max_tokens_per_input=length)}
        gateway.registry.publish()
        out = [each.standing.out for name in ("m", "b/m") for each in gateway.names[name].deployments]
        assert out == ([None] * 3 if length == 512 else [None, "another model", "another model"])
        gateway.names["b/m"].deployments[0].standing.take_out("another model")
    assert [each.due(1000.0) for each in gateway.fleet.canaries] == [True, True]


async def test_to_close_what_another_one_has_taken_over_compares_no_model_with_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = 0

    def equal(one: object, other: object) -> bool:
        nonlocal compared
        compared += 1
        return one is other

    settings = settings_of({"upstreams": {"up": {"type": "openai", "base_url": "http://no/v1"}}})
    metrics, clock = Metrics(), SystemClock()
    cache = Tiers([], metrics, clock)
    gateway = Gateway(settings, cache, metrics, clock)
    gateway.upstreams["up"].models = {
        name: unlisted_model(name) for name in (f"model-{number}" for number in range(200))
    }
    gateway.registry.publish()
    successor = Gateway(settings, cache, metrics, clock, before=gateway)
    monkeypatch.setattr(Batcher, "__eq__", equal)
    monkeypatch.setattr(Batcher, "__hash__", object.__hash__, raising=False)
    await gateway.fleet.aclose(successor.fleet)
    assert compared < 400
