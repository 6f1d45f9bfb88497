"""Servers with their own variant of OpenAI's API, by configuration alone and through the whole program."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from tests.fakes import FakeOpenAI, faults
from tests.fakes.upstream import Embedded
from tests.fakes.vectors import Row
from tests.fakes.wire import Reply, json_reply
from tests.harness import running

HOSTED = "BAAI/bge-m3"
OPENAI_S = "Expected an array with maximum length 10, but got an array with length 32 instead."
FASTAPI_S = {"loc": ["body", "input", "list"], "msg": "List should have at most 10 items after validation, not 32"}


def config(fake: FakeOpenAI, base: str = "/v1", **upstream: Any) -> dict[str, Any]:
    return {"upstreams": {"up": {"type": "openai", "base_url": fake.url + base, **upstream}}}


def right(fake: FakeOpenAI, response: httpx.Response, model: str, texts: list[str]) -> None:
    assert response.status_code == 200, response.text
    for text, row in zip(texts, response.json()["data"], strict=True):
        assert np.array_equal(np.array(row["embedding"], "<f4"), fake.expected(model, text))


def test_azure_is_asked_at_the_deployment_with_its_own_header_and_version() -> None:
    deployed = {"DEPLOYMENT": "text-embedding-3-small"}
    with FakeOpenAI(api_key="sk-azure", deployments=deployed) as fake:
        settings = config(
            fake,
            "/openai/deployments/DEPLOYMENT",
            auth="api-key",
            api_key="sk-azure",
            query={"api-version": "2024-10-21"},
        )
        models = {"my-embedding": {"deployments": [{"upstream": "up", "model": "text-embedding-3-small"}]}}
        with running({**settings, "models": models}) as gateway:
            right(fake, gateway.post({"model": "my-embedding", "input": ["a"]}), "text-embedding-3-small", ["a"])
            ready = gateway.get("/readyz").json()["upstreams"]
        (call,) = fake.calls
        assert ready == {"up": {"status": "up", "models": 0}}, "it has no list of models, and needs none"
        assert call.path == "/openai/deployments/DEPLOYMENT/embeddings"
        assert call.query == {"api-version": "2024-10-21"}
        assert call.headers["api-key"] == "sk-azure"
        assert "authorization" not in call.headers


def test_what_a_server_without_a_list_of_models_has_is_what_is_configured_for_it() -> None:
    """A deployment on Azure: its other routes answer 404, as TEI's list of models does."""
    deployed = {"D": "text-embedding-3-small"}
    azure: dict[str, Any] = {"auth": "api-key", "api_key": "sk-fake", "query": {"api-version": "2024-10-21"}}
    models = {"mine": {"deployments": [{"upstream": "up", "model": "text-embedding-3-small"}]}}
    with FakeOpenAI(deployments=deployed) as fake:
        settings = {**config(fake, "/openai/deployments/D", **azure), "models": models}
        with running(settings) as gateway:
            known = gateway.post({"model": "up/text-embedding-3-small", "input": ["a"]})
            unknown = gateway.post({"model": "up/other", "input": ["a"]})
        right(fake, known, "text-embedding-3-small", ["a"])
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


NO_ROUTE = faults.http_error(404, b'{"detail": "Not Found"}')


