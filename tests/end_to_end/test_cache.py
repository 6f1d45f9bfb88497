"""The cache in the whole program: what it saves, and that losing it costs speed but never an answer."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml
from redis import Redis

from app.cache.memory import MemoryStore
from app.cache.store import CLAIM_TTL
from app.cache.values import encode
from app.clock import SystemClock
from app.metrics import Metrics
from app.types import Embedding
from tests.fakes import FakeOpenAI
from tests.harness import Running, running, settings_of
from tests.processes import address, start, until
from tests.redis_server import RedisServer

MODEL = "text-embedding-3-small"
TEXTS = [f"text {i}" for i in range(20)]


def config(fake: FakeOpenAI, cache: dict[str, Any]) -> dict[str, Any]:
    upstream = {"type": "openai", "api_key": "sk-fake", "base_url": fake.url + "/v1"}
    return {"upstreams": {"up": upstream}, "cache": cache}


def ask(gateway: Running, fake: FakeOpenAI, texts: list[str] = TEXTS) -> str:
    """Embeds the texts, compares every vector, and returns the answer's cache header."""
    response = gateway.post({"model": MODEL, "input": texts})
    assert response.status_code == 200, response.text
    for text, row in zip(texts, response.json()["data"], strict=True):
        assert np.array_equal(np.array(row["embedding"], "<f4"), fake.expected(MODEL, text))
    return str(response.headers["x-embedding-cache"])


def test_whoever_builds_the_application_may_hand_it_its_tiers() -> None:
    with FakeOpenAI(api_key="sk-fake") as fake:
        for stores, cached in (([], "miss"), ([MemoryStore(2**20, 60, SystemClock(), Metrics())], "hit")):
            with running(config(fake, {}), stores=stores) as gateway:
                assert ask(gateway, fake) == "miss"
                assert ask(gateway, fake) == cached


def test_disk_survives_a_restart_and_fills_memory(tmp_path: Path) -> None:
    cache = {"disk": {"path": str(tmp_path / "cache.sqlite3")}}
    with FakeOpenAI(api_key="sk-fake") as fake:
        with running(config(fake, cache)) as gateway:
            assert ask(gateway, fake) == "miss"
        with running(config(fake, cache)) as gateway:
            assert ask(gateway, fake) == "hit"
            assert gateway.metric("cache_operations_total", tier="memory", result="miss") == len(TEXTS)
            assert ask(gateway, fake) == "hit"
            assert gateway.metric("cache_operations_total", tier="memory", result="hit") == len(TEXTS)
        assert fake.rows == len(TEXTS)


def overwritten(client: Redis, values: dict[bytes, bytes]) -> bool:
    return client.mget([*values]) != [*values.values()]


def test_a_vector_of_another_length_that_somebody_left_in_redis_is_never_answered() -> None:
    with RedisServer() as server, FakeOpenAI(api_key="sk-fake") as fake, Redis.from_url(server.url) as client:
        cache = {"memory": None, "redis": {"url": server.url, "timeout": "1s"}}
        with running(config(fake, cache)) as gateway:
            for asked, left in (({}, 8), ({"dimensions": 512}, 1536), ({}, 0)):
                body = {"model": MODEL, "input": "a text", **asked}
                right = gateway.post(body).json()["data"]
                until(lambda: client.keys("eg:1:*"), lambda: "nothing written")
                foreign = Embedding(b"\0\0\x80?" * left, 2, None if left else b"[]")
                values = {name: encode(name[5:], foreign) for name in client.keys("eg:1:*")}
                client.mset(values)
                for state in ("miss", "hit"):
                    answer = gateway.post(body)
                    assert answer.json()["data"] == right
                    assert answer.headers["x-embedding-cache"] == state
                    until(partial(overwritten, client, values), lambda: "not written again")
                client.flushall()


def test_two_gateways_over_one_redis_share_what_either_paid_for() -> None:
    with RedisServer() as redis, FakeOpenAI(api_key="sk-fake") as fake:
        cache = {"redis": {"url": redis.url, "timeout": "1s"}}
        with running(config(fake, cache)) as one:
            assert ask(one, fake) == "miss"
        with running(config(fake, cache)) as other:
            assert ask(other, fake) == "hit"
            assert ask(other, fake, [*TEXTS, "one more"]) == "partial"
        assert fake.rows == len(TEXTS) + 1


def test_what_two_gateways_over_one_redis_are_asked_at_once_is_paid_for_once() -> None:
    with RedisServer() as redis, FakeOpenAI(api_key="sk-fake", delay=0.2) as fake:
        cache = {"redis": {"url": redis.url, "timeout": "1s"}}
        with (
            running(config(fake, cache)) as one,
            running(config(fake, cache)) as other,
            ThreadPoolExecutor() as callers,
        ):
            asking = [
                callers.submit(ask, gateway, fake, [f"text {i}" for i in range(first, first + 20)])
                for first in range(0, 60, 10)
                for gateway in (one, other)
            ]
            for each in asking:
                each.result()
        assert fake.rows == 70


