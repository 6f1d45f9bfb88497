"""Builds the cache tiers a configuration asks for, in lookup order, and the other users of its Redis."""

from __future__ import annotations

from collections.abc import Callable

from app.cache.disk import DiskStore
from app.cache.memory import MemoryStore
from app.cache.redis import RedisStore
from app.cache.shared_limits import SharedLimits
from app.cache.shared_tokens import SharedTokens
from app.cache.store import Store
from app.clock import Clock
from app.config import CacheSettings, Settings
from app.metrics import Metrics


def stores(
    settings: CacheSettings, request_timeout: Callable[[], float], metrics: Metrics, clock: Clock
) -> list[Store]:
    """The configured tiers, not yet open. Raises `ValueError` for an invalid Redis URL."""
    built: list[Store] = []
    if memory := settings.memory:
        built.append(MemoryStore(memory.max_size, settings.ttl, clock, metrics))
    if disk := settings.disk:
        built.append(DiskStore(disk.path, disk.max_size, settings.ttl, clock, metrics))
    if redis := settings.redis:
        url = redis.url.get_secret_value()
        built.append(RedisStore(url, redis.timeout, settings.ttl, clock, metrics, claim_lifetime=request_timeout))
    return built


def shared_limits(settings: Settings, metrics: Metrics, clock: Clock) -> SharedLimits | None:
    """Limits shared with the other replicas; None without Redis."""
    redis = settings.cache.redis
    if redis is None:
        return None
    return SharedLimits(redis.url.get_secret_value(), redis.timeout, clock, metrics, workers=settings.server.workers)


def shared_tokens(settings: Settings, metrics: Metrics, clock: Clock) -> SharedTokens | None:
    """Access tokens shared with the other replicas; None without Redis."""
    redis = settings.cache.redis
    return SharedTokens(redis.url.get_secret_value(), redis.timeout, clock, metrics) if redis else None
