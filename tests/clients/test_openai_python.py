"""The official Python SDK, unmodified and with its defaults: its requests are answered, its errors readable."""

from __future__ import annotations

import base64
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.clients.support import (
    BGE,
    KEY,
    MODELS,
    NARROW_KEY,
    SMALL,
    TEXTS,
    UPSTREAM_KEY,
    config,
    exactly_float32,
    numbers_of,
    same,
)
from tests.fakes import FakeOpenAI, faults
from tests.harness import Running, running

Asked = Callable[[Any], Any]
Ask = Callable[..., Awaitable[Any]]


@pytest.fixture(params=["sync", "async"])
async def ask(request: pytest.FixtureRequest, gateway: Running) -> AsyncIterator[Ask]:
    """Runs a function of the SDK's client, once with the sync client and once with the async one."""
    async with AsyncExitStack() as clients:

        async def does(what: Asked, kind: str = "OpenAI", **options: Any) -> Any:
            if kind == "OpenAI":
                options = {"base_url": gateway.base_url, "api_key": KEY, **options}
            if request.param == "sync":
                client = getattr(openai, kind)(**options)
                clients.callback(client.close)
            else:
                client = getattr(openai, f"Async{kind}")(**options)
                clients.push_async_callback(client.close)
            result = what(client)
            return await result if inspect.isawaitable(result) else result

        yield does


async def failure(ask: Ask, what: Asked, **options: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        await ask(what, **options)
    return caught.value


# --- inputs and forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
async def test_a_string_gets_its_vector_bit_for_bit(ask: Ask, fake: FakeOpenAI, text: str) -> None:
    answer = await ask(lambda sdk: sdk.embeddings.create(model=SMALL, input=text))
    assert len(answer.data) == 1
    assert exactly_float32(answer.data[0].embedding, fake.expected(SMALL, text))
    assert answer.model == SMALL
    assert answer.usage.total_tokens == answer.usage.prompt_tokens == fake.billed_tokens


async def test_a_list_gets_its_vectors_in_order(ask: Ask, fake: FakeOpenAI) -> None:
    answer = await ask(lambda sdk: sdk.embeddings.create(model=SMALL, input=TEXTS))
    assert [row.index for row in answer.data] == list(range(len(TEXTS)))
    for text, row in zip(TEXTS, answer.data, strict=True):
        assert exactly_float32(row.embedding, fake.expected(SMALL, text)), text


async def test_2048_texts_go_through_in_one_request(ask: Ask, fake: FakeOpenAI) -> None:
    texts = [f"text {i}" for i in range(2048)]
    answer = await ask(lambda sdk: sdk.embeddings.create(model=BGE, input=texts))
    assert len(answer.data) == 2048
    for i in (0, 1, 31, 32, 1023, 2047):
        assert exactly_float32(answer.data[i].embedding, fake.expected(BGE, texts[i]))


async def test_the_default_is_answered_in_base64(ask: Ask, fake: FakeOpenAI) -> None:
    raw = await ask(lambda sdk: sdk.embeddings.with_raw_response.create(model=SMALL, input="hi"))
    wire = raw.http_response.json()["data"][0]["embedding"]
    assert base64.b64decode(wire, validate=True) == fake.expected(SMALL, "hi").astype("<f4").tobytes()


async def test_base64_asked_for_by_name_stays_base64(ask: Ask, fake: FakeOpenAI) -> None:
    answer = await ask(lambda sdk: sdk.embeddings.create(model=SMALL, input="hi", encoding_format="base64"))
    assert base64.b64decode(answer.data[0].embedding) == fake.expected(SMALL, "hi").astype("<f4").tobytes()


async def test_float_is_answered_in_numbers_that_read_back_as_the_same_float32(ask: Ask, fake: FakeOpenAI) -> None:
    answer = await ask(lambda sdk: sdk.embeddings.create(model=SMALL, input=TEXTS, encoding_format="float"))
    for text, row in zip(TEXTS, answer.data, strict=True):
        assert all(type(number) is float for number in row.embedding)
        assert same(row.embedding, fake.expected(SMALL, text)), text


async def test_token_ids_get_the_vector_of_their_text(ask: Ask, fake: FakeOpenAI, cl100k: Any) -> None:
    text = TEXTS[0]
    answer = await ask(lambda sdk: sdk.embeddings.create(model=SMALL, input=cl100k.encode_ordinary(text)))
    assert len(answer.data) == 1
    assert exactly_float32(answer.data[0].embedding, fake.expected(SMALL, text))


async def test_lists_of_token_ids_get_the_vectors_of_their_texts(ask: Ask, fake: FakeOpenAI, cl100k: Any) -> None:
    ids = [cl100k.encode_ordinary(text) for text in TEXTS]
    answer = await ask(lambda sdk: sdk.embeddings.create(model=SMALL, input=ids))
    for text, row in zip(TEXTS, answer.data, strict=True):
        assert exactly_float32(row.embedding, fake.expected(SMALL, text)), text


async def test_dimensions_and_user_are_taken(ask: Ask, fake: FakeOpenAI) -> None:
    answer = await ask(lambda sdk: sdk.embeddings.create(model=SMALL, input=["a", "b"], dimensions=256, user="user-1"))
    for text, row in zip(["a", "b"], answer.data, strict=True):
        assert exactly_float32(row.embedding, fake.expected(SMALL, text, 256))


async def test_a_model_is_reached_by_its_upstream_and_name(ask: Ask, fake: FakeOpenAI) -> None:
    answer = await ask(lambda sdk: sdk.embeddings.create(model=f"up/{BGE}", input="hi"))
    assert answer.model == f"up/{BGE}"
    assert exactly_float32(answer.data[0].embedding, fake.expected(BGE, "hi"))


async def test_fields_from_extra_body_that_mean_nothing_here_are_ignored(ask: Ask, fake: FakeOpenAI) -> None:
    answer = await ask(
        lambda sdk: sdk.embeddings.create(model=SMALL, input="hi", extra_body={"truncate": "END", "priority": 1})
    )
    assert exactly_float32(answer.data[0].embedding, fake.expected(SMALL, "hi"))


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["/v1", "/v1/", "", "/", "/openai/v1", "/openai/v1/"])
async def test_any_base_url_that_people_write_works(ask: Ask, gateway: Running, fake: FakeOpenAI, base: str) -> None:
    url = gateway.url + base
    answer = await ask(lambda sdk: sdk.embeddings.create(model=BGE, input="hi"), base_url=url)
    assert exactly_float32(answer.data[0].embedding, fake.expected(BGE, "hi"))
    found = await ask(lambda sdk: sdk.models.retrieve(BGE), base_url=url)
    assert found.id == BGE


