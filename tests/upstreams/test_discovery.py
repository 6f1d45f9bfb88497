"""Discovery: which models an upstream reports."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from app.catalog import ANY, CATALOG, Model
from app.clock import SystemClock
from app.errors import (
    GatewayError,
    ModelNotFound,
    UpstreamAuth,
    UpstreamError,
    UpstreamInvalidResponse,
    UpstreamMisconfigured,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from app.gateway import REFRESH_INTERVAL, Gateway
from app.main import create_app
from app.types import Send, WireReply, WireRequest
from app.upstreams import baidu, ollama, openai
from app.upstreams import upstream as upstream_module
from tests.clock import HandClock, settle
from tests.fakes import FakeOllama, FakeOpenAI, faults
from tests.harness import running, settings_of


def answering(routes: dict[str, Any], seen: list[WireRequest] | None = None) -> Send:
    """Acts as a server: path -> body, or (status, body), or a function of the request's body."""

    async def send(request: WireRequest) -> WireReply:
        if seen is not None:
            seen.append(request)
        answer = routes.get(request.url.split("11434")[-1].split("/v1")[-1], (404, {"error": "not found"}))
        if callable(answer):
            answer = answer(orjson.loads(request.body))
        status, body = answer if isinstance(answer, tuple) else (200, answer)
        return WireReply(status, {}, body if isinstance(body, bytes) else orjson.dumps(body))

    return send


LOCAL = openai.OpenAISettings(base_url="http://localhost:8000/v1/")


async def listed(body: Any) -> list[Model]:
    return list(await openai.discover(LOCAL, answering({"/models": body})) or ())


async def test_an_openai_compatible_server_is_asked_for_its_models() -> None:
    seen: list[WireRequest] = []
    send = answering({"/models": {"object": "list", "data": [{"id": "BAAI/bge-m3"}, {"id": "e5"}]}}, seen)
    found = await openai.discover(LOCAL, send)
    assert [request.url for request in seen] == ["http://localhost:8000/v1/models"]
    assert found == [
        Model("BAAI/bge-m3", None, None, 32, matryoshka_dimensions=(1024,), source="huggingface.co/BAAI/bge-m3"),
        Model("e5", None, ANY, 32),
    ]


async def test_infinitys_object_in_place_of_a_list_is_understood() -> None:
    assert [model.name for model in await listed({"data": {"id": "BAAI/bge-small"}})] == ["BAAI/bge-small"]


async def test_how_long_an_input_may_be_is_what_the_server_was_started_with() -> None:
    lengths: list[Any] = [256, None, 0, "256", 2.5]
    found = await listed({"data": [{"id": f"e{i}", "max_model_len": length} for i, length in enumerate(lengths)]})
    assert [model.max_tokens_per_input for model in found] == [256, None, None, None, None]
    [known] = await listed({"data": [{"id": "text-embedding-3-large", "max_model_len": 512}]})
    assert known.max_tokens_per_input == 512


async def test_an_entry_without_a_name_is_no_model() -> None:
    found = await listed({"data": [{"id": "e5"}, {"id": None}, {"id": ""}]})
    assert [model.name for model in found] == ["e5"]


async def test_a_model_the_catalogue_knows_has_its_facts_wherever_it_is_served() -> None:
    [model] = await listed({"data": [{"id": "text-embedding-3-large"}]})
    assert model == CATALOG["openai"]["text-embedding-3-large"]
    assert openai.unlisted_model("text-embedding-3-large") == model


@pytest.mark.parametrize("body", [b"<html>", [], {}, {"data": 5}, {"data": ["x"]}, {"data": [{}]}])
async def test_a_list_of_models_that_is_none_is_an_error(body: Any) -> None:
    with pytest.raises(UpstreamInvalidResponse):
        await listed(body)


