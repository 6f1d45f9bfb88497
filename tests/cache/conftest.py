from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from app.cache.disk import DiskStore
from app.metrics import Metrics
from tests.cache.support import LIMIT, Clock, OpenDisk


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "embeddings.sqlite3"


@pytest_asyncio.fixture
async def opened(tmp_path: Path, clock: Clock, metrics: Metrics) -> AsyncIterator[OpenDisk]:
    """Builds disk stores and closes them at the end."""
    stores = []

    def build(path: Path | None = None, max_size: int = 8 * 2**20, ttl: float = 86400) -> DiskStore:
        where = str(path or tmp_path / "embeddings.sqlite3")
        stores.append(DiskStore(where, max_size, ttl, clock, metrics, timeout=LIMIT))
        return stores[-1]

    yield build
    for store in stores:
        await store.close()
