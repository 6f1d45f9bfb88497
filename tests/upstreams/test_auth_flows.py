"""Rotation of keys, access tokens under concurrency, and Baidu's signature against published vectors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from urllib.parse import urlsplit

import orjson
import pytest

from app import logs
from app.clock import Clock
from app.errors import GatewayError, RateLimited, UpstreamAuth, UpstreamError, UpstreamInvalidResponse
from app.types import Auth, TokenStore, WireReply, WireRequest
from app.upstreams import auth, baidu, openai
from app.upstreams.access_token import FETCH_CLAIM, POLL_INTERVAL, AccessToken
from app.upstreams.signature import BceSignature, bce_authorization
from tests import clock as clocks


class HandClock:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_731_657_600.0  # 2024-11-15T08:00:00Z

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("no auth flow sleeps")


class Server:
    """Acts as the token server and the service behind it; its `send` is a `Send`."""

    def __init__(self, lifetime: float = 2_592_000) -> None:
        self.lifetime = lifetime
        self.issued = 0
        self.valid: set[str] = set()
        self.requests: list[WireRequest] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.refuse: WireReply | None = None
        self.stale_code = 110

    @property
    def served(self) -> list[str]:
        return [request.query["access_token"] for request in self.requests]

    async def send(self, request: WireRequest) -> WireReply:
        await asyncio.sleep(0)
        if request.url.endswith("/oauth/2.0/token"):
            return await self._token(request)
        self.requests.append(request)
        if request.query["access_token"] not in self.valid:
            return json_reply({"error_code": self.stale_code, "error_msg": "Access token invalid"})
        return json_reply({"data": []})

    async def _token(self, request: WireRequest) -> WireReply:
        assert request.method == "POST"
        assert request.query == {
            "grant_type": "client_credentials",
            "client_id": "the-api-key",
            "client_secret": "the-secret-key",
        }
        self.issued += 1
        number = self.issued
        await self.gate.wait()
        if self.refuse is not None:
            return self.refuse
        self.valid = {f"24.token-{number}"}
        return json_reply({"access_token": f"24.token-{number}", "expires_in": self.lifetime})


def json_reply(body: object, status: int = 200) -> WireReply:
    return WireReply(status, {"content-type": "application/json"}, orjson.dumps(body))


def flow(clock: Clock, store: TokenStore | None = None) -> AccessToken:
    settings = baidu.BaiduSettings.model_validate(
        {"type": "baidu", "api_key": "the-api-key", "secret_key": "the-secret-key"}
    )
    made = baidu.KIND.auth(settings, clock, store)
    assert isinstance(made, AccessToken)
    return made


def embedding() -> WireRequest:
    return WireRequest("POST", "https://aip.baidubce.com/embeddings", {"content-type": "application/json"}, b"{}")


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


# --- access tokens ----------------------------------------------------------------------------------


async def test_a_hundred_calls_at_once_fetch_one_token() -> None:
    server, token = Server(), flow(HandClock())
    replies = await asyncio.gather(*(token(embedding(), server.send) for _ in range(100)))
    assert [reply.body for reply in replies] == [b'{"data":[]}'] * 100
    assert server.issued == 1
    assert server.served == ["24.token-1"] * 100


async def test_the_request_given_is_left_as_it_was() -> None:
    request = embedding()
    await flow(HandClock())(request, Server().send)
    assert request == embedding()


@pytest.mark.parametrize("code", [100, 110, 111])
async def test_a_hundred_calls_refused_with_one_stale_token_refresh_it_once_and_are_replayed(
    code: int,
) -> None:
    server, token = Server(), flow(HandClock())
    await token(embedding(), server.send)
    server.valid, server.stale_code = set(), code
    replies = await asyncio.gather(*(token(embedding(), server.send) for _ in range(100)))
    assert {reply.body for reply in replies} == {b'{"data":[]}'}
    assert server.issued == 2
    assert server.served.count("24.token-2") == 100


async def test_a_refusal_that_comes_after_the_refresh_uses_the_new_token() -> None:
    server, token = Server(), flow(HandClock())
    await token(embedding(), server.send)
    late = asyncio.Event()

    async def slow(request: WireRequest) -> WireReply:
        reply = await server.send(request)
        if request.query.get("access_token") == "24.token-1":
            await late.wait()
        return reply

    server.valid = set()
    straggler = asyncio.create_task(token(embedding(), slow))
    await settle()
    await token(embedding(), server.send)
    late.set()
    assert (await straggler).body == b'{"data":[]}'
    assert server.issued == 2


async def test_a_token_refused_right_after_its_refresh_is_not_refreshed_again_by_the_same_call() -> None:
    server, token = Server(), flow(HandClock())

    async def never_valid(request: WireRequest) -> WireReply:
        server.valid = set()
        return await server.send(request)

    reply = await token(embedding(), never_valid)
    assert orjson.loads(reply.body)["error_code"] == 110
    assert server.issued == 2


async def test_other_errors_do_not_cost_a_token() -> None:
    server, token = Server(), flow(HandClock())

    async def busy(request: WireRequest) -> WireReply:
        if "access_token" in request.query:
            return json_reply({"error_code": 18, "error_msg": "qps"})
        return await server.send(request)

    await token(embedding(), busy)
    await token(embedding(), busy)
    assert server.issued == 1


@pytest.mark.parametrize(
    ("lifetime", "renewed_at", "why"),
    [(2_592_000, 2_592_000 - 3600, "an hour early"), (100, 90, "at nine tenths of a short life")],
)
async def test_a_token_is_renewed_before_it_expires_while_the_old_one_serves(
    lifetime: float, renewed_at: float, why: str
) -> None:
    clock, server = HandClock(), Server(lifetime)
    token = flow(clock)
    await token(embedding(), server.send)
    clock.now += renewed_at - 1
    await token(embedding(), server.send)
    await settle()
    assert server.issued == 1
    clock.now += 2
    server.gate.clear()
    await token(embedding(), server.send)  # it answers although the renewal hangs
    assert server.served[-1] == "24.token-1"
    server.gate.set()
    await settle()
    await token(embedding(), server.send)
    assert (server.issued, server.served[-1]) == (2, "24.token-2")


async def test_a_renewal_that_fails_is_left_alone_for_a_minute_while_the_old_token_serves() -> None:
    clock, server = HandClock(), Server(lifetime=10_000)
    token = flow(clock)
    await token(embedding(), server.send)
    clock.now += 9_100
    server.refuse = WireReply(500, {}, b"")
    for _ in range(5):
        assert (await token(embedding(), server.send)).body == b'{"data":[]}'
        await settle()
    assert server.issued == 2
    clock.now += 61
    server.refuse = None
    await token(embedding(), server.send)
    await settle()
    assert server.issued == 3


async def test_an_expired_token_is_replaced_first() -> None:
    clock, server = HandClock(), Server(lifetime=100)
    token = flow(clock)
    await token(embedding(), server.send)
    clock.now += 101
    await token(embedding(), server.send)
    assert server.served == ["24.token-1", "24.token-2"]


@pytest.mark.parametrize("status", [200, 400, 401])
async def test_a_refused_key_is_asked_about_once_a_minute(status: int) -> None:
    clock, server = HandClock(), Server()
    token = flow(clock)
    server.refuse = json_reply({"error": "invalid_client", "error_description": "unknown client id"}, status)
    results = await asyncio.gather(*(token(embedding(), server.send) for _ in range(10)), return_exceptions=True)
    assert all(isinstance(result, UpstreamAuth) for result in results)
    for _ in range(3):
        with pytest.raises(UpstreamAuth, match="unknown client id"):
            await token(embedding(), server.send)
    assert server.issued == 1
    clock.now += 61
    server.refuse = None
    await token(embedding(), server.send)
    assert server.issued == 2


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (json_reply({"error": "rate_limit_exceeded"}, 400), RateLimited),
        (json_reply({"error": "unknown_error"}, 400), UpstreamError),
        (json_reply({"error": "unsupported_grant_type"}, 400), UpstreamAuth),
        (json_reply({"error": "internal_error"}, 500), UpstreamError),
        (WireReply(503, {}, b"<html>"), GatewayError),
        (WireReply(500, {}, b"[]"), UpstreamError),
        (WireReply(200, {}, b"<html>"), UpstreamInvalidResponse),
        (json_reply([]), UpstreamInvalidResponse),
        (json_reply({"access_token": "", "expires_in": 5}), UpstreamInvalidResponse),
        (json_reply({"access_token": 5, "expires_in": 5}), UpstreamInvalidResponse),
        (json_reply({"access_token": "x", "expires_in": "inf"}), UpstreamInvalidResponse),
        (json_reply({"access_token": "x", "expires_in": "soon"}), UpstreamInvalidResponse),
        (json_reply({"access_token": "x", "expires_in": -1}), UpstreamInvalidResponse),
        (json_reply({"access_token": "x"}), UpstreamInvalidResponse),
    ],
)
async def test_a_token_server_in_trouble_is_named_and_asked_again_by_the_next_call(
    reply: WireReply, kind: type[GatewayError]
) -> None:
    server, token = Server(), flow(HandClock())
    server.refuse = reply
    with pytest.raises(kind) as caught:
        await token(embedding(), server.send)
    assert "the-secret-key" not in str(caught.value)
    assert isinstance(caught.value, UpstreamAuth) == (kind is UpstreamAuth)
    server.refuse = None
    if kind is not UpstreamAuth:
        await token(embedding(), server.send)
        assert server.issued == 2


class Shelf:
    """Stores one token for two replicas; each of `meanwhile` runs once, before a claim is granted."""

    def __init__(self) -> None:
        self.held: bytes | None = None
        self.meanwhile: list[Awaitable[object]] = []
        self.claims = 0
        self.claimed_elsewhere = False

    async def get(self, name: bytes) -> bytes | None:
        del name
        return self.held

    async def put(self, name: bytes, sealed: bytes, seconds: float) -> None:
        del name, seconds
        self.held = sealed

    async def claim(self, name: bytes, seconds: float) -> bool:
        del name, seconds
        if self.meanwhile:
            await self.meanwhile.pop()
        self.claims += 1
        return not self.claimed_elsewhere

    async def release(self, name: bytes) -> None:
        del name
        self.claims -= 1


async def test_a_token_that_another_replica_leaves_just_before_the_claim_is_taken() -> None:
    server, shelf = Server(), Shelf()
    one, other = flow(HandClock(), shelf), flow(HandClock(), shelf)
    shelf.meanwhile.append(one(embedding(), server.send))
    await other(embedding(), server.send)
    assert server.issued == 1
    assert server.served == ["24.token-1"] * 2
    assert shelf.claims == 0


async def test_a_token_of_another_replica_is_renewed_in_time_and_not_taken_again() -> None:
    clock, server, shelf = clocks.HandClock(), Server(lifetime=100), Shelf()
    one, other, third = (flow(clock, shelf) for _ in range(3))
    await one(embedding(), server.send)
    await other(embedding(), server.send)
    assert server.issued == 1
    clock.now += 91  # the token is valid for another nine seconds
    await other(embedding(), server.send)
    await settle()
    assert server.issued == 2
    assert shelf.held is not None
    clock.now += 91
    await third(embedding(), server.send)
    assert (server.issued, server.served[-1]) == (3, "24.token-3")


async def test_who_has_the_fetching_to_itself_holds_others_up_for_as_long_as_that_may_take() -> None:
    clock, server, shelf = clocks.HandClock(), Server(), Shelf()
    shelf.claimed_elsewhere = True
    asked = asyncio.create_task(flow(clock, shelf)(embedding(), server.send))
    while not asked.done() and clock.now < 1000 + 2 * FETCH_CLAIM:
        await clock.advance(POLL_INTERVAL)
        assert not server.issued or clock.now > 1000 + FETCH_CLAIM
    assert (await asyncio.wait_for(asked, 30)).body == b'{"data":[]}'


async def test_a_caller_who_leaves_while_the_token_is_fetched_takes_it_from_nobody() -> None:
    server, token = Server(), flow(HandClock())
    server.gate.clear()
    first = asyncio.create_task(token(embedding(), server.send))
    await settle()
    others = [asyncio.create_task(token(embedding(), server.send)) for _ in range(5)]
    await settle()
    first.cancel()
    await settle()
    assert first.cancelled()
    server.gate.set()
    assert {reply.body for reply in await asyncio.gather(*others)} == {b'{"data":[]}'}
    assert server.issued == 1


async def test_a_fetch_that_everybody_left_may_fail_in_silence() -> None:
    server, token = Server(), flow(HandClock())
    server.gate.clear()
    server.refuse = WireReply(500, {}, b"")
    only = asyncio.create_task(token(embedding(), server.send))
    await settle()
    only.cancel()
    await settle()
    server.gate.set()
    await settle()
    server.refuse = None
    assert (await token(embedding(), server.send)).status == 200


# --- keys -------------------------------------------------------------------------------------------


async def headers_sent(flow: Auth, times: int, request: WireRequest | None = None) -> list[dict[str, str]]:
    sent: list[dict[str, str]] = []

    async def send(request: WireRequest) -> WireReply:
        sent.append(request.headers)
        return WireReply(200, {}, b"")

    for _ in range(times):
        await flow(request or embedding(), send)
    return sent


async def test_several_keys_take_turns() -> None:
    sent = await headers_sent(auth.bearer(["one", "two", "three"], openai.parse_error, HandClock()), 4)
    assert [headers["authorization"] for headers in sent] == [
        "Bearer one",
        "Bearer two",
        "Bearer three",
        "Bearer one",
    ]
    assert all(headers["content-type"] == "application/json" for headers in sent)


class Keyed:
    """Acts as a service that refuses some keys; its `send` is a `Send`."""

    def __init__(self, **against: WireReply) -> None:
        self.against = against
        self.asked: list[str] = []

    async def send(self, request: WireRequest) -> WireReply:
        key = request.headers["authorization"].removeprefix("Bearer ")
        self.asked.append(key)
        return self.against.get(key) or WireReply(200, {}, b"{}")


def refusal(status: int, code: str, **headers: str) -> WireReply:
    return WireReply(status, headers, orjson.dumps({"error": {"message": "no", "type": code, "code": code}}))


async def test_where_no_key_is_taken_what_will_pass_is_told() -> None:
    limited = refusal(429, "rate_limit_exceeded")
    service = Keyed(one=refusal(401, "invalid_api_key"), two=limited, three=refusal(429, "insufficient_quota"))
    flow = auth.bearer(["one", "two", "three"], openai.parse_error, HandClock())
    assert await flow(embedding(), service.send) is limited
    assert service.asked == ["one", "two", "three"]
    first, later = (refusal(429, "rate_limit_exceeded", **{"retry-after": wait}) for wait in ("1", "50"))
    for soon, late in ((first, later), (limited, first)):  # a limit without Retry-After passes first
        for one, two in ((soon, late), (late, soon)):
            flow = auth.bearer(["one", "two"], openai.parse_error, HandClock())
            assert await flow(embedding(), Keyed(one=one, two=two).send) is soon
    failed = refusal(500, "server_error")
    service = Keyed(one=limited, two=failed)
    flow = auth.bearer(["one", "two", "three"], openai.parse_error, HandClock())
    assert await flow(embedding(), service.send) is failed


@pytest.mark.parametrize(
    "reply",
    [refusal(401, "invalid_api_key"), refusal(429, "insufficient_quota"), refusal(429, "rate_limit_exceeded")],
    ids=["refused", "used up", "at its rate"],
)
async def test_a_key_that_is_no_good_leaves_the_rotation_alone_and_nobody_notices(reply: WireReply) -> None:
    service = Keyed(two=reply)
    flow = auth.bearer(["one", "two", "three"], openai.parse_error, HandClock())
    replies = [await flow(embedding(), service.send) for _ in range(6)]
    assert {reply.status for reply in replies} == {200}
    assert service.asked.count("two") == 1


async def test_a_key_that_is_left_out_is_not_asked_where_another_is_at_its_rate() -> None:
    service = Keyed(two=refusal(401, "invalid_api_key"))
    flow = auth.bearer(["one", "two"], openai.parse_error, HandClock())
    for _ in range(2):
        await flow(embedding(), service.send)
    service.against["one"] = refusal(429, "rate_limit_exceeded")
    service.asked.clear()
    assert (await flow(embedding(), service.send)).status == 429
    assert service.asked == ["one"]


async def test_where_all_are_left_out_the_one_that_is_back_first_is_asked_alone() -> None:
    used_up, limited = refusal(429, "insufficient_quota"), refusal(429, "rate_limit_exceeded", **{"retry-after": "7"})
    service = Keyed(one=used_up, two=limited, three=used_up)
    flow = auth.bearer(["one", "two", "three"], openai.parse_error, HandClock())
    await flow(embedding(), service.send)
    service.asked.clear()
    await flow(embedding(), service.send)
    assert service.asked == ["two"]


async def test_what_every_key_is_refused_for_leaves_none_of_them_out() -> None:
    """The account may not use this model, though it may use others."""
    service = Keyed(one=refusal(403, "no_such_right"), two=refusal(403, "no_such_right"))
    flow = auth.bearer(["one", "two"], openai.parse_error, HandClock())
    assert (await flow(embedding(), service.send)).status == 403
    assert sorted(service.asked) == ["one", "two"]
    service.against.clear()
    service.asked.clear()
    for _ in range(6):
        await flow(embedding(), service.send)
    assert service.asked.count("one") == service.asked.count("two") == 3


class PerModel(Keyed):
    """Acts as a service where each of these keys is used up for one model."""

    def __init__(self, **used_up: str) -> None:
        super().__init__()
        self.used_up = used_up

    async def send(self, request: WireRequest) -> WireReply:
        reply = await super().send(request)
        used_up = self.used_up.get(self.asked[-1]) == orjson.loads(request.body)["model"]
        return refusal(429, "insufficient_quota") if used_up else reply


def of_model(name: str) -> WireRequest:
    return WireRequest("POST", "https://vendor.example/embeddings", {}, orjson.dumps({"model": name}))


async def test_keys_that_are_used_up_for_one_model_each_serve_the_other_one(caplog: pytest.LogCaptureFixture) -> None:
    clock, service = HandClock(), PerModel(one="v1", two="v4")
    flow = auth.bearer(["one", "two"], openai.parse_error, clock)
    models = ["v1", "v4"] * 8
    assert {(await flow(of_model(name), service.send)).status for name in models} == {200}
    assert len(service.asked) <= 2 * len(models)
    service.asked.clear()
    assert {(await flow(of_model("v4"), service.send)).status for _ in range(4)} == {200}
    assert service.asked == ["one"] * 4, "while only one model is asked for, no call is repeated"
    told = [f"vendor.example: key {key} of 2 is not used for 600 s: insufficient_quota" for key in (1, 2)]
    assert caplog.messages == told
    clock.now += logs.LOG_INTERVAL
    for name in models:
        await flow(of_model(name), service.send)
    assert sorted(caplog.messages) == sorted(told * 2), "once a minute"


async def test_a_model_that_no_key_may_be_used_for_any_more_leaves_every_key_to_the_others() -> None:
    class Ticking(HandClock):
        def monotonic(self) -> float:
            self.now += 0.001
            return self.now

    service = PerModel(one="v1", two="v1")
    flow = auth.bearer(["one", "two"], openai.parse_error, Ticking())
    assert (await flow(of_model("v1"), service.send)).status == 429
    service.asked.clear()
    for _ in range(6):
        await flow(of_model("v4"), service.send)
    assert service.asked.count("one") == service.asked.count("two") == 3


async def test_a_success_that_was_under_way_frees_no_key_that_is_at_its_rate_since() -> None:
    service, ready = Keyed(), asyncio.Event()
    flow = auth.bearer(["one", "two"], openai.parse_error, HandClock())

    async def slow(request: WireRequest) -> WireReply:
        reply = await service.send(request)
        await ready.wait()
        return reply

    early = asyncio.create_task(flow(embedding(), slow))
    await settle()
    await flow(embedding(), service.send)
    service.against["one"] = refusal(429, "rate_limit_exceeded", **{"retry-after": "7"})
    await flow(embedding(), service.send)
    ready.set()
    assert (await early).status == 200
    service.asked.clear()
    for _ in range(3):
        await flow(embedding(), service.send)
    assert service.asked == ["two"] * 3


async def test_a_key_comes_back_after_its_rate_limit_and_a_refused_one_much_later() -> None:
    clock = HandClock()
    service = Keyed(
        one=refusal(429, "rate_limit_exceeded", **{"retry-after": "7"}), two=refusal(401, "invalid_api_key")
    )
    flow = auth.bearer(["one", "two", "three"], openai.parse_error, clock)
    await flow(embedding(), service.send)
    service.against.clear()
    clock.now += 8
    service.asked.clear()
    for _ in range(4):
        await flow(embedding(), service.send)
    assert set(service.asked) == {"one", "three"}
    clock.now += 600
    for _ in range(3):
        await flow(embedding(), service.send)
    assert "two" in service.asked


async def test_a_key_that_is_refused_while_others_serve_is_told_to_the_operator(
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = Keyed(
        one=refusal(429, "rate_limit_exceeded"),
        two=refusal(401, "invalid_api_key"),
        three=refusal(429, "insufficient_quota"),
    )
    flow = auth.bearer(["one", "two", "three", "four"], openai.parse_error, HandClock())
    for _ in range(8):
        await flow(embedding(), service.send)
    host = urlsplit(embedding().url).hostname
    assert caplog.messages == [
        f"{host}: key 2 of 4 is not used for 600 s: upstream_auth",
        f"{host}: key 3 of 4 is not used for 600 s: insufficient_quota",
    ]


@pytest.mark.parametrize("reply", [refusal(401, "invalid_api_key"), refusal(429, "insufficient_quota")])
async def test_while_a_key_is_at_its_rate_nobody_is_told_that_the_others_are_no_good(reply: WireReply) -> None:
    limited = refusal(429, "rate_limit_exceeded", **{"retry-after": "7"})
    service = Keyed(one=limited)
    flow = auth.bearer(["one", "two"], openai.parse_error, HandClock())
    await flow(embedding(), service.send)
    service.against["two"] = reply
    service.asked.clear()
    assert await flow(embedding(), service.send) is limited
    assert service.asked == ["two", "one"]
    service.asked.clear()
    assert await flow(embedding(), service.send) is limited
    assert service.asked == ["one"], "the other one is not used now"


async def test_a_rest_that_is_told_as_a_date_has_an_end() -> None:
    clock = HandClock()
    service = Keyed(one=refusal(429, "rate_limit_exceeded", **{"retry-after": "1732000000"}))
    flow = auth.bearer(["one", "two"], openai.parse_error, clock)
    await flow(embedding(), service.send)
    service.against.clear()
    service.asked.clear()
    clock.now += 601
    for _ in range(2):
        await flow(embedding(), service.send)
    assert sorted(service.asked) == ["one", "two"]


async def test_when_no_key_is_any_good_the_refusal_is_told_and_each_was_asked_once() -> None:
    bad = refusal(401, "invalid_api_key")
    service = Keyed(one=bad, two=bad)
    reply = await auth.bearer(["one", "two"], openai.parse_error, HandClock())(embedding(), service.send)
    assert reply.status == 401
    assert sorted(service.asked) == ["one", "two"]


@pytest.mark.parametrize("bad", [refusal(401, "invalid_api_key"), refusal(429, "insufficient_quota")])
async def test_while_no_key_is_any_good_each_call_asks_one_and_now_and_then_all(bad: WireReply) -> None:
    clock, service = HandClock(), Keyed(one=bad, two=bad, three=bad)
    flow = auth.bearer(["one", "two", "three"], openai.parse_error, clock)
    asked = []
    for seconds in (0, 0, 0, 0, auth.IN_VAIN, 0):
        clock.now += seconds
        service.asked.clear()
        assert (await flow(embedding(), service.send)).status == bad.status
        asked.append(len(service.asked))
    assert asked == [3, 1, 1, 1, 3, 1]
    del service.against["two"]
    for _ in range(3):
        await flow(embedding(), service.send)
    service.asked.clear()
    assert (await flow(embedding(), service.send)).status == 200
    assert service.asked == ["two"], "the others are known to be no good"


async def test_no_key_is_no_header() -> None:
    assert await headers_sent(auth.bearer([], openai.parse_error, HandClock()), 1) == [embedding().headers]


async def test_a_key_may_go_in_another_header() -> None:
    [sent] = await headers_sent(auth.HeaderKey("api-key", ["one"], openai.parse_error, HandClock()), 1)
    assert sent["api-key"] == "one"
    assert "authorization" not in sent


# --- signatures -------------------------------------------------------------------------------------

AK, SK = "ALTAKexampleak0000000001", "exampleSecretKey00000000000000001"
DATE = "2024-11-15T08:00:00Z"
PATH = "/rpc/2.0/ai_custom/v1/wenxinworkshop/embeddings/embedding-v1"


def test_the_signature_of_baidus_upload_part_example() -> None:
    headers = {
        "Host": "bj.bcebos.com",
        "Content-Type": "text/plain",
        "Content-Length": "8",
        "Content-Md5": "NFzcPqhviddjRNnSOGo4rw==",
        "x-bce-date": "2015-04-27T08:23:49Z",
    }
    query = {"partNumber": "9", "uploadId": "a44cc9bab11cbd156984767aad637851"}
    path = "/v1/test/myfolder/readme.txt"
    value = bce_authorization(
        "a" * 32,
        "b" * 32,
        "PUT",
        path,
        query,
        headers,
        timestamp="2015-04-27T08:23:49Z",
        expires_in=1800,
        signed=[name.lower() for name in headers],
    )
    assert value.endswith("/d74a04362e6a848f5b39b15421cb449427f419c95a480fd6b8cf9fc783e2999e")


async def test_an_embedding_request_is_signed_as_baidus_sdk_signs_it() -> None:
    request = WireRequest("POST", "https://aip.baidubce.com" + PATH, {"content-type": "application/json"})
    [sent] = await headers_sent(BceSignature(AK, SK, HandClock()), 1, request)
    assert sent == {
        "content-type": "application/json",
        "host": "aip.baidubce.com",
        "x-bce-date": DATE,
        "authorization": f"bce-auth-v1/{AK}/{DATE}/1800/host;x-bce-date/"
        "a333f51c0d7516f906ee6aea46f69e7d9d6a77fb8c39f8ac3e439414fd2d2e89",
    }
    assert request.headers == {"content-type": "application/json"}


def test_the_signature_of_the_qianfan_sdks_own_headers() -> None:
    headers = {
        "Content-Type": "application/json",
        "Host": "aip.baidubce.com",
        "request_id": "sdk-py-0.4.12.3-abc",
        "x-bce-date": DATE,
    }
    names = ("x-bce-date", "request_id", "host", "content-type")
    value = bce_authorization(AK, SK, "POST", PATH, {}, headers, timestamp=DATE, expires_in=300, signed=names)
    assert value.endswith(
        "/content-type;host;request_id;x-bce-date/0d5cbd51c605325563bda2ccfa72753fabd61c75b337b3623c3f5a5352b21648"
    )


def test_the_signature_of_a_get_with_a_query() -> None:
    value = bce_authorization(
        AK,
        SK,
        "GET",
        "/v1/BCE-BEARER/token",
        {"expireInSeconds": "43200", "authorization": "left out"},
        {"host": "iam.bj.baidubce.com", "x-bce-date": DATE},
        timestamp=DATE,
        expires_in=300,
        signed=("host", "x-bce-date"),
    )
    assert value.endswith("/host;x-bce-date/595c6d4f57fe8afe851f3febffbe11559e7d874d3ac5aeb3bf059f53715cfa63")


async def test_a_port_is_part_of_the_signed_host() -> None:
    request = WireRequest("POST", "http://127.0.0.1:8099/rpc/x")
    [sent] = await headers_sent(BceSignature(AK, SK, HandClock()), 1, request)
    assert sent["host"] == "127.0.0.1:8099"