async def test_a_list_of_more_models_than_any_server_has_is_an_error() -> None:
    names = [f"m{i}" for i in range(5_001)]
    assert len(await listed({"data": [{"id": name} for name in names[:-1]]})) == 5_000
    with pytest.raises(UpstreamInvalidResponse, match="5001 models"):
        await listed({"data": [{"id": name} for name in names]})
    server = answering({"/api/tags": {"models": [{"name": name} for name in names]}})
    with pytest.raises(UpstreamInvalidResponse, match="5001 models"):
        await ollama.discover(ollama.OllamaSettings(), server)


def test_and_so_is_one_of_more_bytes_but_what_is_configured_is_served() -> None:
    with FakeOpenAI(api_key=None, models={"m": 8, "x" * 2**24: 8}) as fake:
        upstream = {"type": "openai", "base_url": f"{fake.url}/v1"}
        models = {"docs": {"deployments": [{"upstream": "big", "model": "m"}]}}
        with running({"upstreams": {"big": upstream}, "models": models}) as gateway:
            assert "larger than 16777216 bytes" in gateway.get("/readyz").json()["upstreams"]["big"]["reason"]
            assert gateway.post({"model": "docs", "input": "x"}).status_code == 200


async def test_a_server_that_refuses_its_list_is_an_error() -> None:
    with pytest.raises(UpstreamAuth):
        await listed((401, {"error": {"message": "no"}}))


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_a_server_without_such_a_route_has_no_list_and_no_trouble(status: int) -> None:
    assert await openai.discover(LOCAL, answering({"/models": (status, b"Not Found")})) is None


def test_openais_own_models_are_known_and_no_other_servers_are() -> None:
    assert openai.models(openai.OpenAISettings.model_validate({"api_key": "k"})) == CATALOG["openai"]
    assert openai.models(LOCAL) == {}


# --- Ollama -----------------------------------------------------------------------------------------

NOMIC = {
    "name": "nomic-embed-text:latest",
    "digest": "0a109f422b47e3a30ba2b10eca18548e944e8a23073ee3f3e947efcf3c45e59f",
    "details": {"family": "nomic-bert", "context_length": 2048, "embedding_length": 768},
    "capabilities": ["embedding"],
}
CHAT = {"name": "llama3:8b", "digest": "ab", "details": {}, "capabilities": ["completion"]}


async def pulled(routes: dict[str, Any], **settings: Any) -> list[Model]:
    return list(await ollama.discover(ollama.OllamaSettings.model_validate(settings), answering(routes)))


async def test_ollama_serves_its_embedding_models_with_and_without_the_latest_tag() -> None:
    found = await pulled({"/api/tags": {"models": [NOMIC, CHAT, {**NOMIC, "name": "bge-m3:567m"}]}})
    assert [model.name for model in found] == ["nomic-embed-text:latest", "nomic-embed-text", "bge-m3:567m"]
    assert {model.revision for model in found} == {"0a109f422b47"}
    assert {(model.dimensions, model.max_tokens_per_input, model.max_batch) for model in found} == {(768, 2048, 16)}
    nomic, _, bge = found
    assert (nomic.matryoshka_dimensions, nomic.prefixes) == (None, ("search_query: ", "search_document: "))
    assert (bge.matryoshka_dimensions, bge.dimension_choices) == (None, ()), "the server shortens any of them"


async def test_what_ollama_has_that_nobody_knows_takes_whatever_it_takes() -> None:
    [model] = await pulled({"/api/tags": {"models": [{**NOMIC, "name": "my-own:1"}]}})
    assert (model.dimensions, model.dimension_choices, model.roles) == (768, ANY, ())


async def test_a_model_of_which_no_digest_is_told_has_none_in_its_space() -> None:
    tag = {key: value for key, value in NOMIC.items() if key != "digest"}
    [model, _] = await pulled({"/api/tags": {"models": [tag]}})
    assert model.revision == ""


async def test_an_operator_who_wants_long_texts_cut_has_no_limit_on_them() -> None:
    found = await pulled({"/api/tags": {"models": [NOMIC]}}, truncate=True)
    assert {model.max_tokens_per_input for model in found} == {None}


