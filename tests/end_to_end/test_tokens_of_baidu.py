"""Baidu's access token: fetched once, renewed unseen, and a refused key is not asked in a loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.fakes import FakeBaidu
from tests.harness import Running, running

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