@pytest.mark.parametrize("model", [SMALL, BGE, f"up/{BGE}"])
async def test_the_azure_client_names_the_model_as_a_deployment(
    ask: Ask, gateway: Running, fake: FakeOpenAI, model: str
) -> None:
    answer = await ask(
        lambda sdk: sdk.embeddings.create(model=model, input=TEXTS),
        kind="AzureOpenAI",
        azure_endpoint=gateway.url,
        api_key=KEY,
        api_version="2024-10-21",
    )
    assert answer.model == model
    for text, row in zip(TEXTS, answer.data, strict=True):
        assert exactly_float32(row.embedding, fake.expected(model.removeprefix("up/"), text)), text


async def test_the_azure_client_with_one_deployment_and_with_a_token_of_entra(
    ask: Ask, gateway: Running, fake: FakeOpenAI
) -> None:
    answer = await ask(
        lambda sdk: sdk.embeddings.create(model="whatever-the-path-decides", input="hi"),
        kind="AzureOpenAI",
        azure_endpoint=gateway.url,
        azure_deployment=SMALL,
        azure_ad_token=KEY,
        api_version="2024-10-21",
    )
    assert answer.model == SMALL
    assert exactly_float32(answer.data[0].embedding, fake.expected(SMALL, "hi"))


async def test_the_azure_client_with_a_wrong_key_is_told_so(ask: Ask, gateway: Running) -> None:
    error = await failure(
        ask,
        lambda sdk: sdk.embeddings.create(model=SMALL, input="hi"),
        kind="AzureOpenAI",
        azure_endpoint=gateway.url,
        api_key="wrong",
        api_version="2024-10-21",
    )
    assert type(error) is openai.AuthenticationError
    assert "Incorrect API key provided" in error.message