def without_list(fake: FakeOpenAI) -> FakeOpenAI:
    fake.fail(NO_ROUTE, times=None, path="/models")
    return fake


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_that_is_called_as_openai_is_and_has_no_list_serves_openais_models(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002"]
    with FakeOpenAI() as fake:
        fake.fail(faults.http_error(status, b"no"), times=None, path="/models")
        environ = {"OPENAI_API_KEY": "sk-fake", "OPENAI_BASE_URL": fake.url + "/v1"}
        with running({}, environ) as gateway:
            for name in names:
                right(fake, gateway.post({"model": name, "input": [name]}), name, [name])
                assert gateway.post({"model": f"openai/{name}", "input": name}).status_code == 200
            listed = gateway.get("/v1/models").json()["data"]
            unknown = gateway.post({"model": "openai/other", "input": "a"})
            ready = gateway.get("/readyz").json()["upstreams"]
    assert {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072}.items() <= {
        each["id"]: each["dimensions"] for each in listed
    }.items()
    assert ready == {"openai": {"status": "up", "models": 3}}
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert unknown.json()["error"]["message"] == (
        "The model 'openai/other' does not exist; openai has no list of models: what else it has must be named in "
        "`models` of the configuration"
    )
    assert [message for message in caplog.messages if "no list" in message] == [
        "upstream openai has no list of models at its base_url, which ends in /v1 as a rule: only what is configured "
        f"is served, or if that is nothing, {', '.join(names)}, unless a reply names another model"
    ]


@pytest.mark.parametrize(
    ("own", "asked"), [("my/e5", "text-embedding-ada-002"), ("text-embedding-3-small", "text-embedding-ada-002")]
)
def test_a_server_without_a_list_that_answers_with_another_model_gives_no_wrong_vector(own: str, asked: str) -> None:
    """TEI answers with its own model whatever is requested, here with one of the same length."""
    with without_list(FakeOpenAI(flavour="tei", models={own: 1536})) as fake:
        with running(config(fake, api_key="sk-fake")) as gateway:
            refused = [gateway.post({"model": asked, "input": ["a", "b"]}) for _ in range(2)]
            if own == "text-embedding-3-small":
                right(fake, gateway.post({"model": own, "input": ["a"]}), own, ["a"])
        assert len(fake.calls) == (3 if own == "text-embedding-3-small" else 2), "neither retried nor cached"
    for response in refused:
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (502, "upstream_error")
        assert f"the upstream's reply is of the model '{own}' instead of '{asked}'" in error["message"]


class Renaming(FakeOpenAI):
    """Names the model as it pleases."""

    def __init__(self, named: Any, **options: Any) -> None:
        super().__init__(**options)
        self.named = named

    def _answer(self, body: dict[str, Any], name: str, rows: list[Row], tokens: int) -> Embedded:
        answer = super()._answer(body, name, rows, tokens)

        def render(shuffled: list[Row]) -> Reply:
            return json_reply({**orjson.loads(answer.render(shuffled).body), "model": self.named})

        return Embedded(rows, tokens, render)


@pytest.mark.parametrize(
    ("named", "status"),
    [
        (None, 200),
        ("openai/text-embedding-3-small", 200),
        ("text-embedding-3-small-v2", 200),
        ("", 502),
        (5, 502),
        ("x" * 300, 502),
    ],
)
def test_a_reply_that_names_no_model_is_believed_and_one_that_names_nonsense_is_not(named: Any, status: int) -> None:
    with without_list(Renaming(named)) as fake:
        with running(config(fake, api_key="sk-fake")) as gateway:
            response = gateway.post({"model": "text-embedding-3-small", "input": "a"})
    assert response.status_code == status
    assert "xxx" not in response.text


def test_a_server_that_lists_a_model_is_right_in_doubt_and_not_one_that_is_assumed_to_have_it() -> None:
    model = "text-embedding-3-small"
    other = without_list(Renaming(None, flavour="tei", models={"own": 1536}))
    with other, FakeOpenAI(models={model: 1536}) as listing:
        upstreams = {
            "first": {"type": "openai", "base_url": other.url + "/v1", "api_key": "sk-fake"},
            "second": {"type": "openai", "base_url": listing.url + "/v1", "api_key": "sk-fake"},
        }
        with running({"upstreams": upstreams}) as gateway:
            for text in map(str, range(10)):
                right(listing, gateway.post({"model": model, "input": [text]}), model, [text])


def test_a_length_that_openais_model_does_not_have_is_a_502_at_a_server_without_a_list() -> None:
    with without_list(FakeOpenAI(models={"text-embedding-3-small": 768})) as fake:
        with running(config(fake, api_key="sk-fake")) as gateway:
            response = gateway.post({"model": "text-embedding-3-small", "input": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_invalid_response")


@pytest.mark.parametrize(
    ("base", "changed"),
    [
        ("/v1", {"api_key": None}),
        ("/v1", {"auth": "api-key"}),
        ("/v1", {"auth": "none"}),
        ("/v1", {"query": {"api-version": "2024-10-21"}}),
        ("", {}),
        ("/openai/deployments/v1", {}),
    ],
)
def test_no_model_is_assumed_of_a_server_that_is_called_otherwise(base: str, changed: dict[str, Any]) -> None:
    settings = {name: value for name, value in {"api_key": "sk-fake", **changed}.items() if value is not None}
    with FakeOpenAI(api_key=None) as fake:
        fake.fail(NO_ROUTE, times=None, path=f"{base}/models")
        with running(config(fake, base, **settings)) as gateway:
            assert gateway.get("/v1/models").json()["data"] == []
            assert gateway.post({"model": "text-embedding-3-small", "input": "a"}).status_code == 404
    assert not fake.calls


@pytest.mark.parametrize("listed", [{"listed": {}}, {"listed": {"mine": 8}}, {"status": 401}, {"status": 500}])
def test_no_model_is_assumed_of_a_server_that_has_a_list_or_does_not_say(listed: dict[str, Any]) -> None:
    with FakeOpenAI() as fake:
        if "status" in listed:
            fake.fail(faults.http_error(listed["status"], b"no"), times=None, path="/models")
        else:
            body = orjson.dumps({"data": [{"id": name} for name in listed["listed"]]})
            fake.fail(faults.http_error(200, body), times=None, path="/models")
        with running(config(fake, api_key="sk-fake")) as gateway:
            names = [each["id"] for each in gateway.get("/v1/models").json()["data"]]
    assert names == (["mine", "up/mine"] if listed.get("listed") else [])


def test_what_is_configured_for_a_server_without_a_list_is_all_that_it_has_and_is_believed() -> None:
    models = {"mine": {"deployments": [{"upstream": "up", "model": "text-embedding-3-small"}]}}
    with without_list(FakeOpenAI(flavour="tei", models={"own": 1536})) as fake:
        with running({**config(fake, api_key="sk-fake"), "models": models}) as gateway:
            names = [each["id"] for each in gateway.get("/v1/models").json()["data"]]
            right(fake, gateway.post({"model": "mine", "input": ["a"]}), "own", ["a"])
            assert gateway.get("/readyz").json()["upstreams"]["up"]["models"] == 0
    assert names == ["mine", "up/text-embedding-3-small"]


def test_a_list_that_a_server_has_later_is_what_counts() -> None:
    with without_list(FakeOpenAI()) as fake, running(config(fake, api_key="sk-fake")) as gateway:
        upstream = gateway.app.gateway.upstreams["up"]
        assert gateway.post({"model": "text-embedding-3-large", "input": "a"}).status_code == 200
        fake.heal()
        fake.listed = {"text-embedding-3-small": 1536}
        upstream._listed_at = None
        assert gateway.post({"model": "up/mine", "input": "a"}).status_code == 404
        again = gateway.post({"model": "text-embedding-3-small", "input": "a"})
        assert again.headers["x-embedding-space"] == "openai/text-embedding-3-small;1536"
        assert gateway.post({"model": "text-embedding-3-large", "input": "a"}).status_code == 404
        without_list(fake)
        upstream._listed_at = None
        assert gateway.post({"model": "up/text-embedding-3-large", "input": "a"}).status_code == 502, (
            "it is gone for now"
        )
        assert gateway.post({"model": "text-embedding-3-small", "input": "b"}).status_code == 200


def test_a_model_that_only_the_configuration_knows_is_there_under_its_upstreams_name_too() -> None:
    """With the operator's description of it, except for prefixes, which belong to the public name."""
    has = {"upstream": "up", "model": "hidden"}
    models = {
        "mine": {"max_batch": 3, "deployments": [has]},
        "told": {"prefixes": {"query": "q: ", "document": "d: "}, "input_type": "query", "deployments": [has]},
    }
    texts = ["a", "b", "c", "d"]
    with FakeOpenAI(models={"hidden": 8, "listed": 8}, flavour="vllm", api_key=None) as fake:
        listed = {name: length for name, length in fake.models.items() if name != "hidden"}
        fake.listed = listed
        with running({**config(fake), "models": models}) as gateway:
            right(fake, gateway.post({"model": "up/hidden", "input": texts}), "hidden", texts)
            assert sorted(len(call.texts) for call in fake.calls) == [1, 3]
            told = gateway.post({"model": "told", "input": ["a"]})
        assert fake.calls[-1].texts == ["q: a"]
        right(fake, told, "hidden", ["q: a"])


def test_vectors_of_two_lengths_are_never_one_answer_whichever_call_or_cache_they_are_from() -> None:
    """This model's length is unknown, so no call can be checked on its own."""
    texts = ["a", "b", "c", "d"]
    models = {"mine": {"max_batch": 2, "deployments": [{"upstream": "up", "model": "m"}]}}
    with (
        FakeOpenAI(models={"m": 16}, flavour="vllm", api_key=None) as fake,
        running({**config(fake), "models": models}) as gateway,
    ):
        fake.fail(faults.wrong_dimension, times=1)
        short = gateway.post({"model": "mine", "input": ["a"]})
        assert [len(row["embedding"]) for row in short.json()["data"]] == [15]
        again = gateway.post({"model": "mine", "input": texts})  # one of them is cached
        right(fake, again, "m", texts)
        assert again.headers["x-embedding-upstream-calls"] == "4"  # 2 for the three that were missing, 2 for all four
        right(fake, gateway.post({"model": "mine", "input": texts}), "m", texts)
        assert len(fake.calls) == 5, "what was cached before has been replaced"

        fake.fail(faults.wrong_dimension, times=None, when=lambda texts: "e" in texts)
        broken = gateway.post({"model": "mine", "input": ["e", "f", "g", "h"]})
        assert (broken.status_code, broken.json()["error"]["code"]) == (502, "upstream_invalid_response")
        assert broken.headers["x-embedding-upstream-calls"] == "4"
        assert broken.headers["x-should-retry"] == "false", "each of an SDK's retries would pay for everything again"
        fake.heal()
        healed = ["e", "f", "g", "h"]
        right(fake, gateway.post({"model": "mine", "input": healed}), "m", healed)


@pytest.mark.parametrize("policy", ["split", "truncate"])
def test_nor_where_a_text_is_cut_only_when_the_upstream_has_refused_it(policy: str) -> None:
    deployment = {"upstream": "up", "model": "m"}
    models = {"mine": {"deployments": [deployment], "max_tokens_per_input": 64, "on_long_input": policy}}
    too_long = faults.http_error(400, b'{"error":{"message":"maximum context length is 64 tokens"}}')
    lengths = {"m": 4}
    with (
        FakeOpenAI(models=lengths, flavour="vllm", api_key=None) as fake,
        running({**config(fake), "models": models}) as gateway,
    ):
        fake.fail(too_long, times=None, when=lambda texts: max(map(len, texts)) > 200)
        long = ("all about it, " * 18)[:250]
        assert gateway.post({"model": "mine", "input": [long]}).status_code == 200
        lengths["m"] = 8
        data = gateway.post({"model": "mine", "input": ["short", long]}).json()["data"]
        assert [len(row["embedding"]) for row in data] == [8, 8]


def test_tei_gets_32_rows_a_call_and_a_smaller_limit_is_learned_from_its_own_words() -> None:
    texts = [f"text {i}" for i in range(100)]
    with FakeOpenAI(None, flavour="tei") as fake, running(config(fake)) as gateway:
        right(fake, gateway.post({"model": HOSTED, "input": texts}), HOSTED, texts)
        assert sorted(call.rows for call in fake.calls) == [4, 32, 32, 32]
    with FakeOpenAI(None, flavour="tei", max_batch=10) as fake, running(config(fake)) as gateway:
        right(fake, gateway.post({"model": HOSTED, "input": texts}), HOSTED, texts)
        before = len(fake.calls)
        right(
            fake,
            gateway.post({"model": HOSTED, "input": [f"more {t}" for t in texts]}),
            HOSTED,
            [f"more {t}" for t in texts],
        )
        assert [call.rows for call in fake.calls[before:]] == [10] * 10


@pytest.mark.parametrize("flavour", ["vllm", "vllm_old"])
def test_vllm_is_not_sent_dimensions_that_it_gives_anyway(flavour: Any) -> None:
    with FakeOpenAI(None, flavour=flavour) as fake:
        models = {"m": {"dimensions": 1024, "deployments": [{"upstream": "up", "model": HOSTED}]}}
        with running({**config(fake), "models": models}) as gateway:
            right(fake, gateway.post({"model": HOSTED, "input": ["a"]}), HOSTED, ["a"])
            refused = gateway.post({"model": HOSTED, "input": "a", "dimensions": 256})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")
        assert all("dimensions" not in call.json for call in fake.calls if call.status == 200)
        assert all(None not in call.json.values() for call in fake.calls), "fields that are not asked for are left out"


def test_a_server_that_takes_text_only_and_answers_numbers_gets_text_and_is_understood() -> None:
    with FakeOpenAI(None, flavour="vllm", base64=False) as fake, running(config(fake)) as gateway:
        ids = gateway.post({"model": HOSTED, "input": [[15339, 1917]]})
        right(fake, ids, HOSTED, ["hello world"])
        assert fake.calls[-1].texts == ["hello world"]
        encoded = gateway.post({"model": HOSTED, "input": "hello world", "encoding_format": "base64"})
        assert isinstance(encoded.json()["data"][0]["embedding"], str)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"message": f"Invalid 'input': array too long. {OPENAI_S}", "code": "array_above_max_length"}}),
        (422, {"detail": [{"loc": ["body", "input", "str"], "msg": "Input should be a valid string"}, FASTAPI_S]}),
    ],
)
def test_a_limit_on_lists_is_learned_where_it_is_said_of_the_list_of_inputs(status: int, body: dict[str, Any]) -> None:
    texts = [f"text {i}" for i in range(32)]
    with FakeOpenAI(None, flavour="vllm") as fake, running(config(fake)) as gateway:
        fake.fail(faults.http_error(status, body), None, when=lambda texts: len(texts) > 10)
        right(fake, gateway.post({"model": HOSTED, "input": texts}), HOSTED, texts)
        assert [call.rows for call in fake.calls] == [32, 10, 10, 10, 2]