@pytest.mark.parametrize("status", [404, 403, 500])
async def test_a_length_that_the_list_lacks_is_asked_for_and_not_insisted_on(status: int) -> None:
    tag = {**NOMIC, "details": {"embedding_length": 768}}
    told = {"capabilities": ["embedding"], "model_info": {"x.embedding_length": 768, "x.context_length": 2048}}
    found = await pulled({"/api/tags": {"models": [tag]}, "/api/show": told})
    assert {(model.dimensions, model.max_tokens_per_input) for model in found} == {(768, 2048)}
    found = await pulled({"/api/tags": {"models": [tag]}, "/api/show": (status, {"error": "no"})})
    assert {(model.dimensions, model.max_tokens_per_input) for model in found} == {(768, None)}


@pytest.mark.parametrize("length", ["768", True, 0, -1, [768], None])
async def test_a_length_that_is_no_number_is_asked_for_as_well(length: Any) -> None:
    tag = {**NOMIC, "details": {"embedding_length": length, "context_length": length}}
    told = {"capabilities": ["embedding"], "model_info": {"x.embedding_length": 768, "x.context_length": 2048}}
    found = await pulled({"/api/tags": {"models": [tag]}, "/api/show": told})
    assert {(model.dimensions, model.max_tokens_per_input) for model in found} == {(768, 2048)}


async def test_baidus_oldest_model_is_known_by_its_pages_name_too() -> None:
    known, written = CATALOG["baidu"]["embedding-v1"], baidu.unlisted_model("Embedding-V1")
    assert written == dataclasses.replace(known, name="Embedding-V1", same_as="embedding-v1")
    assert written.space("baidu") == known.space("baidu")


def old(tag: dict[str, Any]) -> dict[str, Any]:
    return {"name": tag["name"], "digest": "sha256:0a109f422b47e3a3", "details": {"family": "x"}}


async def test_an_older_ollama_is_asked_model_by_model() -> None:
    shown: dict[str, Any] = {
        "nomic-embed-text:latest": {
            "capabilities": ["embedding"],
            "model_info": {
                "general.architecture": "nomic-bert",
                "nomic-bert.context_length": 2048,
                "nomic-bert.embedding_length": 768,
            },
        },
        "llama3:8b": {"capabilities": ["completion"], "model_info": {"llama.embedding_length": 4096}},
    }
    routes = {
        "/api/tags": {"models": [old(NOMIC), old(CHAT), {"name": "gone:1"}]},
        "/api/show": lambda body: shown.get(body["model"], (404, {"error": "model 'gone:1' not found"})),
    }
    [full, short] = await pulled(routes)
    assert (full.name, full.dimensions, full.max_tokens_per_input) == ("nomic-embed-text:latest", 768, 2048)
    assert (short.name, short.revision) == ("nomic-embed-text", "0a109f422b47")


async def test_a_model_that_ollama_cannot_read_costs_none_of_the_others() -> None:
    torn = (500, {"error": "unable to decode GGUF: unexpected EOF"})
    shown = {"nomic-embed-text:latest": {"model_info": {"general.architecture": "bert", "bert.embedding_length": 768}}}
    routes = {
        "/api/tags": {"models": [{"name": "torn:1"}, old(NOMIC), {"name": "torn:2"}]},
        "/api/show": lambda body: shown.get(body["model"], torn),
    }
    assert [model.name for model in await pulled(routes)] == ["nomic-embed-text:latest", "nomic-embed-text"]
    with pytest.raises(UpstreamError, match="unable to decode GGUF"):  # rather than "it has no models"
        await pulled(routes | {"/api/show": torn})


@pytest.mark.parametrize(
    ("info", "embeds"),
    [
        ({"general.architecture": "bert", "bert.embedding_length": 384}, True),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": 3, "qwen3.embedding_length": 1024}, True),
        ({"general.architecture": "llama", "llama.embedding_length": 4096}, False),
    ],
)
async def test_before_capabilities_a_model_is_known_by_its_layers(info: dict[str, Any], embeds: bool) -> None:
    found = await pulled({"/api/tags": {"models": [old(NOMIC)]}, "/api/show": {"model_info": info}})
    assert bool(found) is embeds


