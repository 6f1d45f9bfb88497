"""The names there are, and what it takes to make them."""

from __future__ import annotations

from app.cache.tiers import Tiers
from app.clock import SystemClock
from app.gateway import Gateway
from app.metrics import Metrics
from app.upstreams import UPSTREAMS
from tests.counting import counting_calls
from tests.harness import settings_of


def test_twice_as_many_models_are_twice_the_work() -> None:
    """Counted in functions called."""

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
            Gateway(settings, UPSTREAMS, cache, metrics, clock)
        return counted.calls

    work(1)
    assert work(800) < 2.3 * work(400)