def test_a_server_that_refuses_encoding_format_is_not_sent_any() -> None:
    with FakeOpenAI(None, flavour="vllm") as fake, running(config(fake, encoding_format="omit")) as gateway:
        right(fake, gateway.post({"model": HOSTED, "input": ["a"]}), HOSTED, ["a"])
        assert "encoding_format" not in fake.calls[-1].json


def test_a_refusal_that_quotes_all_it_was_sent_is_heard_however_long_that_was() -> None:
    """infinity and other FastAPI servers quote all of `input` for each form that it may have. What the texts say is not
    the server's message."""
    long = "dimensions " * 350_000
    quoting: list[dict[str, Any]] = [
        {"type": "string_too_long", "loc": ["body", "input", "list", 1], "input": long},
        {"type": "string_type", "loc": ["body", "input", "str"], "input": ["good", long]},
    ]
    told = "String should have at most 122880 characters"
    refusal = Reply(422, orjson.dumps({"detail": [{"msg": told, **each} for each in quoting]}))
    with FakeOpenAI(models={HOSTED: 8}) as fake, running(config(fake, api_key="sk-fake")) as gateway:
        fake.fail(faults.Answer("validation", refusal), None, when=lambda texts: long in texts)
        error = gateway.post({"model": HOSTED, "input": ["good", long]})
        assert (error.status_code, error.json()["error"]["code"]) == (400, "context_length_exceeded"), error.text
        assert error.json()["error"]["param"] == "input[1]"
        right(fake, gateway.post({"model": HOSTED, "input": ["good"]}), HOSTED, ["good"])
        assert [call.texts.count("good") for call in fake.calls if long not in call.texts] == [1], "it was kept"