def test_what_is_dropped_from_a_queue_is_still_claimed_where_another_queues_call_is_under_way() -> None:
    """Even a call of a configuration that has been replaced."""
    with RedisServer() as redis, FakeOpenAI(api_key="sk-fake") as fake, ThreadPoolExecutor() as callers:

        def weighing(weight: int) -> dict[str, Any]:
            values = config(fake, {"redis": {"url": redis.url, "timeout": "1s"}})
            values["upstreams"]["up"]["max_concurrency"] = 1
            values["models"] = {"m": {"deployments": [{"upstream": "up", "model": MODEL, "weight": weight}]}}
            return values

        with running(weighing(2)) as one, running(weighing(2)) as other:
            fake.hold()
            asking = [callers.submit(one.post, {"model": "m", "input": "the one text"})]
            fake.wait_for_calls(1)
            one.call(one.app._change_to(settings_of(weighing(3))))
            with socket.create_connection(("127.0.0.1", httpx.URL(one.url).port or 0)) as hangs_up:
                body = b'{"model":"m","input":"the one text"}'
                hangs_up.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
                hangs_up.sendall(body)
                until(lambda: one.metric("queued_inputs") == 1, lambda: "it does not queue")
            until(lambda: one.metric("queued_inputs") == 0, lambda: "it is not dropped")
            asking.append(callers.submit(other.post, {"model": "m", "input": "the one text"}))
            until(
                lambda: other.metric("cache_operations_total", result="held") > 2 or len(fake.calls) > 1,
                lambda: "the other one neither waits nor embeds",
            )
            fake.release()
            assert [each.result().status_code for each in asking] == [200, 200]
        assert [call.texts for call in fake.calls].count(["the one text"]) == 1


def test_what_a_gateway_takes_to_its_grave_another_embeds_once_its_claim_has_ended(tmp_path: Path) -> None:
    with RedisServer() as redis, FakeOpenAI(api_key="sk-fake") as fake, ThreadPoolExecutor() as callers:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(fake, {"redis": {"url": redis.url}})))
        fake.hold()
        with start(tmp_path, "--port", "0") as program:
            dying = address(tmp_path / "log", program)
            lost = callers.submit(httpx.post, dying + "/v1/embeddings", json={"model": MODEL, "input": TEXTS})
            fake.wait_for_calls(1)
            program.kill()
            assert isinstance(lost.exception(), httpx.TransportError)
        with (
            running(config(fake, {"redis": {"url": redis.url, "timeout": "1s"}})) as one,
            running(config(fake, {"redis": {"url": redis.url, "timeout": "1s"}})) as other,
        ):
            asking = [callers.submit(ask, gateway, fake) for gateway in (one, other)]
            fake.wait_for_calls(2, timeout=2 * CLAIM_TTL)
            fake.release()
            for each in asking:
                each.result()
            expired = [gateway.metric("cache_operations_total", result="expired") for gateway in (one, other)]
            assert sum(expired) == len(TEXTS), "one of them has taken the dead one's place"
        assert len(fake.calls) == 2


def test_a_redis_that_is_down_at_start_dies_or_freezes_costs_no_answer() -> None:
    with RedisServer() as redis, FakeOpenAI(api_key="sk-fake") as fake:
        cache = {"memory": None, "redis": {"url": redis.url, "timeout": "50ms"}}
        redis.pause()
        with running(config(fake, cache)) as gateway:
            assert ask(gateway, fake) == "miss"
            assert gateway.get("/readyz").status_code == 200
            redis.resume()
            redis.kill()
            assert ask(gateway, fake, ["another"]) == "miss", "unlike the first ones, which wait to be written"
            assert gateway.get("/readyz").json()["cache"]["redis"] != "up"


def test_no_cache_reads_nothing_and_no_store_writes_nothing() -> None:
    with FakeOpenAI(api_key="sk-fake") as fake, running(config(fake, {})) as gateway:
        body = {"model": MODEL, "input": "text"}

        def cache_of(**headers: str) -> str:
            return str(gateway.post(body, **headers).headers["x-embedding-cache"])

        assert cache_of(cache_control="no-store") == "miss"
        assert cache_of() == "miss", "nothing had been written"
        assert cache_of() == "hit"
        assert cache_of(cache_control="no-cache") == "miss", "nothing was read"


def test_inputs_of_different_models_and_lengths_never_share_an_entry() -> None:
    with FakeOpenAI(api_key="sk-fake") as fake, running(config(fake, {})) as gateway:
        for body in ({"dimensions": 256}, {"dimensions": 512}, {}):
            for model in (MODEL, "text-embedding-3-large"):
                response = gateway.post({"model": model, "input": "same text", **body})
                assert response.headers["x-embedding-cache"] == "miss"
                vector = np.array(response.json()["data"][0]["embedding"], "<f4")
                expected = fake.expected(model, "same text", body.get("dimensions"))
                assert np.array_equal(vector, expected)
