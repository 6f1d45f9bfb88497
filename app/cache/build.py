"""From the configuration to the tiers it asks for, in the order they are asked."""

from __future__ import annotations

from app.cache.disk import DiskStore
from app.cache.memory import MemoryStore
from app.cache.redis import RedisStore
from app.clock import Clock
from app.config import CacheSettings
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
        built.append(RedisStore(redis.url, redis.timeout, settings.ttl, clock, metrics))
    return built
