"""Authentication: which callers, by which header, may use which models; and what stays open to everybody."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from socket import socket

import pytest

from app.api.auth import Keys
from app.config import AuthSettings
from app.errors import InvalidApiKey
from tests.api.support import FIXED_LENGTH, MODEL, OTHER_MODEL, RawReply, config, error_of, head, post, raw
from tests.counting import counting_calls
from tests.fakes import FakeOpenAI
from tests.harness import Running, running

ALL, HASHED, LIMITED, ALIASED, BULK = (f"canary-{name}-0123456789" for name in ("all", "hashed", "lim", "ali", "bulk"))
KEYS = {
    "all": {"key": ALL},
    "hashed": {"sha256": hashlib.sha256(HASHED.encode()).hexdigest().upper()},
    "limited": {"key": LIMITED, "models": [MODEL]},
    "aliased": {"key": ALIASED, "models": ["docs"]},
    "bulk": {"key": BULK, "lane": "bulk"},
}
GOOD = {"model": MODEL, "input": "hi"}


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as fake:
        yield fake


@pytest.fixture(scope="module")
def gateway(upstream: FakeOpenAI) -> Iterator[Running]:
    models = {"docs": {"aliases": ["docs-alias"], "deployments": [{"upstream": "up", "model": OTHER_MODEL}]}}
    with running(config(upstream, auth={"keys": KEYS}, models=models)) as gateway:
        yield gateway


@pytest.fixture
def fake(upstream: FakeOpenAI) -> FakeOpenAI:
    upstream.reset()
    return upstream


def lines(headers: dict[str, str]) -> list[str]:
    """Header lines as sent on the wire, with any blanks at their ends."""
    return [f"{name}: {value}" for name, value in headers.items()]


def said(gateway: Running, data: bytes) -> RawReply:
    reply = raw(gateway.url, data)
    assert reply is not None
    return reply


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        ({"Authorization": f"Bearer {ALL}"}, "all"),
        ({"Authorization": f"bearer {ALL}"}, "all"),
        ({"AUTHORIZATION": f"BEARER   {ALL}  "}, "all"),
        ({"api-key": ALL}, "all"),
        ({"x-api-key": ALL}, "all"),
        ({"X-API-Key": ALL}, "all"),
        ({"Authorization": "Bearer ", "api-key": ALL}, "all"),
        ({"Authorization": f"Basic {BULK}", "api-key": ALL}, "all"),
        ({"api-key": "", "x-api-key": ALL}, "all"),
        ({"Authorization": f"Bearer {BULK}", "api-key": ALL, "x-api-key": "wrong"}, "bulk"),
        ({"Authorization": f"Bearer {HASHED}"}, "hashed"),
        ({"api-key": HASHED}, "hashed"),
    ],
)
def test_a_key_in_any_of_the_three_headers_lets_its_owner_in(
    headers: dict[str, str], client: str, fake: FakeOpenAI, gateway: Running
) -> None:
    before = gateway.metric("requests_total", client=client, status="200")
    assert said(gateway, post(GOOD, *lines(headers))).status_code == 200
    assert gateway.metric("requests_total", client=client, status="200") == before + 1
    assert said(gateway, head("GET", "/v1/models", *lines(headers))).status_code == 200
    (call,) = fake.calls
    sent = repr(call.headers)
    assert not any(key in sent for key in (ALL, HASHED, BULK)), "a caller's key is none of the upstream's business"
    assert call.bearer == "sk-fake"


@pytest.mark.parametrize("empty", ["Authorization:", "api-key:", "authorization: "])
def test_an_empty_line_beside_a_key_counts_as_absent(empty: str, gateway: Running) -> None:
    name = empty.partition(":")[0]
    key = f"{name}: {ALL}" if name == "api-key" else f"{name}: Bearer {ALL}"
    for given in ([key, empty], [empty, key], [key, empty, f"x-api-key: {BULK}"]):
        before = gateway.metric("requests_total", client="all", status="200")
        assert said(gateway, post(GOOD, *given)).status_code == 200
        assert gateway.metric("requests_total", client="all", status="200") == before + 1
        assert said(gateway, head("GET", "/v1/models", *given)).status_code == 200


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "nothing": ({}, "didn't provide an API key"),
    "an empty bearer": ({"Authorization": "Bearer "}, "didn't provide an API key"),
    "a bare bearer": ({"Authorization": "Bearer"}, "didn't provide an API key"),
    "an empty header": ({"Authorization": ""}, "didn't provide an API key"),
    "empty headers": ({"api-key": " ", "x-api-key": ""}, "didn't provide an API key"),
    "no scheme": ({"Authorization": ALL}, "didn't provide an API key"),
    "another scheme": ({"Authorization": f"Basic {ALL}"}, "didn't provide an API key"),
    "a wrong key": ({"Authorization": "Bearer wrong"}, "Incorrect API key provided"),
    "a wrong key before a right one": ({"Authorization": "Bearer wrong", "api-key": ALL}, "Incorrect API key"),
    "a part of a key": ({"Authorization": f"Bearer {ALL[:-1]}"}, "Incorrect API key provided"),
    "more than a key": ({"Authorization": f"Bearer {ALL}x"}, "Incorrect API key provided"),
    "a key in capitals": ({"Authorization": f"Bearer {ALL.upper()}"}, "Incorrect API key provided"),
    "two keys": ({"Authorization": f"Bearer {ALL} {ALL}"}, "Incorrect API key provided"),
    "a key's own hash": ({"api-key": hashlib.sha256(HASHED.encode()).hexdigest()}, "Incorrect API key provided"),
    "the upstream's key": ({"Authorization": "Bearer sk-fake"}, "Incorrect API key provided"),
    "a client's name": ({"api-key": "all"}, "Incorrect API key provided"),
    "a long key": ({"api-key": "x" * 20_000}, "Incorrect API key provided"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_without_a_right_key_there_is_a_401_that_echoes_none(name: str, fake: FakeOpenAI, gateway: Running) -> None:
    headers, words = REFUSED[name]
    for data in (
        post(GOOD, *lines(headers)),
        post({"model": "unknown", "input": ""}, *lines(headers)),
        post(b"\xff", *lines(headers)),
        head("GET", "/v1/models", *lines(headers)),
        head("GET", f"/v1/models/{MODEL}", *lines(headers)),
    ):
        refused(said(gateway, data), words)
    assert not fake.calls


def refused(response: RawReply, words: str) -> None:
    assert response.status_code == 401
    error = error_of(response)
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    assert words in error["message"]
    assert "canary" not in response.content.decode()
    assert "wrong" not in response.content.decode()
    assert "retry-after" not in response.headers


@pytest.mark.parametrize("key", [b"\xff\xfe\x80", "schlüssel".encode(), "密钥".encode(), b"caf\xe9", b"\x80" * 3000])
@pytest.mark.parametrize("name", [b"Authorization: Bearer ", b"api-key: ", b"x-api-key: "])
def test_a_key_of_other_bytes_than_ascii_is_a_401(name: bytes, key: bytes, fake: FakeOpenAI, gateway: Running) -> None:
    for data in (post(GOOD), head("GET", "/v1/models")):
        reply = raw(gateway.url, data.replace(b"Host: gateway", b"Host: gateway\r\n" + name + key))
        assert reply is not None
        assert reply.status_code == 401
        assert error_of(reply)["code"] == "invalid_api_key"
    assert not fake.calls


def test_a_key_of_other_characters_than_ascii_works_by_its_hash() -> None:
    key = "schlüssel-密钥"
    digest = hashlib.sha256(key.encode()).hexdigest()
    with FakeOpenAI() as fake, running(config(fake, auth={"keys": {"it": {"sha256": digest}}})) as gateway:
        data = post(GOOD).replace(b"Host: gateway", b"Host: gateway\r\nAuthorization: Bearer " + key.encode())
        reply = raw(gateway.url, data)
        assert reply is not None
        assert reply.status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"])
@pytest.mark.parametrize("authorization", [None, "Bearer wrong"])
def test_what_operators_and_readers_need_is_open(path: str, authorization: str | None, gateway: Running) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    response = gateway.get(path, **headers)
    assert response.status_code == 200
    assert "canary" not in response.text


def refused_for_the_model(gateway: Running) -> tuple[float, float]:
    rejected = gateway.metric("rejected_requests_total", reason="model_not_allowed")
    return rejected, gateway.metric("requests_total", status="403", client="limited")


def test_a_key_with_a_list_of_models_opens_those_only(fake: FakeOpenAI, gateway: Running) -> None:
    for name in (MODEL, f"up/{MODEL}"):
        assert gateway.post({"model": name, "input": "hi"}, api_key=LIMITED).status_code == 200
    calls, counted = len(fake.calls), refused_for_the_model(gateway)
    for name in (OTHER_MODEL, f"up/{OTHER_MODEL}", FIXED_LENGTH, "docs", "docs-alias"):
        for path, body in (
            ("/v1/embeddings", {"model": name, "input": "hi"}),
            (f"/v1/engines/{name}/embeddings", {"model": MODEL, "input": "hi"}),
            (f"/openai/deployments/{name}/embeddings", {"input": "hi"}),
        ):
            response = gateway.post(body, path=path, api_key=LIMITED)
            assert response.status_code == 403
            error = error_of(response)
            assert (error["type"], error["code"], error["param"]) == (
                "invalid_request_error", "model_not_allowed", "model",
            )  # fmt: skip
            assert name in error["message"]
    assert len(fake.calls) == calls
    assert refused_for_the_model(gateway) == tuple(each + 15 for each in counted)


def test_a_model_is_opened_by_its_own_name_under_its_aliases_too(fake: FakeOpenAI, gateway: Running) -> None:
    for name in ("docs", "docs-alias"):
        assert gateway.post({"model": name, "input": name}, api_key=ALIASED).status_code == 200
    assert gateway.post({"model": OTHER_MODEL, "input": "hi"}, api_key=ALIASED).status_code == 403
    assert len(fake.calls) == 2


def test_a_model_that_a_key_does_not_open_is_not_shown_to_it(gateway: Running) -> None:
    def shown(key: str) -> set[str]:
        return {row["id"] for row in gateway.get("/v1/models", api_key=key).json()["data"]}

    assert shown(LIMITED) == {MODEL, f"up/{MODEL}"}
    assert shown(ALIASED) == {"docs", "docs-alias"}
    assert {MODEL, OTHER_MODEL, "docs", "docs-alias"} < shown(ALL)
    assert gateway.get(f"/v1/models/{MODEL}", api_key=LIMITED).status_code == 200
    for name in (OTHER_MODEL, "docs", "no-such-model"):
        response = gateway.get(f"/v1/models/{name}", api_key=LIMITED)
        assert response.status_code == 404
        assert error_of(response)["code"] == "model_not_found"


def test_of_an_upstream_that_is_away_only_those_hear_whose_key_lists_the_name(upstream: FakeOpenAI) -> None:
    with socket() as closed:  # bound and not listening: nobody else gets the port
        closed.bind(("127.0.0.1", 0))
        away = {"type": "openai", "base_url": f"http://127.0.0.1:{closed.getsockname()[1]}/v1"}
        keys = KEYS | {"lists": {"key": "canary-lists-0123456789", "models": ["hidden/m", "bge-m3"]}}
        configuration = config(upstream, auth={"keys": keys})
        configuration["upstreams"] |= {"hidden": away}
        with running(configuration) as gateway:
            for name in ("hidden/m", "bge-m3"):
                for key, status in ((LIMITED, 404), ("canary-lists-0123456789", 502), (ALL, 502)):
                    for response in (
                        gateway.post({"model": name, "input": "hi"}, api_key=key),
                        gateway.get(f"/v1/models/{name}", api_key=key),
                    ):
                        assert response.status_code == status
                        if status == 404:
                            assert error_of(response)["message"] == f"The model '{name}' does not exist"


@pytest.mark.parametrize(
    "path", ["/v1/models", f"/v1/models/{MODEL}", "/v1/models/no-such-model", "/healthz", "/readyz", "/metrics"]
)
def test_a_cache_on_the_way_is_told_to_keep_nothing(path: str, gateway: Running) -> None:
    """Caches know only `Authorization`: Varnish would serve the answer to an `api-key` to the next caller."""
    for headers in ((), (f"api-key: {ALL}",)):
        assert said(gateway, head("GET", path, *headers)).headers["cache-control"] == "no-store"


def test_a_refused_key_costs_no_room_and_counts_as_nobody(gateway: Running) -> None:
    before = gateway.metric("rejected_requests_total", reason="invalid_api_key")
    assert gateway.post(GOOD, api_key="wrong").status_code == 401
    assert gateway.metric("rejected_requests_total", reason="invalid_api_key") == before + 1
    assert gateway.metric("inflight_requests") == 0
    exposed = gateway.get("/metrics").text
    assert 'client="anonymous",model="other",status="401"' in exposed
    assert "canary" not in exposed


def test_without_keys_everybody_is_let_in_whatever_they_present() -> None:
    with FakeOpenAI() as fake, running(config(fake)) as gateway:
        for headers in ({}, {"Authorization": "Bearer sk-anything"}, {"api-key": "x"}):
            assert gateway.post(GOOD, **headers).status_code == 200
        assert gateway.metric("requests_total", client="anonymous", status="200") == 3
        assert [call.bearer for call in fake.calls] == ["sk-fake"] * 3


def test_whose_key_it_is_takes_as_long_among_thousands_and_where_digests_begin_alike() -> None:
    def keys(count: int) -> Keys:
        return Keys(AuthSettings.model_validate({"keys": {f"team-{i}": {"key": f"key-{i}"} for i in range(count)}}))

    few, many = keys(1), keys(3000)
    cost = []
    for each in (few, many):
        with counting_calls() as counted:
            each.tenant({b"api-key": b"key-0"})
        cost.append(counted.calls)
    assert cost[1] <= cost[0] + 3
    assert all(many.tenant({b"api-key": b"key-%d" % i}).caller.name == f"team-{i}" for i in range(3000))
    with pytest.raises(InvalidApiKey):
        many.tenant({b"api-key": b"key-3000"})
