"""Google's own SDK works with the fake of Gemini, which shows that the fake is faithful."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.fakes import FakeGemini, count_tokens, faults

FIRST, SECOND = "gemini-embedding-001", "gemini-embedding-2"
TEXTS = ["风急天高猿啸哀", "渚清沙白鸟飞回", "Ten thousand miles in autumn", "naïve 🦜", "x\0y"]


def same(got: Sequence[float] | None, wanted: np.ndarray) -> bool:
    """Compare bit for bit."""
    return np.asarray(got, dtype=np.float32).tobytes() == wanted.tobytes()


@pytest.fixture
def fake() -> Iterator[FakeGemini]:
    with FakeGemini("AIza-right") as fake:
        yield fake


def client_of(fake: FakeGemini, api_key: str = "AIza-right", version: str = "v1beta") -> Any:
    from google import genai

    return genai.Client(api_key=api_key, http_options={"base_url": fake.url, "api_version": version})


@pytest.fixture(autouse=True)
def nothing_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOOGLE_API_KEY", "GEMINI_API_KEY", "GOOGLE_GENAI_USE_VERTEXAI", "GOOGLE_GENAI_USE_ENTERPRISE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def client(fake: FakeGemini) -> Iterator[Any]:
    with client_of(fake) as client:
        yield client


@pytest.mark.parametrize("task", [None, "RETRIEVAL_QUERY", "RETRIEVAL_DOCUMENT"])
def test_the_sdk_embeds_a_list_in_order_with_its_task(client: Any, fake: FakeGemini, task: str | None) -> None:
    answer = client.models.embed_content(model=FIRST, contents=TEXTS, config={"task_type": task})
    assert fake.calls[0].path == f"/v1beta/models/{FIRST}:batchEmbedContents"
    assert len(answer.embeddings) == len(TEXTS)
    for got, text in zip(answer.embeddings, TEXTS, strict=True):
        assert same(got.values, fake.printed(FIRST, text, task_type=task))
        assert same(got.values, fake.printed(FIRST, text)) == (task is None)
        assert np.linalg.norm(got.values) == pytest.approx(1)


@pytest.mark.parametrize("dimensions", [128, 768, 3071])
def test_a_shorter_vector_is_not_of_unit_length(client: Any, fake: FakeGemini, dimensions: int) -> None:
    answer = client.models.embed_content(model=FIRST, contents="hi", config={"output_dimensionality": dimensions})
    got = answer.embeddings[0].values
    assert same(got, fake.printed(FIRST, "hi", dimensions))
    assert np.linalg.norm(got) < 0.99999
    assert np.linalg.norm(fake.expected(FIRST, "hi", dimensions)) == pytest.approx(1)


def test_the_second_model_merges_the_parts_of_one_content_and_embeds_each_content(
    client: Any, fake: FakeGemini
) -> None:
    merged = client.models.embed_content(model=SECOND, contents=["a", "b"])
    assert [len(each.values) for each in merged.embeddings] == [3072]
    contents = [{"parts": [{"text": text}]} for text in TEXTS]
    each = client.models.embed_content(model=SECOND, contents=contents, config={"output_dimensionality": 256})
    for got, text in zip(each.embeddings, TEXTS, strict=True):
        assert same(got.values, fake.printed(SECOND, text, 256))


@pytest.mark.parametrize("usage", [True, False])
def test_usage_may_be_told_or_not(usage: bool) -> None:
    with FakeGemini("AIza-right", usage=usage) as fake, client_of(fake) as client:
        answer = client.models.embed_content(model=FIRST, contents=TEXTS)
    tokens = sum(map(count_tokens, TEXTS))
    assert fake.billed_tokens == tokens
    told = answer.usage_metadata and answer.usage_metadata.prompt_token_count
    assert told == (tokens if usage else None)


def test_both_versions_of_the_api_answer(fake: FakeGemini) -> None:
    for version in ("v1", "v1beta"):
        with client_of(fake, version=version) as client:
            answer = client.models.embed_content(model=FIRST, contents="hi")
        assert same(answer.embeddings[0].values, fake.printed(FIRST, "hi"))
    assert [call.path.split("/")[1] for call in fake.calls] == ["v1", "v1beta"]


def test_the_sdk_lists_and_shows_models(client: Any) -> None:
    assert [model.name for model in client.models.list()] == [
        "models/gemini-embedding-001",
        "models/gemini-embedding-2",
        "models/gemini-embedding-2-preview",
    ]
    shown = client.models.get(model=SECOND)
    assert shown.input_token_limit == 8192
    assert "embedContent" in shown.supported_actions


@pytest.mark.parametrize(
    ("model", "contents", "config", "says"),
    [
        (FIRST, ["a"] * 101, {}, "at most 100 requests can be in one batch"),
        (FIRST, [""], {}, "contains an empty Part"),
        (FIRST, ["a"], {"output_dimensionality": 127}, "output_dimensionality"),
        (FIRST, ["a"], {"output_dimensionality": 3073}, "output_dimensionality"),
        (FIRST, ["a"], {"task_type": "RETRIEVAL"}, "task_type"),
        (FIRST, ["a"], {"title": "A"}, "title"),
        (SECOND, ["a"], {"task_type": "RETRIEVAL_QUERY"}, "task_type"),
    ],
)
def test_the_sdk_reports_what_is_refused(
    client: Any, fake: FakeGemini, model: str, contents: list[str], config: dict[str, Any], says: str
) -> None:
    from google.genai import errors

    with pytest.raises(errors.ClientError, match=says) as caught:
        client.models.embed_content(model=model, contents=contents, config=config)
    assert (caught.value.code, caught.value.status) == (400, "INVALID_ARGUMENT")
    assert fake.billed_tokens == 0


def test_a_full_batch_and_a_title_of_a_document_are_taken(client: Any) -> None:
    assert len(client.models.embed_content(model=FIRST, contents=["a"] * 100).embeddings) == 100
    config = {"task_type": "RETRIEVAL_DOCUMENT", "title": "A"}
    assert client.models.embed_content(model=FIRST, contents="a", config=config).embeddings


@pytest.mark.parametrize("in_list", [False, True])
def test_the_sdk_reports_a_wrong_key_as_a_400(in_list: bool) -> None:
    from google.genai import errors

    with (
        FakeGemini("AIza-right", errors_in_list=in_list) as fake,
        client_of(fake, "AIza-wrong") as client,
        pytest.raises(errors.ClientError, match="API key not valid") as caught,
    ):
        client.models.embed_content(model=FIRST, contents="a")
    assert (caught.value.code, caught.value.status) == (400, "INVALID_ARGUMENT")
    assert caught.value.details["error"]["details"][0]["reason"] == "API_KEY_INVALID"


def test_the_sdk_reports_a_model_that_is_not_there(client: Any) -> None:
    from google.genai import errors

    with pytest.raises(errors.ClientError, match="models/none is not found") as caught:
        client.models.embed_content(model="none", contents="a")
    assert (caught.value.code, caught.value.status) == (404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("name", "code", "status"),
    [
        ("rate_limit", 429, "RESOURCE_EXHAUSTED"),
        ("quota", 429, "RESOURCE_EXHAUSTED"),
        ("auth", 400, "INVALID_ARGUMENT"),
        ("unavailable", 503, "UNAVAILABLE"),
        ("internal", 500, "INTERNAL"),
        ("bad_input", 400, "INVALID_ARGUMENT"),
        ("no_key", 403, "PERMISSION_DENIED"),
        ("location", 400, "FAILED_PRECONDITION"),
        ("deadline", 504, "DEADLINE_EXCEEDED"),
    ],
)
def test_the_sdk_reads_every_error_that_can_be_played(
    client: Any, fake: FakeGemini, name: str, code: int, status: str
) -> None:
    from google.genai import errors

    fake.fail(faults.vendor_error(name), times=None)
    with pytest.raises(errors.APIError) as caught:
        client.models.embed_content(model=FIRST, contents="a")
    assert (caught.value.code, caught.value.status) == (code, status)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "models/other"}, "unexpected model name format"),
        ({"model": FIRST}, "unexpected model name format"),
        ({"model": None}, "unexpected model name format"),
        ({"embedContentConfig": {"outputDimensionality": 768}}, "Cannot find field"),
    ],
)
def test_what_the_sdk_never_sends_is_refused_too(fake: FakeGemini, change: dict[str, Any], says: str) -> None:
    import httpx

    request = {"model": f"models/{FIRST}", "content": {"parts": [{"text": "a"}]}, **change}
    with httpx.Client(headers={"x-goog-api-key": "AIza-right"}, trust_env=False) as http:
        url = f"{fake.url}/v1beta/models/{FIRST}:batchEmbedContents"
        refused = http.post(url, json={"requests": [request]})
        assert (refused.status_code, refused.json()["error"]["status"]) == (400, "INVALID_ARGUMENT")
        assert says in refused.json()["error"]["message"]
        assert http.post(url, json={"requests": []}, headers={"x-goog-api-key": ""}).status_code == 403


def test_a_single_content_has_a_route_of_its_own(fake: FakeGemini) -> None:
    import httpx

    url = f"{fake.url}/v1beta/models/{FIRST}:embedContent"
    with httpx.Client(headers={"x-goog-api-key": "AIza-right"}, trust_env=False) as http:
        answer = http.post(url, json={"content": {"parts": [{"text": "a"}]}, "outputDimensionality": 128}).json()
    assert same(answer["embedding"]["values"], fake.printed(FIRST, "a", 128))


def test_importing_the_sdk_raises_no_warning_that_a_filter_would_have_to_hide() -> None:
    command = [sys.executable, "-W", "error", "-c", "from google import genai; genai.Client(api_key='k').close()"]
    done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