async def test_a_list_without_models_has_none() -> None:
    assert await pulled({"/api/tags": {"models": None}}) == []
    assert await pulled({"/api/tags": {"models": [5, {}, {"name": ""}]}, "/api/show": {}}) == []


async def test_a_server_that_is_no_ollama_is_an_error() -> None:
    with pytest.raises(UpstreamMisconfigured, match=r"^\(its base_url does not end in /api or /v1\) .*not found$"):
        await pulled({})
    with pytest.raises(UpstreamInvalidResponse):
        await pulled({"/api/tags": b"Ollama is running"})


# --- who fetches lists, and who else benefits --------------------------------------------------------------


class Listing:
    """In place of an upstream's list of models; it answers once `ready` is set."""

    def __init__(self) -> None:
        self.models: list[Model] = []
        self.asked = 0
        self.ready = asyncio.Event()
        self.ready.set()

    async def __call__(self, settings: Any, send: Send) -> list[Model]:
        del settings, send
        self.asked += 1
        await self.ready.wait()
        return self.models


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def two(clock: HandClock) -> AsyncIterator[tuple[Gateway, Listing, Listing]]:
    """A gateway over two upstreams that list their models."""
    server = {"type": "openai", "base_url": "http://127.0.0.1:9/v1"}
    gateway = create_app(settings_of({"upstreams": {"one": server, "two": server}}), clock=clock).gateway
    listings = Listing(), Listing()
    for upstream, listing in zip(gateway.upstreams.values(), listings, strict=True):
        upstream.kind = dataclasses.replace(upstream.kind, discover=listing)
    yield gateway, *listings
    for listing in listings:
        listing.ready.set()
    await gateway.aclose()


async def test_all_who_ask_for_a_new_model_at_once_get_it(two: tuple[Gateway, Listing, Listing]) -> None:
    gateway, one, _ = two
    one.models = [Model("new")]
    one.ready.clear()
    asking = [asyncio.create_task(gateway.find("new")) for _ in range(5)]
    await settle()
    one.ready.set()
    assert [(await each).name for each in asking] == ["new"] * 5
    assert one.asked == 1


async def test_a_list_that_comes_once_nobody_waits_for_it_any_more_counts_from_the_next_request_on(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_module, "FAILED_LIST_TIMEOUT", 0.01)
    models = {"docs": {"deployments": [{"upstream": "one", "model": "m"}]}}
    settings = settings_of(
        {"upstreams": {"one": {"type": "ollama", "base_url": "http://127.0.0.1:9"}}, "models": models}
    )
    gateway, listing = create_app(settings, clock=clock).gateway, Listing()
    upstream = gateway.upstreams["one"]
    upstream.kind = dataclasses.replace(upstream.kind, discover=listing)
    upstream.trouble = UpstreamError("it could not be listed")
    listing.models = [Model("m", revision="a")]
    listing.ready.clear()
    assert (await gateway.find("docs")).space == "ollama/m"
    listing.ready.set()
    await settle()
    assert (await gateway.find("docs")).space == "ollama/m@a"
    assert listing.asked == 1
    await gateway.aclose()


async def test_a_new_model_is_there_although_who_asked_first_hung_up(
    two: tuple[Gateway, Listing, Listing], clock: HandClock
) -> None:
    gateway, one, other = two
    one.models = [Model("new")]
    other.ready.clear()
    asking = asyncio.create_task(gateway.find("new"))
    await settle()
    asking.cancel()
    await settle()
    other.ready.set()
    await settle()
    assert (await gateway.find("new")).name == "new"
    with pytest.raises(ModelNotFound):
        await gateway.find("newer")
    one.models = [Model("new"), Model("newer")]
    with pytest.raises(ModelNotFound):  # the list is too recent to be fetched again
        await gateway.find("newer")
    await clock.advance(20)
    assert (await gateway.find("newer")).name == "newer"


