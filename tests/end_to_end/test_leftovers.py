"""A failed request is freed once it is answered. The garbage collector runs by the number of objects: a few errors that
keep their frames alive would keep their requests' bodies until then, however large."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from app.errors import GatewayError
from tests.api.support import MODEL, config
from tests.end_to_end.test_failover import FastClock
from tests.fakes import FakeOpenAI, faults
from tests.harness import running

TEXTS = ["one", "two", "three"]


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def left_behind() -> list[str]:
    return [repr(each) for each in gc.get_objects() if isinstance(each, GatewayError)]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model": ', 400),
        ({"model": MODEL, "input": [*TEXTS, ""]}, 400),
        (b'{"model": "%b", "input": [%b[1]]}' % (MODEL.encode(), b"[1]," * 600_000), 400),
        ({"model": "nobody's", "input": TEXTS}, 404),
    ],
    ids=["json", "value", "weight, in a thread", "model"],
)
@pytest.mark.usefixtures("uncollected")
def test_a_refused_request_is_gone_without_the_garbage_collector(body: Any, status: int) -> None:
    with FakeOpenAI(api_key="sk-fake") as fake, running(config(fake)) as gateway:
        assert gateway.post(body).status_code == status
    assert left_behind() == []


@pytest.mark.parametrize(
    "fault",
    [
        faults.vendor_error("server_error"),
        faults.vendor_error("invalid_input"),
        faults.vendor_error("rate_limit_exceeded"),
        faults.html_page(),
        faults.invalid_json,
        faults.mixed_dimensions,
        faults.reset_before_answer,
        faults.hang,
    ],
    ids=lambda fault: fault.name,
)
@pytest.mark.usefixtures("uncollected")
def test_a_request_that_failed_upstream_is_gone_without_the_garbage_collector(fault: faults.Fault) -> None:
    with (
        FakeOpenAI(api_key="sk-fake") as fake,
        running(config(fake, {"timeout": "100ms"}), clock=FastClock()) as gateway,
    ):
        fake.fail(fault, times=None)
        assert gateway.post({"model": MODEL, "input": TEXTS}).status_code >= 400
    assert left_behind() == []
