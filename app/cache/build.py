"""From the configuration to the tiers it asks for, in the order they are asked, and to what else Redis is for."""

from __future__ import annotations

from app.cache.disk import DiskStore
from app.cache.memory import MemoryStore
from app.cache.redis import RedisStore
from app.cache.shared_limits import SharedLimits
from app.cache.shared_tokens import SharedTokens
from app.clock import Clock
from app.config import CacheSettings, Settings
from app.metrics import Metrics
from app.types import Store


def stores(settings: CacheSettings, metrics: Metrics, clock: Clock) -> list[Store]:
    """Nothing is opened yet. Raises `ValueError` for a Redis URL that is none."""
    built: list[Store] = []
    if memory := settings.memory:
        built.append(MemoryStore(memory.max_size, settings.ttl, clock, metrics))
    if disk := settings.disk:
        built.append(DiskStore(disk.path, disk.max_size, settings.ttl, clock, metrics))
    if redis := settings.redis:
        built.append(RedisStore(redis.url.get_secret_value(), redis.timeout, settings.ttl, clock, metrics))
    return built


def shared_limits(settings: Settings, metrics: Metrics, clock: Clock) -> SharedLimits | None:
    """Limits kept with the other replicas, where there is a Redis to keep them in."""
    redis = settings.cache.redis
    if redis is None:
        return None
    return SharedLimits(redis.url.get_secret_value(), redis.timeout, clock, metrics, workers=settings.server.workers)


def shared_tokens(settings: Settings, metrics: Metrics) -> SharedTokens | None:
    """Access tokens kept with the other replicas, where there is a Redis to keep them in."""
    redis = settings.cache.redis
    return SharedTokens(redis.url.get_secret_value(), redis.timeout, metrics) if redis else None