@pytest.mark.parametrize(
    ("listing", "told"),
    [
        ({"base_url": "http://127.0.0.1:9/v1"}, (502, "upstream_unreachable")),
        ({"base_url": "http://no-such-host.invalid/v1"}, (502, "upstream_unreachable")),
        ({"api_key": "sk-refused"}, (502, "upstream_auth")),
    ],
)
def test_what_is_wrong_with_an_upstream_that_has_never_listed_its_models_is_what_its_callers_are_told(
    listing: dict[str, str], told: tuple[int, str]
) -> None:
    with FakeOpenAI(api_key="sk-right") as fake:
        fake.fail(faults.vendor_error("auth"), times=None, path="/models")
        up = {"type": "openai", "base_url": fake.url + "/v1", "api_key": "sk-right", **listing}
        with running({"upstreams": {"up": up}}) as gateway:
            response = gateway.post({"model": "up/text-embedding-3-small", "input": "hi"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == told
    assert "up cannot say what models there are: " in error["message"]
    assert "sk-right" not in response.text
    assert "sk-refused" not in response.text


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("auth", (502, "upstream_auth")),
        ("rate_limit", (429, "rate_limit_exceeded")),
        ("internal", (502, "upstream_error")),
    ],
)
@pytest.mark.parametrize("model", ["bge-m3", "text-embedding-3-small"])
def test_a_well_known_model_that_an_upstream_without_a_list_may_have_is_not_said_to_be_nowhere(
    kind: str, told: tuple[int, str], model: str
) -> None:
    with FakeOpenAI() as fake:
        fake.fail(faults.vendor_error(kind), times=None, path="/models")
        up = {"type": "openai", "base_url": fake.url + "/v1"}
        with running({"upstreams": {"up": up}}) as gateway:
            response = gateway.post({"model": model, "input": "hi"})
            assert gateway.post({"model": "nobody-knows-it", "input": "hi"}).status_code == 404
    assert (response.status_code, response.json()["error"]["code"]) == told


def test_an_upstream_that_cannot_have_a_model_has_no_part_in_the_answer() -> None:
    ollama = {"type": "ollama", "base_url": "http://127.0.0.1:9"}
    with FakeOpenAI() as fake:
        fake.fail(faults.vendor_error("auth"), times=None, path="/models")
        oai = {"type": "openai", "base_url": fake.url + "/v1"}
        with running({"upstreams": {"ollama": ollama, "oai": oai}}) as gateway:
            error = gateway.post({"model": "text-embedding-3-small", "input": "hi"}).json()["error"]
        with running({"upstreams": {"ollama": ollama}}) as gateway:
            assert gateway.post({"model": "text-embedding-3-small", "input": "hi"}).status_code == 404
    assert error["code"] == "upstream_auth"
    assert "and oai cannot say" in error["message"]


def test_what_is_left_of_a_key_where_the_words_of_an_ollama_without_a_list_are_cut_is_not_shown() -> None:
    key, page = "canary-0123456789", b"<p title='" + b"x" * 4062 + b"'>you sent canary-012345"
    assert len(page) == 4096, "what is looked at"
    with FakeOllama() as fake:
        fake.fail(faults.http_error(404, page + b"6789</p>"), times=None, path="/api/tags")
        with running({"upstreams": {"up": {"type": "ollama", "base_url": fake.url, "api_key": key}}}) as gateway:
            reason = gateway.get("/readyz").json()["upstreams"]["up"]["reason"]
    assert "base_url does not end in /api or /v1" in reason
    assert reason.endswith(": you sent ***")


def test_what_it_refuses_when_asked_for_its_list_is_no_callers_input() -> None:
    with FakeOpenAI() as fake:
        fake.fail(faults.http_error(400, b'{"error":{"message":"missing header"}}'), times=None, path="/models")
        up = {"type": "openai", "base_url": fake.url + "/v1", "api_key": "sk-fake"}
        with running({"upstreams": {"up": up}}) as gateway:
            response = gateway.post({"model": "up/text-embedding-3-small", "input": "hi"})
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_error")


