"""Every route and every response header of the contract, as clients see them."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.api.support import FIXED_LENGTH, MODEL, OTHER_MODEL, config, error_of, head, post, raw
from tests.fakes import FakeDashScope, FakeOpenAI, count_tokens
from tests.harness import Running, running

GOOD = {"model": MODEL, "input": "hi"}


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as fake:
        yield fake


@pytest.fixture(scope="module")
def gateway(upstream: FakeOpenAI) -> Iterator[Running]:
    with running(config(upstream, cache={})) as gateway:
        yield gateway


@pytest.fixture
def fake(upstream: FakeOpenAI) -> FakeOpenAI:
    upstream.reset()
    return upstream


# --- embeddings ---------------------------------------------------------------------------------------------------

PATHS = ["/v1/embeddings", "/embeddings", "/openai/v1/embeddings"]
NAMED = ["/v1/engines/{}/embeddings", "/openai/deployments/{}/embeddings"]


@pytest.mark.parametrize("path", [path + slash for path in PATHS for slash in ("", "/", "?api-version=2024-02-01")])
def test_embeddings_are_on_all_paths_that_clients_use(path: str, fake: FakeOpenAI, gateway: Running) -> None:
    response = gateway.post(GOOD, path=path, cache_control="no-cache")
    assert response.status_code == 200
    answer = response.json()
    assert answer["object"] == "list"
    assert answer["model"] == MODEL
    assert [(row["object"], row["index"]) for row in answer["data"]] == [("embedding", 0)]
    assert answer["usage"] == {
        "prompt_tokens": fake.billed_tokens,
        "total_tokens": fake.billed_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)


@pytest.mark.parametrize("path", [path + slash for path in NAMED for slash in ("", "/", "?api-version=2024-02-01")])
@pytest.mark.parametrize("name", [OTHER_MODEL, f"up/{OTHER_MODEL}"])
def test_a_model_named_by_the_path_is_the_model_asked_for(
    path: str, name: str, fake: FakeOpenAI, gateway: Running
) -> None:
    for body in ({"input": "hi"}, GOOD, {"input": "hi", "model": None}, {"input": "hi", "model": 1}):
        response = gateway.post(body, path=path.format(name), cache_control="no-cache")
        assert response.status_code == 200
        assert response.json()["model"] == name
        assert fake.calls[-1].json["model"] == OTHER_MODEL


def test_numbers_and_base64_are_the_same_float32(fake: FakeOpenAI, gateway: Running) -> None:
    vectors = []
    for encoding in ("float", "base64", None):
        value: Any = gateway.post({**GOOD, "encoding_format": encoding}).json()["data"][0]["embedding"]
        assert isinstance(value, str) == (encoding == "base64")
        vectors.append(
            np.frombuffer(base64.b64decode(value), "<f4") if encoding == "base64" else np.array(value, "<f4")
        )
    for vector in vectors:
        assert np.array_equal(vector, fake.expected(MODEL, "hi"))


def test_a_text_and_its_token_ids_are_the_same_input(fake: FakeOpenAI, gateway: Running) -> None:
    first = gateway.post({"model": MODEL, "input": "Hello world"})
    for ids in ([9906, 1917], [[9906, 1917]]):
        again = gateway.post({"model": MODEL, "input": ids})
        assert again.headers["x-embedding-cache"] == "hit"
        assert again.json()["data"] == first.json()["data"]
    assert len(fake.calls) == 1


def test_what_is_no_route_is_a_404_in_the_same_shape(gateway: Running) -> None:
    for path in ("/", "/v1", "/v1/completions", "/v1/chat/completions", "/healthz/x", "/favicon.ico", "/" + "x" * 5000):
        for response in (gateway.get(path), gateway.post(GOOD, path=path)):
            assert response.status_code == 404
            error = error_of(response)
            assert (error["code"], error["type"]) == ("not_found", "invalid_request_error")
            assert len(error["message"]) < 300


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/models", "/openai/v1/models"])
def test_models_are_listed_under_their_own_names_and_their_upstreams(path: str, gateway: Running) -> None:
    response = gateway.get(path)
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "list"
    names = [row["id"] for row in body["data"]]
    models = (MODEL, OTHER_MODEL, FIXED_LENGTH)
    assert sorted(names) == sorted([*models, *(f"up/{model}" for model in models)])
    for row in body["data"]:
        assert row["object"] == "model"
        assert type(row["created"]) is int
        assert row["owned_by"] == "up"


@pytest.mark.parametrize("name", [MODEL, f"up/{MODEL}"])
@pytest.mark.parametrize("base", ["/v1/models", "/models", "/openai/v1/models"])
def test_one_model_is_described_with_what_we_know(base: str, name: str, gateway: Running) -> None:
    for path in (f"{base}/{name}", f"{base}/{name}/"):
        response = gateway.get(path)
        assert response.status_code == 200
        assert response.json() == {
            "id": name,
            "object": "model",
            "created": gateway.app.gateway.started,
            "owned_by": "up",
            "dimensions": 1536,
            "modalities": ["text"],
            "sparse": False,
            "dimension_choices": [],
            "shortened_here": None,
            "max_input_tokens": 8192,
            "max_input_characters": None,
            "max_batch_tokens": 300_000,
            "max_batch": 2048,
            "input_types": [],
            "prefixes": None,
            "instruct": False,
            "upstreams": [f"up/{MODEL}"],
            "vector_space": f"openai/{MODEL}",
            "source": "developers.openai.com/api/reference/resources/embeddings",
        }


@pytest.mark.parametrize("order", [("native", "compat"), ("compat", "native")])
def test_a_model_is_described_with_what_any_of_its_deployments_takes(order: tuple[str, str]) -> None:
    deployments = [{"upstream": name, "model": "text-embedding-v4"} for name in order]
    with FakeDashScope(api_key="sk-fake") as fake:
        upstreams = {
            "native": {"type": "dashscope", "api_key": "sk-fake", "base_url": fake.url + "/api/v1"},
            "compat": {
                "type": "dashscope",
                "mode": "compatible",
                "api_key": "sk-fake",
                "base_url": fake.url + "/compatible-mode/v1",
            },
        }
        with running({"upstreams": upstreams, "models": {"own": {"deployments": deployments}}}) as gateway:
            row = gateway.get("/v1/models/own").json()
            assert row["input_types"] == ["query", "document"]
            assert (row["instruct"], row["sparse"]) == (True, True)
            wanted = {"model": "own", "input": "a", "input_type": "query", "instruct": "find", "output_type": "sparse"}
            assert gateway.post(wanted).status_code == 200


@pytest.mark.parametrize("order", [("native", "other"), ("other", "native")])
def test_images_are_told_of_where_all_deployments_take_them(order: tuple[str, str]) -> None:
    deployments = [{"upstream": name, "model": "qwen3-vl-embedding", "space": "vl"} for name in order]
    nowhere = "http://127.0.0.1:9"
    upstreams = {
        "native": {"type": "dashscope", "api_key": "sk-fake", "base_url": nowhere},
        "other": {"type": "openai", "base_url": nowhere},
    }
    with running({"upstreams": upstreams, "models": {"own": {"deployments": deployments}}}) as gateway:
        refusal = gateway.post({"model": "own", "input": [{"image": "https://x.example/a.png"}]})
        assert error_of(refusal)["param"] == "input[0]"
        assert gateway.get("/v1/models/own").json()["modalities"] == ["text"]


def test_the_tokens_of_a_call_are_told_by_whichever_deployment_takes_least() -> None:
    upstream = {"type": "openai", "base_url": "http://127.0.0.1:9"}
    deployments = [{"upstream": "up", "model": name, "space": "s"} for name in ("unknown", MODEL)]
    with running({"upstreams": {"up": upstream}, "models": {"own": {"deployments": deployments}}}) as gateway:
        assert gateway.get("/v1/models/own").json()["max_batch_tokens"] == 300_000


def test_every_model_listed_can_be_looked_up_and_embeds(gateway: Running) -> None:
    for row in gateway.get("/v1/models").json()["data"]:
        assert gateway.get(f"/v1/models/{row['id']}").json() == row
        response = gateway.post({"model": row["id"], "input": "hi"})
        assert response.status_code == 200
        assert response.headers["x-embedding-space"] == f"{row['vector_space']};{row['dimensions']}"


@pytest.mark.parametrize("name", ["unknown", "up", "up/unknown", "other/" + MODEL, "x" * 3000])
def test_a_model_that_is_not_served_is_a_404(name: str, gateway: Running) -> None:
    response = gateway.get(f"/v1/models/{name}")
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert len(error["message"]) < 300


def test_a_model_that_its_upstream_got_meanwhile_is_found() -> None:
    with FakeOpenAI(models={MODEL: 8}) as fake, running(config(fake)) as gateway:
        late = {"model": "late", "input": "hi"}
        fake.models = {MODEL: 8, "late": 8}
        assert gateway.post(late).status_code == 404, "the upstream was asked a moment ago"
        for upstream in gateway.app.gateway.upstreams.values():
            upstream._listed_at = None
        assert gateway.post(late).status_code == 200
        assert "late" in {row["id"] for row in gateway.get("/v1/models").json()["data"]}


def test_a_models_dimensions_are_those_that_callers_get_who_ask_for_none(
    tmp_path: Path,
) -> None:
    with FakeOpenAI() as fake:
        short = {"deployments": [{"upstream": "up", "model": MODEL}], "dimensions": 512}
        configured = {**config(fake), "models": {"short": short}}
        with running(configured) as gateway:
            got = gateway.post({"model": "short", "input": "x"}).json()["data"][0]["embedding"]
            told = {name: gateway.get(f"/v1/models/{name}").json()["dimensions"] for name in ("short", MODEL)}
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(configured))
        command = [sys.executable, "-m", "app", "check", "--config", str(file)]
        shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout
    assert told == {"short": len(got), MODEL: 1536}
    assert told["short"] == 512
    (row,) = (line.split() for line in shown.splitlines() if line.startswith("short "))
    assert row[1] == "512"


# --- health and docs ------------------------------------------------------------------------------------------------


def test_healthz_says_alive(gateway: Running) -> None:
    response = gateway.get("/healthz")
    assert response.status_code == 200
    assert response.json() == {"status": "ok"}
    assert response.headers["x-request-id"]


def test_readyz_has_a_line_per_upstream_and_cache_tier(gateway: Running) -> None:
    response = gateway.get("/readyz")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ready", "upstreams": {"up": {"status": "up", "models": 3}}, "cache": {"memory": "up"},
    }  # fmt: skip


def test_readyz_is_503_while_draining_and_healthz_is_not() -> None:
    with FakeOpenAI() as fake, running(config(fake)) as gateway:
        gateway.app.gateway.draining = True
        response = gateway.get("/readyz")
        assert response.status_code == 503
        assert response.json()["status"] == "draining"
        assert gateway.get("/healthz").status_code == 200
        assert gateway.post(GOOD).status_code == 200, "what still comes is still served"


def test_readyz_names_an_upstream_that_is_down_and_says_why() -> None:
    fake = FakeOpenAI()
    with fake:
        config_of_gone = config(fake)
    with running(config_of_gone) as gateway:
        response = gateway.get("/readyz")
        assert response.status_code == 200, "a gateway whose upstream is down is no better restarted"
        line = response.json()["upstreams"]["up"]
        assert (line["status"], line["models"]) == ("down", 0)
        assert line["reason"]
        assert fake.url not in response.text


def test_the_description_tells_the_embeddings_route_whole(gateway: Running) -> None:
    described = gateway.get("/openapi.json").json()
    assert described["openapi"].startswith("3.")
    assert {"/v1/embeddings", "/v1/models", "/v1/models/{model}", "/healthz", "/readyz", "/metrics"} <= set(
        described["paths"]
    )
    embed = described["paths"]["/v1/embeddings"]["post"]
    request = embed["requestBody"]["content"]["application/json"]["schema"]
    assert request["required"] == ["model", "input"]
    assert set(request["properties"]) == {
        "model", "input", "encoding_format", "dimensions", "user", "input_type", "output_type", "instruct",
        "on_long_input",
    }  # fmt: skip
    assert set(embed["responses"]) == {
        "200", "400", "401", "403", "404", "408", "413", "415", "429", "502", "503", "504", "default",
    }  # fmt: skip
    for status, response in embed["responses"].items():
        shape = response["content"]["application/json"]["schema"]
        assert shape["required"] == (["object", "data", "model", "usage"] if status == "200" else ["error"])
    assert set(described["paths"]["/v1/models/{model}"]["get"]["responses"]) == {"200", "401", "404", "default"}
    assert "HTTPValidationError" not in str(described), "which is never answered"
    for path, told in (("/v1/models", "data"), ("/v1/models/{model}", "id")):
        answer = described["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert told in answer["properties"]
    (model, *_) = gateway.get("/v1/models").json()["data"]
    assert set(answer["properties"]) == set(model)
    assert [name for name, field in answer["properties"].items() if not field.get("description")] == []
    answered = gateway.post({"model": MODEL, "input": "in no cache yet"}).headers.keys()
    headers = {name for name in answered if name.startswith(("x-", "openai-"))}
    told_of = embed["responses"]["200"]["headers"]
    assert headers <= told_of.keys()
    assert told_of.keys() - headers == {"x-embedding-truncated-inputs", "x-embedding-split-inputs"}
    assert "503" in described["paths"]["/readyz"]["get"]["responses"]


@pytest.mark.parametrize("image", ["png;base64,iVBORw0KGgo=", "svg+xml;base64,PHN2Zz4+Cg==", "jpeg;base64,/9j/"])
def test_the_description_allows_images_as_they_are_sent(gateway: Running, image: str) -> None:
    patterns = re.findall(r'"pattern":"(\^data:[^"]+)"', gateway.get("/openapi.json").text)
    assert patterns
    assert all(re.search(pattern, f"data:image/{image}") for pattern in patterns)
    assert not any(re.search(pattern, f"data:image/{image}!") for pattern in patterns)


def test_the_description_asks_for_a_key_where_one_is_needed(gateway: Running) -> None:
    assert "securitySchemes" not in gateway.get("/openapi.json").text
    config = {"upstreams": {"lexical": {"type": "lexical"}}, "auth": {"keys": {"a": {"key": "k" * 20}}}}
    with running(config) as guarded:
        described = guarded.get("/openapi.json").json()
        paths = described["paths"]
        asked = {path for path, methods in paths.items() for each in methods.values() if each.get("security")}
        assert asked == {"/v1/embeddings", "/v1/models", "/v1/models/{model}"}
        assert described["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
        assert guarded.get("/v1/models", api_key="k" * 20).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models", "/metrics", "/docs", "/nothing"])
def test_head_is_get_without_the_body(path: str, gateway: Running) -> None:
    with httpx.Client(base_url=gateway.url) as client:
        asked, got = client.head(path), client.get(path)
        assert (asked.status_code, asked.content) == (got.status_code, b"")
        assert asked.headers["content-type"] == got.headers["content-type"]
        assert int(asked.headers["content-length"]) > 0
        assert client.get("/healthz").json() == {"status": "ok"}, "nothing was left on the connection"


def test_the_docs_page_loads_from_our_own_host_only(gateway: Running) -> None:
    page = gateway.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"(?:https?:)?//[\w-]+\.", page.text), "an external address"
    assets = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", page.text)
    assert len(assets) >= 4
    for asset in assets:
        assert asset.startswith("/")
        response = gateway.get(asset)
        assert response.status_code == 200, asset
        assert response.content


def test_metrics_are_prometheus_text(gateway: Running) -> None:
    response = gateway.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert "# TYPE embedding_gateway_requests_total counter" in response.text
    assert "process_resident_memory_bytes" in response.text


async def test_with_a_metrics_port_the_main_port_has_neither_metrics_nor_docs() -> None:
    with FakeOpenAI() as fake, running(config(fake, server={"metrics_port": 19090})) as gateway:
        for path in ("/metrics", "/docs"):
            response = gateway.get(path)
            assert response.status_code == 404
            assert error_of(response)["code"] == "not_found"
        assert gateway.post(GOOD).status_code == 200
        admin = gateway.app.admin
        assert admin is not None
        async with httpx.AsyncClient(transport=httpx.ASGITransport(admin), base_url="http://admin") as client:
            metrics = await client.get("/metrics")
            assert metrics.status_code == 200
            assert f'requests_total{{client="anonymous",model="{MODEL}",status="200"}} 1.0' in metrics.text
            docs = await client.get("/docs")
            assert docs.status_code == 200
            for asset in re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", docs.text):
                assert (await client.get(asset)).status_code == 200
            assert (await client.head("/metrics")).status_code == 200
            assert '"supportedSubmitMethods": []' in (await client.get("/docs")).text
            described = (await client.get("/openapi.json")).json()
            assert "/v1/embeddings" in described["paths"]
            for path in ("/v1/embeddings", "/v1/models", "/nothing"):
                assert (await client.get(path)).status_code == 404
            assert (await client.post("/metrics")).json()["error"]["code"] == "method_not_allowed"


# --- response headers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", ["abc", "req_123", "x" * 128, 'a"b=c\\', "6f1c0c1e-8c1f-4a8c-9f5c-1d2e3f4a5b6c"])
def test_a_sane_request_id_comes_back(own: str, gateway: Running) -> None:
    assert gateway.post(GOOD, x_request_id=own).headers["x-request-id"] == own
    assert gateway.post(b"{", x_request_id=own).headers["x-request-id"] == own
    for path in ("/v1/models", "/healthz", "/metrics", "/nothing", "/v1/embeddings"):
        assert gateway.get(path, x_request_id=own).headers.get_list("x-request-id") == [own]


@pytest.mark.parametrize("own", [b"x" * 129, b"x" * 5120, b"a\tb", b"a b", b"caf\xe9", "号".encode(), b""])
def test_any_other_request_id_is_replaced_by_our_own(own: bytes, gateway: Running) -> None:
    ids = {request_id(gateway, data, own) for data in (post(GOOD), head("GET", "/v1/models"), head("GET", "/nothing"))}
    assert len(ids) == 3
    assert all(re.fullmatch(r"req_[0-9a-f]{24}", each) for each in ids)


@pytest.mark.parametrize("own", [b"a\0b", b"a\rb", b"a\nb", b"a\x01b", b"a\x1b[31mb", b"a\x7fb"])
def test_control_characters_in_a_request_id_go_nowhere(own: bytes, gateway: Running) -> None:
    for data in (post(GOOD), head("GET", "/v1/models")):
        assert re.fullmatch(r"(req_[0-9a-f]{24})?", request_id(gateway, data, own)), "not even an id, or one of ours"


def request_id(gateway: Running, data: bytes, own: bytes) -> str:
    reply = raw(gateway.url, data.replace(b"Host: gateway", b"Host: gateway\r\nx-request-id: " + own))
    assert reply is not None
    return reply.headers.get("x-request-id", "")


def test_request_ids_of_our_own_are_all_different(gateway: Running) -> None:
    ids = {gateway.post(GOOD).headers["x-request-id"] for _ in range(20)}
    assert len(ids) == 20


def test_processing_time_is_told_in_whole_milliseconds(gateway: Running) -> None:
    for response in (gateway.post(GOOD), gateway.post(b"{"), gateway.get("/v1/embeddings")):
        assert response.headers["openai-processing-ms"].isdecimal()
        assert int(response.headers["openai-processing-ms"]) <= response.elapsed.total_seconds() * 1000


def told(response: httpx.Response) -> dict[str, Any]:
    """How an answer was made, according to its headers and its usage."""
    assert response.status_code == 200, response.text
    headers = response.headers
    usage = response.json()["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"]
    return {
        "cache": headers["x-embedding-cache"],
        "cached": int(headers["x-embedding-cached-inputs"]),
        "calls": int(headers["x-embedding-upstream-calls"]),
        "upstream": headers.get("x-embedding-upstream"),
        "tokens": usage["prompt_tokens"],
        "free": usage["prompt_tokens_details"]["cached_tokens"],
    }


def test_headers_and_usage_tell_misses_hits_and_partial_hits(fake: FakeOpenAI, gateway: Running) -> None:
    first, second, third = "one fish", "two fish, red fish", "blue fish and a longer tail of words"
    a, b, c = map(count_tokens, (first, second, third))

    def ask(*texts: str, **headers: str) -> dict[str, Any]:
        return told(gateway.post({"model": MODEL, "input": list(texts)}, **headers))

    up = f"up/{MODEL}"
    miss = {"cache": "miss", "cached": 0, "calls": 1, "upstream": up}
    assert ask(first, second) == {**miss, "tokens": a + b, "free": 0}
    hit = {"cache": "hit", "cached": 2, "calls": 0, "upstream": None}
    whole = ask(first, second)
    assert whole == {**hit, "tokens": a + b, "free": a + b}
    partial = ask(first, third, second)
    assert partial == {"cache": "partial", "cached": 2, "calls": 1, "upstream": up, "tokens": a + b + c, "free": a + b}
    assert fake.billed_tokens == a + b + c
    assert [call.rows for call in fake.calls] == [2, 1]


def test_the_same_text_twice_is_billed_once(fake: FakeOpenAI, gateway: Running) -> None:
    text = "said twice, paid once"
    tokens = count_tokens(text)
    answer = told(gateway.post({"model": MODEL, "input": [text, text, text]}))
    assert answer == {
        "cache": "miss", "cached": 0, "calls": 1, "upstream": f"up/{MODEL}", "tokens": 3 * tokens, "free": 2 * tokens,
    }  # fmt: skip
    assert fake.billed_tokens == tokens


def test_calls_are_counted_over_all_batches(fake: FakeOpenAI) -> None:
    models = {"small-batches": {"max_batch": 4, "deployments": [{"upstream": "up", "model": MODEL}]}}
    with running(config(fake, models=models)) as gateway:
        texts = [f"text {i}" for i in range(10)]
        assert told(gateway.post({"model": "small-batches", "input": texts}))["calls"] == 3
    assert sorted(call.rows for call in fake.calls) == [2, 4, 4]


def test_the_vector_space_tells_models_and_lengths_apart(gateway: Running) -> None:
    def space(**fields: Any) -> str:
        return gateway.post({**GOOD, **fields}).headers["x-embedding-space"]

    assert space() == f"openai/{MODEL};1536"
    assert space(dimensions=1536) == space(encoding_format="base64") == space(model=f"up/{MODEL}") == space()
    assert space(dimensions=256) == f"openai/{MODEL};256"
    assert space(model=OTHER_MODEL) == f"openai/{OTHER_MODEL};3072"


@pytest.mark.parametrize("spelling", ["no-cache", "No-Cache", "max-age=0, no-cache", "no-cache,x"])
def test_no_cache_asks_the_upstream_again_and_keeps_its_answer(
    spelling: str, fake: FakeOpenAI, gateway: Running
) -> None:
    body = {"model": MODEL, "input": f"fresh {spelling}"}
    for _ in range(2):
        answer = told(gateway.post(body, cache_control=spelling))
        assert (answer["cache"], answer["calls"], answer["free"]) == ("miss", 1, 0)
    assert told(gateway.post(body))["cache"] == "hit"
    assert len(fake.calls) == 2


def test_no_store_is_answered_from_the_cache_and_leaves_nothing_in_it(fake: FakeOpenAI, gateway: Running) -> None:
    body = {"model": MODEL, "input": "leave no trace"}
    for _ in range(2):
        assert told(gateway.post(body, cache_control="no-store"))["cache"] == "miss"
    assert told(gateway.post(body))["cache"] == "miss"
    assert told(gateway.post(body, cache_control="no-store"))["cache"] == "hit"
    assert told(gateway.post(body, cache_control="no-cache, no-store"))["cache"] == "miss"
    assert len(fake.calls) == 4


def test_other_cache_directives_change_nothing(fake: FakeOpenAI, gateway: Running) -> None:
    body = {"model": MODEL, "input": "other directives"}
    for directive in ("max-age=0", "private", "", "must-revalidate", "no-cachex"):
        gateway.post(body, cache_control=directive)
    assert len(fake.calls) == 1