@pytest.mark.parametrize("model", [SMALL, BGE, "BAAI%2Fbge-m3"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_the_engines_route_of_the_sdk_before_1_0_works(
    gateway: Running, fake: FakeOpenAI, model: str, slash: str
) -> None:
    """Version 0.28 moves `engine` from the body into the path; the body names no model."""
    response = httpx.post(
        f"{gateway.base_url}/engines/{model}/embeddings{slash}",
        json={"input": ["hi", "there"], "encoding_format": "base64"},
        headers={
            "Authorization": f"Bearer {KEY}",
            "User-Agent": "OpenAI/v1 PythonBindings/0.28.1",
            "X-OpenAI-Client-User-Agent": '{"bindings_version": "0.28.1", "lang": "python"}',
        },
    )
    assert response.status_code == 200, response.text
    name = model.replace("%2F", "/")
    for text, wire in zip(["hi", "there"], numbers_of(response.json()), strict=True):
        assert same(np.frombuffer(base64.b64decode(str(wire)), "<f4"), fake.expected(name, text))


# --- models --------------------------------------------------------------------------------------


async def test_the_models_are_listed_by_every_name(ask: Ask) -> None:
    page = await ask(lambda sdk: sdk.models.list())
    names = {model.id for model in page.data}
    assert names == {*MODELS, *(f"up/{name}" for name in MODELS)}
    assert {model.object for model in page.data} == {"model"}
    assert all(isinstance(model.created, int) and model.owned_by for model in page.data)


@pytest.mark.parametrize("name", [SMALL, BGE, f"up/{SMALL}", f"up/{BGE}"])
async def test_a_model_is_retrieved_by_a_name_with_slashes(ask: Ask, name: str) -> None:
    found = await ask(lambda sdk: sdk.models.retrieve(name))
    assert (found.id, found.object) == (name, "model")
    assert isinstance(found.created, int)
    assert found.owned_by == "up"


async def test_an_unknown_model_is_not_found_among_the_models(ask: Ask) -> None:
    error = await failure(ask, lambda sdk: sdk.models.retrieve("gpt/none"))
    assert type(error) is openai.NotFoundError
    assert (error.code, error.param) == ("model_not_found", "model")
    assert "The model 'gpt/none' does not exist" in error.message


async def test_a_key_for_one_model_sees_that_model_only(ask: Ask) -> None:
    page = await ask(lambda sdk: sdk.models.list(), api_key=NARROW_KEY)
    assert BGE in {model.id for model in page.data}
    assert SMALL not in {model.id for model in page.data}


# --- headers -------------------------------------------------------------------------------------


async def test_the_request_id_is_on_the_answer_and_in_the_raw_response(ask: Ask, gateway: Running) -> None:
    raw = await ask(lambda sdk: sdk.embeddings.with_raw_response.create(model=SMALL, input="hi"))
    parsed = raw.parse()
    assert raw.headers["x-request-id"].startswith("req_")
    assert parsed._request_id == raw.request_id == raw.headers["x-request-id"]
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.headers["x-embedding-cache"] == "miss"
    assert raw.headers["x-embedding-upstream"] == f"up/{SMALL}"
    assert parsed._request_id in gateway.log.getvalue()


async def test_the_callers_own_request_id_comes_back(ask: Ask) -> None:
    answer = await ask(
        lambda sdk: sdk.embeddings.create(model=SMALL, input="hi", extra_headers={"X-Request-ID": "mine-1"})
    )
    assert answer._request_id == "mine-1"


@pytest.mark.parametrize("header", ["api-key", "x-api-key"])
async def test_the_key_may_come_in_another_header(ask: Ask, fake: FakeOpenAI, header: str) -> None:
    headers = {header: KEY, "Authorization": openai.Omit()}
    answer = await ask(
        lambda sdk: sdk.embeddings.create(model=SMALL, input="hi", extra_headers=headers), api_key="unused"
    )
    assert exactly_float32(answer.data[0].embedding, fake.expected(SMALL, "hi"))


# --- errors --------------------------------------------------------------------------------------


async def test_a_wrong_key_is_an_authentication_error(ask: Ask, fake: FakeOpenAI) -> None:
    error = await failure(ask, lambda sdk: sdk.embeddings.create(model=SMALL, input="hi"), api_key="sk-wrong")
    assert type(error) is openai.AuthenticationError
    assert (error.status_code, error.code, error.type) == (401, "invalid_api_key", "invalid_request_error")
    assert "Incorrect API key provided" in error.message
    assert "sk-wrong" not in error.message
    assert error.request_id
    assert fake.calls == []


async def test_a_wrong_key_is_told_even_before_a_large_body(ask: Ask) -> None:
    texts = ["large " * 5000] * 200
    started = time.monotonic()
    error = await failure(ask, lambda sdk: sdk.embeddings.create(model=SMALL, input=texts), api_key="sk-wrong")
    assert type(error) is openai.AuthenticationError
    assert time.monotonic() - started < 3, "the SDK retried a connection that broke"


async def test_a_body_that_is_too_large_is_told_so(ask: Ask) -> None:
    texts = ["large " * 6000] * 1000
    error = await failure(ask, lambda sdk: sdk.embeddings.create(model=SMALL, input=texts))
    assert (error.status_code, error.code) == (413, "body_too_large")
    assert "the request body is larger than" in error.message


async def test_a_model_that_the_key_does_not_open_is_a_permission_error(ask: Ask) -> None:
    error = await failure(ask, lambda sdk: sdk.embeddings.create(model=SMALL, input="hi"), api_key=NARROW_KEY)
    assert type(error) is openai.PermissionDeniedError
    assert (error.code, error.param) == ("model_not_allowed", "model")


async def test_an_unknown_model_is_a_not_found_error(ask: Ask) -> None:
    error = await failure(ask, lambda sdk: sdk.embeddings.create(model="text-embedding-9", input="hi"))
    assert type(error) is openai.NotFoundError
    assert (error.code, error.param) == ("model_not_found", "model")
    assert "The model 'text-embedding-9' does not exist" in error.message


@pytest.mark.parametrize(
    ("given", "param"),
    [("", "input"), ([], "input"), (["a", ""], "input[1]"), ([[]], "input[0]"), ([[1], [100257]], "input[1]")],
)
async def test_an_empty_or_bad_input_is_a_bad_request_that_names_it(
    ask: Ask, fake: FakeOpenAI, given: Any, param: str
) -> None:
    error = await failure(ask, lambda sdk: sdk.embeddings.create(model=SMALL, input=given))
    assert type(error) is openai.BadRequestError
    assert (error.status_code, error.code, error.param) == (400, "invalid_value", param)
    assert error.message.startswith("Error code: 400")
    assert param in error.message
    assert fake.calls == []


async def test_too_many_inputs_are_a_bad_request(ask: Ask) -> None:
    error = await failure(ask, lambda sdk: sdk.embeddings.create(model=SMALL, input=["a"] * 2049))
    assert type(error) is openai.BadRequestError
    assert "2049" in error.message
    assert "2048" in error.message


async def test_a_length_that_the_model_has_not_is_a_bad_request(ask: Ask) -> None:
    error = await failure(ask, lambda sdk: sdk.embeddings.create(model=SMALL, input="hi", dimensions=5000))
    assert type(error) is openai.BadRequestError
    assert (error.code, error.param) == ("unsupported_dimensions", "dimensions")


async def test_a_rate_limit_of_the_upstream_is_waited_out_by_the_sdk(ask: Ask, fake: FakeOpenAI) -> None:
    limit = faults.vendor_error("rate_limit", headers={"retry-after-ms": "20"})
    fake.fail(limit, times=2)  # the gateway retries once by itself
    started = time.monotonic()
    raw = await ask(lambda sdk: sdk.embeddings.with_raw_response.create(model=SMALL, input="slow down"))
    waited = time.monotonic() - started
    assert raw.retries_taken == 1
    assert 0.99 <= waited < 3, "it waits the second that it is told, not its own backoff"
    assert exactly_float32(raw.parse().data[0].embedding, fake.expected(SMALL, "slow down"))


async def test_a_rate_limit_that_stays_is_a_rate_limit_error_with_the_time_to_wait(ask: Ask, fake: FakeOpenAI) -> None:
    fake.fail(faults.vendor_error("rate_limit", headers={"retry-after-ms": "1200"}), times=None)
    error = await failure(ask, lambda sdk: sdk.embeddings.create(model=SMALL, input="hi"), max_retries=0)
    assert type(error) is openai.RateLimitError
    assert (error.status_code, error.code, error.type) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert error.response.headers["retry-after"] == "2"
    assert error.response.headers["retry-after-ms"] == "1200"


async def test_an_exhausted_quota_is_a_rate_limit_error_that_the_sdk_does_not_try_again(
    ask: Ask, fake: FakeOpenAI
) -> None:
    fake.fail(faults.vendor_error("quota"), times=None)
    error = await failure(ask, lambda sdk: sdk.embeddings.create(model=SMALL, input="hi"))
    assert type(error) is openai.RateLimitError
    assert error.code == "insufficient_quota"
    assert len(fake.calls) == 1


async def test_a_key_that_the_upstream_refuses_is_not_the_callers_fault(ask: Ask, fake: FakeOpenAI) -> None:
    words = f"Incorrect API key provided: {UPSTREAM_KEY}."
    fake.fail(faults.vendor_error("auth", words), times=None)
    error = await failure(ask, lambda sdk: sdk.embeddings.create(model=SMALL, input="hi"))
    assert type(error) is openai.InternalServerError
    assert (error.status_code, error.code) == (502, "upstream_auth")
    assert UPSTREAM_KEY not in error.message
    assert len(fake.calls) == 1, "neither the gateway nor the SDK tries a bad key again"


async def test_an_upstream_that_is_down_for_a_moment_is_not_noticed(ask: Ask, fake: FakeOpenAI) -> None:
    fake.fail(faults.vendor_error("internal"), times=2)
    raw = await ask(lambda sdk: sdk.embeddings.with_raw_response.create(model=SMALL, input="hi"))
    assert raw.retries_taken == 1
    assert exactly_float32(raw.parse().data[0].embedding, fake.expected(SMALL, "hi"))


# --- without keys --------------------------------------------------------------------------------


async def test_any_key_will_do_where_the_gateway_asks_for_none(ask: Ask, fake: FakeOpenAI) -> None:
    with running(config(fake, keys=False)) as gateway:
        answer = await ask(
            lambda sdk: sdk.embeddings.create(model=SMALL, input="hi"), base_url=gateway.base_url, api_key="none"
        )
    assert exactly_float32(answer.data[0].embedding, fake.expected(SMALL, "hi"))