def test_a_list_that_is_gone_for_a_moment_takes_no_model_away() -> None:
    """A proxy may answer 404 to everything while its server restarts."""
    with FakeOpenAI() as fake:
        up = {"type": "openai", "base_url": fake.url + "/v1", "api_key": "sk-fake"}
        with running({"upstreams": {"up": up}}) as gateway:
            asked = {"model": "text-embedding-3-small", "input": "hi"}
            assert gateway.post(asked).status_code == 200
            fake.fail(faults.http_error(404, b"no such route"), times=None, path="/models")
            gateway.app.gateway.upstreams["up"]._listed_at = None
            assert gateway.post({"model": "up/other", "input": "hi"}).status_code == 502
            assert gateway.get("/readyz").json()["upstreams"]["up"]["status"] == "down"
            assert gateway.post(asked).status_code == 200
            fake.heal()
            gateway.app.gateway.upstreams["up"]._listed_at = None
            assert gateway.post({"model": "up/other", "input": "hi"}).status_code == 404


async def test_a_name_that_two_upstreams_have_in_different_spaces_is_neithers_and_a_warning_says_so_once(
    two: tuple[Gateway, Listing, Listing], clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    gateway, one, other = two
    one.models, other.models = [Model("same", revision="a")], [Model("same", revision="b")]
    await gateway.refresh()
    assert {"one/same", "two/same"} <= gateway.names.keys()
    assert "same" not in gateway.names
    other.models = [*other.models, Model("new")]
    await clock.advance(31)
    await gateway.refresh()
    assert "new" in gateway.names
    told = "model same: its deployments are in different vector spaces and are kept apart: one/same, two/same"
    assert caplog.messages.count(told) == 1


async def test_an_upstream_that_hangs_keeps_nobody_waiting_for_the_others(
    two: tuple[Gateway, Listing, Listing], clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, one, other = two
    monkeypatch.setattr(upstream_module, "LIST_TIMEOUT", 0.05)
    one.models = [Model("new")]
    other.models = [Model("late")]
    other.ready.clear()
    assert (await asyncio.wait_for(gateway.find("new"), 5)).name == "new"
    for name in ("two/late", "bge-m3"):
        with pytest.raises(UpstreamTimeout, match="two cannot say"):
            await gateway.find(name)
    with pytest.raises(ModelNotFound, match="'late' does not exist, as far as the upstreams that can be reached know"):
        await gateway.find("late")
    with pytest.raises(ModelNotFound):
        await gateway.find("one/late")
    assert gateway.status()["upstreams"]["two"]["reason"]
    monkeypatch.setattr(upstream_module, "LIST_TIMEOUT", 30)
    await clock.advance(31)
    await asyncio.wait_for(gateway.refresh(), 5)  # later callers do not wait at all
    assert other.asked == 1
    await clock.advance(20)
    other.ready.set()
    await settle()
    assert (await gateway.find("two/late")).name == "late"
    assert gateway.status()["upstreams"]["two"]["status"] == "up"


async def test_nor_does_it_keep_the_end_waiting(two: tuple[Gateway, Listing, Listing], clock: HandClock) -> None:
    gateway, _, other = two
    asked = other.asked
    other.ready.clear()
    await clock.advance(31)
    asking = asyncio.create_task(gateway.refresh())
    await settle()
    assert other.asked == asked + 1
    await asyncio.wait_for(gateway.upstreams["two"].aclose(), 5)
    await asking
    assert other.asked == 1, "it answered just now, however long that took"


@pytest.mark.parametrize("trouble", [UpstreamTimeout, UpstreamError, UpstreamUnavailable])
async def test_a_list_that_did_not_come_the_last_time_keeps_nobody_waiting(
    two: tuple[Gateway, Listing, Listing], clock: HandClock, trouble: type[GatewayError]
) -> None:
    gateway, one, _ = two
    upstream = gateway.upstreams["one"]

    async def times_out(settings: Any, send: Send) -> list[Model]:
        del settings, send
        raise trouble("the upstream did not answer within 30 s")

    listed, upstream.kind = upstream.kind, dataclasses.replace(upstream.kind, discover=times_out)
    await gateway.refresh()
    upstream.kind = listed
    one.ready.clear()
    await clock.advance(upstream_module.LIST_RETRY)
    await asyncio.wait_for(gateway.refresh(), upstream_module.LIST_TIMEOUT / 2)
    assert one.asked == 1
    one.models = [Model("new")]
    one.ready.set()
    assert (await gateway.find("one/new")).name == "new"


async def test_and_who_asks_for_a_model_that_it_has_listed_does_not_ask_it(
    two: tuple[Gateway, Listing, Listing], clock: HandClock
) -> None:
    gateway, one, _ = two
    upstream, asked = gateway.upstreams["one"], 0
    one.models = [Model("known")]
    await gateway.refresh()

    async def times_out(settings: Any, send: Send) -> list[Model]:
        nonlocal asked
        del settings, send
        asked += 1
        raise UpstreamTimeout("the upstream did not answer within 30 s")

    upstream.kind = dataclasses.replace(upstream.kind, discover=times_out)
    await clock.advance(upstream_module.LIST_TTL)
    await gateway.refresh()
    await clock.advance(upstream_module.LIST_RETRY)
    assert upstream.unavailable
    await gateway.find("one/known")
    assert asked == 1


async def test_a_server_without_a_list_makes_nobody_wait_for_one(two: tuple[Gateway, Listing, Listing]) -> None:
    """It has the models that are configured for it: any other name is unknown."""
    gateway, _, _ = two

    async def has_none(settings: Any, send: Send) -> list[Model]:
        del settings, send
        raise UpstreamMisconfigured("there is no such route")

    gateway.upstreams["one"].kind = dataclasses.replace(gateway.upstreams["one"].kind, discover=has_none)
    with pytest.raises(ModelNotFound):
        await gateway.find("new")


async def test_a_bug_in_reading_a_list_is_told(
    two: tuple[Gateway, Listing, Listing], caplog: pytest.LogCaptureFixture
) -> None:
    gateway, _, other = two
    other.models = [Model("new")]

    async def fails(settings: Any, send: Send) -> list[Model]:
        raise KeyError(settings, send)

    gateway.upstreams["one"].kind = dataclasses.replace(gateway.upstreams["one"].kind, discover=fails)
    assert (await gateway.find("new")).name == "new"
    assert gateway.status()["upstreams"]["one"]["reason"] == "its list of models could not be read (KeyError)"
    assert [record.exc_info is not None for record in caplog.records if "upstream one" in record.message] == [True]


def available(gateway: Gateway, upstream: str, model: str) -> float | None:
    labels = {"upstream": upstream, "model": model}
    return gateway.metrics.registry.get_sample_value("embedding_gateway_upstream_available", labels)


async def test_a_model_that_was_pulled_anew_is_another_one_within_a_minute(
    two: tuple[Gateway, Listing, Listing], clock: HandClock
) -> None:
    gateway, one, _ = two
    one.models = [Model("m", revision="a")]
    await gateway.start()
    await settle()
    before = gateway.names["one/m"]
    before.deployments[0].health.end(UpstreamMisconfigured("who?"), 0)
    assert gateway.status()["upstreams"]["one"]["trouble"]
    one.models = [Model("m", revision="b")]
    await clock.advance(REFRESH_INTERVAL)
    await settle()
    after = gateway.names["one/m"]
    assert (before.space, after.space) == ("openai/m@a", "openai/m@b")
    assert gateway.status()["upstreams"]["one"] == {"status": "up", "models": 1}
    before.deployments[0].standing.take_out("what is under way there is nobody's business")
    assert available(gateway, "one", "m") == 1
    one.models = []
    await clock.advance(REFRESH_INTERVAL)
    await settle()
    assert "one/m" not in gateway.names
    assert available(gateway, "one", "m") is None


async def test_what_one_that_is_no_longer_in_force_learns_is_not_shown(two: tuple[Gateway, Listing, Listing]) -> None:
    gateway, _, other = two
    alone = settings_of({"upstreams": {"one": {"type": "openai", "base_url": "http://127.0.0.1:9/v1"}}})
    successor = Gateway(alone, gateway.cache, gateway.metrics, SystemClock(), None, gateway)
    gateway.hand_over(successor)
    other.models = [Model("new")]
    assert (await gateway.find("new")).name == "new", "by a request that is still inside"
    assert available(gateway, "two", "new") is None


async def test_what_cannot_be_asked_is_said_once(
    two: tuple[Gateway, Listing, Listing], clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    gateway, one, _ = two

    async def unavailable(settings: Any, send: Send) -> list[Model]:
        await one(settings, send)
        raise UpstreamUnreachable("no connection to the upstream")

    gateway.upstreams["one"].kind = dataclasses.replace(gateway.upstreams["one"].kind, discover=unavailable)
    await gateway.start()
    await settle()
    for _ in range(3):
        await clock.advance(REFRESH_INTERVAL)
        await settle()
    assert one.asked == 4
    assert [record.message for record in caplog.records if "upstream one" in record.message] == [
        "upstream one: cannot list its models: no connection to the upstream"
    ]


async def test_a_list_without_a_model_and_a_server_without_a_list_are_told_once(
    two: tuple[Gateway, Listing, Listing], clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    gateway, one, other = two
    one.models = []

    async def has_none(settings: Any, send: Send) -> None:
        await other(settings, send)

    gateway.upstreams["two"].kind = dataclasses.replace(gateway.upstreams["two"].kind, discover=has_none)
    await gateway.start()
    await settle()
    for _ in range(3):
        await clock.advance(REFRESH_INTERVAL)
        await settle()
    assert one.asked == other.asked == 4
    assert sorted(record.message for record in caplog.records if record.message.startswith("upstream ")) == [
        "upstream one has no model for embeddings: only what is configured is served",
        "upstream two has no list of models at its base_url, which ends in /v1 as a rule: "
        "only what is configured is served",
    ]


def test_a_tag_of_latest_makes_no_other_model() -> None:
    deployments = [{"upstream": "one", "model": "bge-m3"}, {"upstream": "two", "model": "bge-m3:latest"}]
    upstreams = {"one": {"type": "ollama"}, "two": {"type": "ollama", "base_url": "http://127.0.0.1:9"}}
    assert settings_of({"upstreams": upstreams, "models": {"m": {"deployments": deployments}}}).models["m"].deployments


@pytest.mark.parametrize("status", [500, 502, 503])
def test_what_was_not_there_when_the_gateway_started_is_asked_what_it_has_before_it_embeds(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_module, "LIST_RETRY", 0.0)
    models = {"docs": {"deployments": [{"upstream": "up", "model": "nomic-embed-text"}]}}
    with FakeOllama() as fake:
        fake.fail(faults.http_error(status, b"starting"), times=1, path="/api/tags")
        upstreams = {"up": {"type": "ollama", "base_url": fake.url}}
        with running({"upstreams": upstreams, "models": models}) as gateway:
            assert gateway.get("/readyz").json()["upstreams"]["up"]["reason"]
            response = gateway.post({"model": "docs", "input": "a text"})
            assert "@" in response.headers["x-embedding-space"], "the revision is part of the space"
            listed = [call.path for call in fake.requests].index("/api/embed")
            assert [call.path for call in fake.requests][:listed].count("/api/tags") == 2


def test_whom_a_server_that_is_away_does_not_concern_nobody_asks_it_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_module, "LIST_RETRY", 0.0)
    there = {"upstream": "there", "model": "nomic-embed-text", "space": "mine"}
    models = {"docs": {"deployments": [there, {**there, "upstream": "away"}]}}
    with FakeOllama() as fake, FakeOllama() as unavailable:
        unavailable.fail(faults.http_error(503, b"starting"), times=None)
        upstreams = {
            "there": {"type": "ollama", "base_url": fake.url},
            "away": {"type": "ollama", "base_url": unavailable.url},
        }
        with running({"upstreams": upstreams, "models": models}) as gateway:
            asked = len(unavailable.requests)
            assert gateway.post({"model": "docs", "input": "a text"}).status_code == 200
            assert [call.path for call in unavailable.requests][asked:].count("/api/tags") == 0
