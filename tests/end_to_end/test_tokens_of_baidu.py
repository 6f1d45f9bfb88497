"""Baidu's access token: fetched once, renewed unnoticed, and not requested in a loop for a refused key."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from redis import Redis

from tests.fakes import FakeBaidu
from tests.harness import Running, running
from tests.redis_server import RedisServer

MODEL = "embedding-v1"


@contextmanager
def baidu(secret_key: str = "canary-sk") -> Iterator[tuple[FakeBaidu, Running]]:
    with FakeBaidu(
        api_key="canary-ak", secret_key="canary-sk", access_key="a", iam_secret_key="b", v2_key="bce-v3/ALTAK-x/y"
    ) as fake:
        upstream = {"type": "baidu", "api_key": "canary-ak", "secret_key": secret_key, "base_url": fake.url}
        with running({"upstreams": {"baidu": upstream}, "cache": {"memory": None}}) as gateway:
            yield fake, gateway


async def test_any_number_of_concurrent_requests_fetch_one_token() -> None:
    with baidu() as (fake, gateway):
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=50), trust_env=False) as client:
            bodies = [{"model": MODEL, "input": [f"text {i}-{n}" for n in range(16)]} for i in range(50)]
            sent = (client.post(f"{gateway.base_url}/embeddings", json=body) for body in bodies)
            responses = await asyncio.gather(*sent)
        assert {response.status_code for response in responses} == {200}
        assert fake.token_requests == 1


def test_a_token_that_was_revoked_or_has_expired_is_renewed_once_and_the_client_sees_nothing() -> None:
    with baidu() as (fake, gateway):
        assert gateway.post({"model": MODEL, "input": "first"}).status_code == 200
        for end in (fake.invalidate_tokens, fake.expire_tokens):
            end()
            assert gateway.post({"model": MODEL, "input": f"after {end.__name__}"}).status_code == 200
        assert fake.token_requests == 3
        assert gateway.metric("upstream_retries_total") == 0


def test_a_refused_key_is_not_asked_in_a_loop_and_never_shown() -> None:
    with baidu(secret_key="canary-wrong-sk") as (fake, gateway):
        responses = [gateway.post({"model": MODEL, "input": f"text {i}"}) for i in range(5)]
        assert {(r.status_code, r.json()["error"]["code"]) for r in responses} == {(502, "upstream_auth")}
        assert fake.token_requests == 1
        shown = "".join(r.text + str(r.headers) for r in responses) + gateway.log.getvalue()
        assert "canary" not in shown


# --- shared by replicas -----------------------------------------------------------------------------


@contextmanager
def replicas(redis: RedisServer) -> Iterator[tuple[FakeBaidu, list[Running]]]:
    """Two gateways with the same key over one Redis, which holds their cache and whatever else they share."""
    with FakeBaidu(
        api_key="canary-ak", secret_key="canary-sk", access_key="a", iam_secret_key="b", v2_key="bce-v3/ALTAK-x/y"
    ) as fake:
        upstream = {"type": "baidu", "api_key": "canary-ak", "secret_key": "canary-sk", "base_url": fake.url}
        config = {
            "upstreams": {"baidu": upstream},
            "cache": {"memory": None, "redis": {"url": redis.url, "timeout": "2s"}},
        }
        with running(config) as one, running(config) as other:
            yield fake, [one, other]


def embeds(gateway: Running, text: str) -> None:
    response = gateway.post({"model": MODEL, "input": text})
    assert response.status_code == 200, response.text


def test_replicas_share_one_token_and_redis_never_holds_it_in_clear() -> None:
    with RedisServer() as redis, replicas(redis) as (fake, gateways):
        for number in range(4):
            embeds(gateways[number % 2], f"text {number}")
        assert fake.token_requests == 1
        client: Any = Redis.from_url(redis.url)
        keys = client.keys()
        held = b"".join(key + client.get(key) for key in keys)
        assert any(key.startswith(b"eg:token:") for key in keys)
        assert client.ttl(next(key for key in keys if key.startswith(b"eg:token:"))) > 0, "it goes when it ends"
        client.close()
        assert fake.tokens
        for secret in (*fake.tokens, "canary-ak", "canary-sk"):
            assert secret.encode() not in held


def test_a_token_that_was_revoked_is_fetched_again_by_the_first_and_taken_by_the_second() -> None:
    with RedisServer() as redis, replicas(redis) as (fake, gateways):
        for gateway in gateways:
            embeds(gateway, f"before {gateway.url}")
        fake.invalidate_tokens()
        for gateway in gateways:
            embeds(gateway, f"after {gateway.url}")
        assert fake.token_requests == 2


@pytest.mark.parametrize("value", [b"", b"garbage", b"24.forged-token", b"gAAAAA" + b"x" * 200])
def test_what_no_replica_has_sealed_is_not_taken(value: bytes) -> None:
    with RedisServer() as redis, replicas(redis) as (fake, gateways):
        embeds(gateways[0], "one")
        client: Any = Redis.from_url(redis.url)
        (name,) = client.keys("eg:token:*")
        client.set(name, value)
        client.close()
        embeds(gateways[1], "two")
        assert fake.token_requests == 2


def test_without_redis_each_replica_has_its_own() -> None:
    with RedisServer() as redis, replicas(redis) as (fake, gateways):
        redis.kill()
        for gateway in gateways:
            embeds(gateway, f"text {gateway.url}")
        assert fake.token_requests == 2


def test_replicas_that_start_together_fetch_one_token() -> None:
    with RedisServer() as redis, replicas(redis) as (fake, gateways), ThreadPoolExecutor() as pool:
        for done in [pool.submit(embeds, each, f"text {i}") for i in range(4) for each in gateways]:
            done.result()
        assert fake.token_requests == 1


def test_a_token_left_by_another_replica_that_is_stale_too_is_replaced_in_the_same_call() -> None:
    with RedisServer() as redis, replicas(redis) as (fake, (one, other)):
        embeds(one, "a")
        embeds(other, "b")
        fake.invalidate_tokens()
        embeds(one, "c")  # stores a new one, while `other` still has the first
        fake.invalidate_tokens()
        embeds(other, "d")
        embeds(one, "e")
        assert fake.token_requests == 3, "and the first takes it over"


def test_a_claim_whose_owner_died_holds_nobody_up_for_long() -> None:
    with RedisServer() as redis, replicas(redis) as (fake, (one, other)):
        embeds(one, "a")
        client: Any = Redis.from_url(redis.url)
        (name,) = client.keys("eg:token:*")
        client.delete(name)
        client.set(name + b":claim", b"1", px=200)
        client.close()
        embeds(other, "b")
        assert fake.token_requests == 2
