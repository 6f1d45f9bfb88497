"""The vendors' own SDKs work with the fakes, which shows that the fakes are faithful."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.fakes import (
    FakeBaidu,
    FakeDashScope,
    FakeOllama,
    FakeOpenAI,
    baidu_tokens,
    count_tokens,
)
from tests.fakes import sparse_vector as sparse

TEXTS = ["风急天高猿啸哀", "渚清沙白鸟飞回", "Ten thousand miles in autumn", "naïve 🦜", "x\0y"]


def same(got: Sequence[float], wanted: np.ndarray) -> bool:
    """Compare bit for bit."""
    return np.asarray(got, dtype=np.float32).tobytes() == wanted.tobytes()


# --- DashScope -----------------------------------------------------------------------------


@pytest.fixture
def dashscope_fake() -> Iterator[FakeDashScope]:
    with FakeDashScope("sk-right") as fake:
        yield fake


@pytest.fixture
def embed(dashscope_fake: FakeDashScope, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import dashscope
    from dashscope.api_entities.http_request import close_shared_sync_session

    monkeypatch.setattr(dashscope, "base_http_api_url", f"{dashscope_fake.url}/api/v1")
    monkeypatch.setattr(dashscope, "api_key", "sk-right")
    yield dashscope.TextEmbedding.call
    close_shared_sync_session()


def test_dashscope_sdk_embeds_a_list_and_finds_each_text_by_its_index(
    embed: Any, dashscope_fake: FakeDashScope
) -> None:
    answer = embed("text-embedding-v4", TEXTS)
    assert answer.status_code == 200
    assert answer.usage["total_tokens"] == sum(map(count_tokens, TEXTS))
    found = {row["text_index"]: row["embedding"] for row in answer.output["embeddings"]}
    assert sorted(found) == list(range(len(TEXTS)))
    assert list(found) != sorted(found)
    for index, text in enumerate(TEXTS):
        assert same(found[index], dashscope_fake.expected("text-embedding-v4", text))


def test_dashscope_sdk_embeds_a_string_with_role_and_dimension(embed: Any, dashscope_fake: FakeDashScope) -> None:
    answer = embed("text-embedding-v3", "hi", text_type="query", dimension=256, instruct="find")
    got = answer.output["embeddings"][0]["embedding"]
    wanted = dashscope_fake.expected("text-embedding-v3", "hi", 256, text_type="query", instruct="find")
    assert same(got, wanted)
    assert not same(got, dashscope_fake.expected("text-embedding-v3", "hi", 256))


@pytest.mark.parametrize("kind", ["sparse", "dense&sparse"])
def test_dashscope_sdk_gets_sparse_vectors(embed: Any, kind: str) -> None:
    row = embed("text-embedding-v4", "to be or not", output_type=kind).output["embeddings"][0]
    assert row["sparse_embedding"] == sparse("text-embedding-v4", "to be or not")
    assert ("embedding" in row) == ("dense" in kind)


def test_dashscope_sdk_reports_a_wrong_key(embed: Any) -> None:
    answer = embed("text-embedding-v4", "hi", api_key="sk-wrong")
    seen = (answer.status_code, answer.code, answer.message)
    assert seen == (401, "InvalidApiKey", "Invalid API-key provided.")
    assert answer.request_id


@pytest.mark.parametrize(("model", "limit"), [("text-embedding-v4", 10), ("text-embedding-v2", 25)])
def test_dashscope_sdk_reports_too_many_rows(embed: Any, model: str, limit: int) -> None:
    answer = embed(model, ["a"] * (limit + 1))
    assert (answer.status_code, answer.code) == (400, "InvalidParameter")
    words = f"batch size is invalid, it should not be larger than {limit}.: input.contents"
    assert answer.message == words
    assert embed(model, ["a"] * limit).status_code == 200


def test_dashscope_sdk_embeds_multimodal_contents(embed: Any, dashscope_fake: FakeDashScope) -> None:
    import dashscope

    contents = [{"text": "a cat"}, {"image": "https://example.com/cat.png"}]
    answer = dashscope.MultiModalEmbedding.call("multimodal-embedding-v1", contents)
    rows = {row["index"]: row for row in answer.output["embeddings"]}
    assert [rows[0]["type"], rows[1]["type"]] == ["text", "image"]
    wanted = dashscope_fake.expected("multimodal-embedding-v1", "a cat")
    assert same(rows[0]["embedding"], wanted)


def test_openai_sdk_speaks_to_dashscope_compatible_mode(dashscope_fake: FakeDashScope) -> None:
    import openai

    base = f"{dashscope_fake.url}/compatible-mode/v1"
    with openai.OpenAI(api_key="sk-right", base_url=base, max_retries=0) as client:
        # the SDK asks for base64 by default, and gets floats
        answer = client.embeddings.create(model="text-embedding-v4", input=TEXTS, dimensions=64)
        for row in answer.data:
            wanted = dashscope_fake.expected("text-embedding-v4", TEXTS[row.index], 64)
            assert same(row.embedding, wanted)
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="text-embedding-v4", input=["a"] * 11)
    assert caught.value.body == {
        "message": "<400> InternalError.Algo.InvalidParameter: Value error, batch size is "
        "invalid, it should not be larger than 10.: input.contents",
        "type": "InvalidParameter",
        "param": None,
        "code": "InvalidParameter",
    }


# --- Baidu ---------------------------------------------------------------------------------


@pytest.fixture
def baidu_fake() -> Iterator[FakeBaidu]:
    with FakeBaidu() as fake:
        yield fake


@pytest.fixture
def qianfan(baidu_fake: FakeBaidu, monkeypatch: pytest.MonkeyPatch) -> Any:
    # The SDK would also ask the console for its models; that must not leave the machine either.
    monkeypatch.setenv("QIANFAN_DISABLE_CACHE", "true")
    import qianfan

    config = qianfan.get_config()
    for name in ("BASE_URL", "CONSOLE_API_BASE_URL", "IAM_BASE_URL"):
        monkeypatch.setattr(config, name, baidu_fake.url)
    monkeypatch.setattr(config, "DISABLE_CACHE", True)
    monkeypatch.setattr(config, "DISABLE_EB_SDK", True)
    return qianfan


@pytest.fixture
def by_token(baidu_fake: FakeBaidu) -> dict[str, str]:
    return {"ak": baidu_fake.api_key, "sk": baidu_fake.secret_key}


@pytest.fixture
def by_signature(baidu_fake: FakeBaidu) -> dict[str, str]:
    return {"access_key": baidu_fake.access_key, "secret_key": baidu_fake.iam_secret_key}


@pytest.mark.parametrize("model", ["Embedding-V1", "bge-large-zh", "bge-large-en"])
def test_qianfan_sdk_embeds_with_an_access_token(
    qianfan: Any, baidu_fake: FakeBaidu, by_token: dict[str, str], model: str
) -> None:
    answer = qianfan.Embedding(**by_token).do(texts=TEXTS, model=model)
    assert answer["object"] == "embedding_list"
    assert answer["usage"]["total_tokens"] == sum(map(baidu_tokens, TEXTS))
    for row in answer["data"]:
        assert same(row["embedding"], baidu_fake.expected(model, TEXTS[row["index"]]))
    assert [row["index"] for row in answer["data"]] != list(range(len(TEXTS)))
    assert baidu_fake.token_requests == 1
    assert "access_token" in baidu_fake.calls[0].query


def test_qianfan_sdk_embeds_with_a_signature(qianfan: Any, baidu_fake: FakeBaidu, by_signature: dict[str, str]) -> None:
    answer = qianfan.Embedding(**by_signature).do(texts=["长"], model="tao-8k")
    assert same(answer["data"][0]["embedding"], baidu_fake.expected("tao-8k", "长"))
    assert baidu_fake.token_requests == 0
    assert baidu_fake.calls[0].headers["authorization"].startswith("bce-auth-v1/")


def test_qianfan_sdk_is_refused_with_a_wrong_signature(qianfan: Any, by_signature: dict[str, str]) -> None:
    wrong = {**by_signature, "secret_key": "wrong"}
    with pytest.raises(qianfan.errors.APIError) as caught:
        qianfan.Embedding(**wrong).do(texts=["a"], retry_count=1)
    assert caught.value.error_code == 14


@pytest.mark.parametrize(("ak", "sk"), [("wrong", None), (None, "wrong")])
def test_qianfan_sdk_is_refused_a_token_for_a_wrong_key(
    qianfan: Any, by_token: dict[str, str], ak: str | None, sk: str | None
) -> None:
    with pytest.raises(qianfan.errors.AuthError):
        qianfan.Embedding(ak=ak or by_token["ak"], sk=sk or by_token["sk"]).do(texts=["a"])


def test_qianfan_sdk_reports_too_many_rows(qianfan: Any, by_token: dict[str, str], baidu_fake: FakeBaidu) -> None:
    with pytest.raises(qianfan.errors.APIError) as caught:
        qianfan.Embedding(**by_token).do(texts=["a"] * 17, retry_count=1)
    assert caught.value.error_code == 336003
    assert baidu_fake.calls[0].status == 200


@pytest.mark.parametrize("end", ["expire_tokens", "invalidate_tokens"])
def test_qianfan_sdk_renews_a_token_that_has_ended(
    qianfan: Any,
    baidu_fake: FakeBaidu,
    by_token: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    # By default the SDK renews no token within an hour, not even a refused one.
    monkeypatch.setattr(qianfan.get_config(), "ACCESS_TOKEN_REFRESH_MIN_INTERVAL", 0)
    embedding = qianfan.Embedding(**by_token)
    embedding.do(texts=["a"])
    getattr(baidu_fake, end)()
    assert embedding.do(texts=["a"])["data"]
    assert baidu_fake.token_requests == 2
    assert len(baidu_fake.calls) == 3


@pytest.mark.parametrize("short_lived", [False, True])
def test_qianfan_sdk_speaks_v2_with_a_key_or_a_short_lived_bearer(
    qianfan: Any, baidu_fake: FakeBaidu, by_signature: dict[str, str], short_lived: bool
) -> None:
    # The SDK has no Embedding class for V2; its transport for V2 is the one for chat.
    from qianfan.resources.requestor.openapi_requestor import QfAPIV2Requestor

    credentials = by_signature if short_lived else {"bearer_token": baidu_fake.v2_key}
    requestor: Any = QfAPIV2Requestor(**credentials)
    body = {"model": "embedding-v1", "input": TEXTS}
    header = {"Content-Type": "application/json"}
    answer = requestor.llm("/v2/embeddings", header=header, body=body).body
    assert answer["model"] == "embedding-v1"
    for row in answer["data"]:
        assert same(row["embedding"], baidu_fake.expected("embedding-v1", TEXTS[row["index"]]))
    assert baidu_fake.token_requests == short_lived


def test_openai_sdk_sees_v2_errors_with_real_statuses(baidu_fake: FakeBaidu) -> None:
    import openai

    base = f"{baidu_fake.url}/v2"
    with openai.OpenAI(api_key=baidu_fake.v2_key, base_url=base, max_retries=0) as client:
        ask = client.embeddings.create
        with pytest.raises(openai.BadRequestError) as wrong_form:
            ask(model="embedding-v1", input="bare", encoding_format="float")
        assert wrong_form.value.code == "invalid_argument"
        with pytest.raises(openai.AuthenticationError) as unknown:
            ask(model="unknown", input=["a"], encoding_format="float")
        assert unknown.value.code == "invalid_model"
        client.api_key = "bce-v3/ALTAK-wrong/0"
        with pytest.raises(openai.AuthenticationError) as refused:
            ask(model="embedding-v1", input=["a"], encoding_format="float")
        assert refused.value.code == "invalid_iam_token"


# --- Ollama --------------------------------------------------------------------------------


@pytest.fixture
def ollama_fake() -> Iterator[FakeOllama]:
    with FakeOllama() as fake:
        yield fake


@pytest.fixture
def ollama_client(ollama_fake: FakeOllama) -> Iterator[Any]:
    import ollama

    client = ollama.Client(ollama_fake.url)
    yield client
    client._client.close()  # version 0.6 has no public way to close it


@pytest.mark.parametrize("dimensions", [None, 100, 768, 5000])
def test_ollama_sdk_embeds_in_order_and_too_great_a_dimension_is_ignored(
    ollama_client: Any, ollama_fake: FakeOllama, dimensions: int | None
) -> None:
    answer = ollama_client.embed("nomic-embed-text", TEXTS, dimensions=dimensions)
    assert answer.prompt_eval_count == sum(map(count_tokens, TEXTS))
    for got, text in zip(answer.embeddings, TEXTS, strict=True):
        assert len(got) == (100 if dimensions == 100 else 768)
        assert same(got, ollama_fake.expected("nomic-embed-text", text, dimensions))


def test_ollama_sdk_lists_and_shows_models(ollama_client: Any) -> None:
    names = [model.model for model in ollama_client.list().models]
    assert names == ["nomic-embed-text:latest", "bge-m3:latest", "llama3:latest"]
    shown = ollama_client.show("bge-m3")
    assert shown.capabilities == ["embedding"]
    assert shown.modelinfo["bert.embedding_length"] == 1024


def test_ollama_sdk_reports_errors(ollama_client: Any) -> None:
    import ollama

    with pytest.raises(ollama.ResponseError, match="model 'none' not found") as caught:
        ollama_client.embed("none", "hi")
    assert caught.value.status_code == 404
    long = "word " * 4000
    with pytest.raises(ollama.ResponseError, match="the input length exceeds the context length"):
        ollama_client.embed("nomic-embed-text", long, truncate=False)
    assert len(ollama_client.embed("nomic-embed-text", long).embeddings) == 1


def test_ollama_embeds_nothing_to_warm_up(ollama_client: Any, ollama_fake: FakeOllama) -> None:
    answer = ollama_client.embed("nomic-embed-text", "")
    assert answer.embeddings == []
    assert answer.prompt_eval_count is None
    assert ollama_fake.billed_tokens == 0


# --- OpenAI --------------------------------------------------------------------------------


@pytest.mark.parametrize("base64", [True, False])
@pytest.mark.parametrize("encoding", ["float", None])
def test_openai_sdk_embeds_texts(base64: bool, encoding: str | None) -> None:
    import openai

    asked: dict[str, Any] = {"encoding_format": encoding} if encoding else {}
    with (
        FakeOpenAI(base64=base64) as fake,
        openai.OpenAI(api_key="sk-fake", base_url=f"{fake.url}/v1") as client,
    ):
        answer = client.embeddings.create(model="text-embedding-3-small", input=TEXTS, **asked)
        assert answer.usage.total_tokens == fake.billed_tokens == sum(map(count_tokens, TEXTS))
        assert [row.index for row in answer.data] != list(range(len(TEXTS)))
        for row in answer.data:
            assert same(row.embedding, fake.expected("text-embedding-3-small", TEXTS[row.index]))
        assert [model.id for model in client.models.list()] == list(fake.models)


def test_openai_sdk_embeds_token_ids_and_chooses_dimensions() -> None:
    import openai

    with (
        FakeOpenAI() as fake,
        openai.OpenAI(api_key="sk-fake", base_url=f"{fake.url}/v1") as client,
    ):
        model = "text-embedding-3-large"
        one = client.embeddings.create(model=model, input=[15339, 1917], dimensions=256)
        assert same(one.data[0].embedding, fake.expected(model, [15339, 1917], 256))
        two = client.embeddings.create(model=model, input=[[1], [2, 3]])
        assert len(two.data) == 2
        assert fake.billed_tokens == 5


def test_openai_sdk_reports_errors() -> None:
    import openai

    with (
        FakeOpenAI() as fake,
        openai.OpenAI(api_key="sk-fake", base_url=f"{fake.url}/v1", max_retries=0) as client,
    ):
        ask = client.embeddings.create
        with pytest.raises(openai.NotFoundError, match="The model 'none' does not exist"):
            ask(model="none", input="a")
        with pytest.raises(openai.BadRequestError, match=r"'\$\.input' is invalid"):
            ask(model="text-embedding-3-small", input=["a"] * 2049)
        with pytest.raises(openai.BadRequestError, match="maximum context length is 8192"):
            ask(model="text-embedding-3-small", input=[[1] * 8193])
        with pytest.raises(openai.BadRequestError, match="max 300000 tokens per request"):
            ask(model="text-embedding-3-small", input=[[1] * 8000] * 38)
        with pytest.raises(openai.BadRequestError, match="does not support specifying"):
            ask(model="text-embedding-ada-002", input="a", dimensions=8)
        client.api_key = "sk-wrong"
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key provided"):
            ask(model="text-embedding-3-small", input="a")


def test_azure_sdk_reaches_a_deployment() -> None:
    import openai

    deployments = {"mine": "text-embedding-3-small"}
    with (
        FakeOpenAI(deployments=deployments) as fake,
        openai.AzureOpenAI(
            api_key="sk-fake", azure_endpoint=fake.url, api_version="2024-10-21", max_retries=0
        ) as client,
    ):
        answer = client.embeddings.create(model="mine", input="a")
        assert same(answer.data[0].embedding, fake.expected("text-embedding-3-small", "a"))
        with pytest.raises(openai.NotFoundError) as caught:
            client.embeddings.create(model="other", input="a")
    assert caught.value.code == "DeploymentNotFound"


def test_tei_refuses_a_large_batch_in_its_own_words() -> None:
    import openai

    with (
        FakeOpenAI(None, flavour="tei") as fake,
        openai.OpenAI(api_key="any", base_url=f"{fake.url}/v1", max_retries=0) as client,
        pytest.raises(openai.APIStatusError, match="413") as caught,
    ):
        client.embeddings.create(model="any", input=["a"] * 33)
    words = "batch size 33 > maximum allowed batch size 32"
    assert caught.value.body == {"message": words, "code": 413, "type": "validation"}


def test_importing_the_sdks_raises_no_warning_that_a_filter_would_have_to_hide() -> None:
    imports = "import dashscope, qianfan, ollama, openai"
    command = [sys.executable, "-W", "error", "-c", imports]
    environment = {**os.environ, "QIANFAN_DISABLE_CACHE": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
