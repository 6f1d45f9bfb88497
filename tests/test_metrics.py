"""What is counted in plain numbers reaches Prometheus in full, as if each step had been reported."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import metrics
from app.metrics import Metrics
from app.metrics.buffered import FlushQueue
from app.metrics.registry import _LATENCY
from tests.processes import limited

P = "embedding_gateway_"


def sample(of: Metrics, name: str, **labels: str) -> float | None:
    return of.registry.get_sample_value(P + name, labels)


def plain_counter(told: Metrics) -> prometheus_client.Counter:
    """One of the registry that is not counted in plain numbers."""
    return prometheus_client.Counter("plain", "-", ["status"], registry=told.registry)


def plain(told: Metrics, status: str) -> float | None:
    return told.registry.get_sample_value("plain_total", {"status": status})


@given(st.lists(st.sampled_from([0.0, 0.001, 0.0010001, 0.9999, 1.0, 60.0, 61.0, 1e9]) | st.floats(0, 100)))
def test_a_spread_is_what_a_histogram_would_be(values: list[float]) -> None:
    told, registry = Metrics(), prometheus_client.CollectorRegistry()
    name = P + "request_duration_seconds"
    histogram = prometheus_client.Histogram(name, "-", ["model"], registry=registry, buckets=_LATENCY).labels("m")
    buffered_histogram = told.request_duration.labels("m")
    for value in values:
        buffered_histogram.observe(value)
        histogram.observe(value)
    ours, theirs = durations(told.registry), durations(registry)
    assert len(theirs) > 10
    assert ours == pytest.approx(theirs)


def durations(registry: prometheus_client.CollectorRegistry) -> dict[tuple[str, str], float]:
    families = [family for family in registry.collect() if family.name == P + "request_duration_seconds"]
    return {(each.name, str(each.labels.get("le"))): each.value for family in families for each in family.samples}


def test_whoever_asks_is_told_everything_once() -> None:
    told = Metrics()
    counter, set_gauge, gauge = (
        told.requests.labels("m", "200", "c"),
        told.cache_bytes.labels("memory"),
        told.inflight_requests,
    )
    for count in (3, 5):
        counter.inc()
        counter.inc(2)
        gauge.inc()
        gauge.inc(2)
        gauge.dec(3 - 1)
        set_gauge.set(7)
        set_gauge.set(count)
        assert sample(told, "requests_total", model="m", status="200", client="c") == (count - 1) // 2 * 3
        assert sample(told, "inflight_requests") == (count - 1) // 2
        assert sample(told, "cache_bytes", tier="memory") == count
    assert sample(told, "requests_total", model="m", status="200", client="c") == 6
    assert sample(told, "inflight_requests") == 2


def test_a_series_is_one_object_whoever_asks_for_it() -> None:
    """Or two that count the same gauge would overwrite each other."""
    told = Metrics()
    for _ in range(2):
        told.queued_inputs.labels("up", "query").inc()
        assert sample(told, "queued_inputs", upstream="up", lane="query")
    assert sample(told, "queued_inputs", upstream="up", lane="query") == 2


@pytest.mark.parametrize("multiprocess", [False, True])
async def test_where_others_ask_they_are_told_at_the_end_of_the_turn(multiprocess: bool) -> None:
    told = Metrics()
    due = FlushQueue(multiprocess=multiprocess)
    buffered_counter = metrics.BufferedCounter(plain_counter(told).labels("200"), due)
    buffered_counter.inc()
    assert plain(told, "200") == 0
    await asyncio.sleep(0)
    assert plain(told, "200") == int(multiprocess)
    due.flush()
    assert plain(told, "200") == 1


def test_what_was_counted_before_the_loop_ran_keeps_nobody_from_being_told() -> None:
    told = Metrics()
    due, counter = FlushQueue(multiprocess=True), plain_counter(told)
    early, late = (metrics.BufferedCounter(counter.labels(status), due) for status in ("200", "400"))
    early.inc()

    async def later() -> None:
        late.inc()
        await asyncio.sleep(0)

    asyncio.run(later())
    assert [plain(told, each) for each in ("200", "400")] == [1, 1]


def _many(told: Metrics, count: int) -> None:
    """Creates more series than a new file has room for."""
    for i in range(count):
        told.requests.labels(f"a model with quite a long name, number {i}", "200", "c").inc()


def test_files_have_their_blocks_before_they_are_written_to(tmp_path: Path) -> None:
    """Writing to a memory-mapped hole in a file kills the process if the disk is full."""
    with metrics.multiprocess(str(tmp_path)):
        _many(Metrics(), 1000)
        files = [file.stat() for file in tmp_path.iterdir()]
    assert max(file.st_size for file in files) > 100_000
    assert [file for file in files if file.st_blocks * 512 < file.st_size] == []


async def test_a_file_that_cannot_grow_costs_new_series_alone_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with metrics.multiprocess(str(tmp_path)):
        told = Metrics()
        told.requests.labels("first", "200", "c").inc()
        with limited(resource.RLIMIT_FSIZE, 100_000):
            _many(told, 1000)
        told.requests.labels("first", "200", "c").inc()
        text = (await told.exposition()).decode()
    assert P + 'requests_total{client="c",model="first",status="200"} 2.0' in text
    assert 'number 1"' in text
    assert 'number 999"' not in text
    assert caplog.text.count("File too large") == 1


def test_nothing_is_left_of_a_file_that_cannot_even_be_begun(tmp_path: Path) -> None:
    with metrics.multiprocess(str(tmp_path)), limited(resource.RLIMIT_FSIZE, 100):
        _many(Metrics(), 1)
        assert not list(tmp_path.iterdir())


async def test_a_directory_that_somebody_has_removed_is_made_anew_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "shared" / "by-workers"
    with metrics.multiprocess(str(directory)):
        for _ in range(2):
            await Metrics().exposition()
    assert directory.is_dir()
    assert caplog.text.count("it was removed") == 1
