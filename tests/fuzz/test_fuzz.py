"""A few of the requests that no client would send; `make fuzz` sends a hundred thousand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.face import Served, served
from tests.fuzz.fuzz import Report, fuzz


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("fuzz")) as gateway:
        yield gateway


def test_whatever_our_description_allows_or_forbids_is_answered_as_it_says(gateway: Served) -> None:
    report = Report()
    fuzz(gateway, report, described=60, raw=0, seed=1)
    assert report.problems == []
    assert report.described > 50


def test_whatever_comes_over_a_socket_is_answered_or_is_the_callers_error(gateway: Served) -> None:
    report = Report()
    fuzz(gateway, report, described=0, raw=800, seed=1)
    assert report.problems == []
    assert report.statuses["200"]
    assert report.raw >= 800
