"""The settings of an upstream: defaults, mistakes, and the environment."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from app.clock import Clock
from app.types import Batch, Params, Target, WireReply, WireRequest
from app.upstreams import UPSTREAMS
from app.upstreams.access_token import AccessToken
from app.upstreams.auth import HeaderKey, NoAuth
from app.upstreams.signature import BceSignature


def settings_of(**given: Any) -> Any:
    return UPSTREAMS[given["type"]].settings.model_validate(given)


@pytest.mark.parametrize(
    ("given", "base_url"),
    [
        ({"type": "dashscope", "api_key": "k"}, "https://dashscope.aliyuncs.com/api/v1"),
        (
            {"type": "dashscope", "mode": "compatible", "api_key": "k"},
            "https://dashscope.aliyuncs.com/compatible-mode/v1",
        ),
        (
            {"type": "dashscope", "api_key": "k", "base_url": "https://x.example/api/v1"},
            "https://x.example/api/v1",
        ),
        ({"type": "baidu", "api_key": "a", "secret_key": "s"}, "https://aip.baidubce.com"),
        ({"type": "baidu", "mode": "v2", "api_key": "bce-v3/a/s"}, "https://qianfan.baidubce.com/v2"),
        ({"type": "openai", "api_key": "k"}, "https://api.openai.com/v1"),
        ({"type": "gemini", "api_key": "k"}, "https://generativelanguage.googleapis.com/v1beta"),
        ({"type": "ollama"}, "http://localhost:11434"),
        ({"type": "lexical"}, "http://lexical.invalid"),
    ],
)
def test_the_base_url_is_what_each_vendor_documents(given: dict[str, Any], base_url: str) -> None:
    assert settings_of(**given).base_url == base_url


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"type": "dashscope"}, 'api_key: needed; set it here, for instance to "${DASHSCOPE_API_KEY}"'),
        ({"type": "openai"}, 'api_key: needed; set it here, for instance to "${OPENAI_API_KEY}"'),
        ({"type": "gemini"}, 'api_key: needed; set it here, for instance to "${GEMINI_API_KEY}"'),
        ({"type": "openai", "api_key": "k", "path": "embeddings"}, "path\n  Value error, must begin with /"),
        ({"type": "openai", "path": "embeddings", "auth": "basic"}, "path\n  Value error, must begin with /"),
        ({"type": "baidu"}, 'api_key: needed; set it here, for instance to "${BAIDU_API_KEY}", and secret_key'),
        ({"type": "baidu", "api_key": "a"}, 'secret_key: needed; set it here, for instance to "${BAIDU_SECRET_KEY}"'),
        (
            {"type": "baidu", "api_keys": ["a", "b"], "secret_key": "s"},
            "api_keys: an access token is made from one",
        ),
        ({"type": "baidu", "auth": "iam", "secret_key": "s"}, "access_key: needed; auth: iam signs with"),
        ({"type": "baidu", "auth": "iam", "access_key": "a"}, "secret_key: needed; auth: iam signs with"),
        ({"type": "baidu", "mode": "v2"}, "api_key: needed"),
        ({"type": "dashscope", "mode": "nativ", "api_key": "k"}, "Input should be 'native' or 'compatible'"),
        ({"type": "ollama", "trunkate": True}, "Extra inputs are not permitted"),
        ({"type": "ollama", "keep_alive": "for ever"}, "must be a duration: 250ms, 30s, 10m, 1h, 30d, or a number"),
        ({"type": "ollama", "keep_alive": "2 d 3 h d"}, "must be a duration: 250ms, 30s, 10m, 1h, 30d, or a number"),
    ],
)
def test_a_mistake_is_told_readably(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings_of(**given)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("10m", "10m"),
        ("1h30m", "1h30m"),
        ("-1s", "-1s"),
        (90, 90),
        (-1, -1),
        ("90", 90),
        ("-1", -1),
        ("30d", 2592000),
        ("1.5d", 129600),
    ],
)
def test_how_long_a_model_stays_is_written_as_ollama_reads_it(written: str | int, sent: str | int) -> None:
    """Ollama takes Go's durations: no days, and no string without a unit, as a number from the environment is."""
    assert settings_of(type="ollama", keep_alive=written).keep_alive == sent


class NoClock:
    def monotonic(self) -> float:
        return 0.0

    def time(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"type": "openai", "api_key": "k"}, HeaderKey),
        ({"type": "openai", "base_url": "http://localhost:8000/v1"}, NoAuth),
        ({"type": "openai", "base_url": "http://localhost:8000/v1", "auth": "api-key"}, NoAuth),
        ({"type": "openai", "base_url": "http://localhost:8000/v1", "api_key": "k", "auth": "none"}, NoAuth),
        ({"type": "gemini", "api_keys": ["k", "l"]}, HeaderKey),
        ({"type": "ollama"}, NoAuth),
        ({"type": "ollama", "api_key": "k"}, HeaderKey),
        ({"type": "baidu", "api_key": "a", "secret_key": "s"}, AccessToken),
        ({"type": "baidu", "auth": "iam", "access_key": "a", "secret_key": "s"}, BceSignature),
        ({"type": "baidu", "mode": "v2", "api_key": "bce-v3/a/s"}, HeaderKey),
        ({"type": "lexical"}, NoAuth),
    ],
)
def test_credentials_follow_from_the_settings(given: dict[str, Any], kind: type) -> None:
    clock: Clock = NoClock()
    assert type(UPSTREAMS[given["type"]].auth(settings_of(**given), clock, None)) is kind


@pytest.mark.parametrize(
    "given",
    [
        {"type": "dashscope", "api_key": "k"},
        {"type": "openai", "api_key": "k"},
        {"type": "openai", "api_key": "k", "auth": "api-key"},
        {"type": "openai", "api_key": "k", "auth": "none"},
        {"type": "gemini", "api_key": "k"},
        {"type": "ollama", "api_keys": ["k", "l"]},
        {"type": "baidu", "mode": "v2", "api_key": "bce-v3/a/s"},
    ],
    ids=str,
)
async def test_the_header_of_the_key_is_no_header_to_configure_and_any_other_is(given: dict[str, Any]) -> None:
    sent: list[WireRequest] = []

    async def send(request: WireRequest) -> WireReply:
        sent.append(request)
        return WireReply(200, {}, b"{}")

    clock: Clock = NoClock()
    await UPSTREAMS[given["type"]].auth(settings_of(**given), clock, None)(WireRequest("POST", "http://x"), send)
    for header in ("Authorization", "API-Key", "X-Goog-Api-Key"):
        if header.lower() in sent[0].headers:
            with pytest.raises(ValidationError, match=f"headers: {header} would replace api_key"):
                settings_of(**given, headers={header: "mine"})
        else:
            assert settings_of(**given, headers={header: "mine"}).headers == {header: "mine"}


def test_a_configured_header_does_not_replace_the_signature() -> None:
    given = {"type": "baidu", "auth": "iam", "access_key": "a", "secret_key": "s"}
    assert settings_of(**given, headers={"X-Team": "t"}).headers == {"X-Team": "t"}
    with pytest.raises(ValidationError, match="headers: Authorization would replace the signature"):
        settings_of(**given, headers={"AUTHORIZATION": "mine"})


@pytest.mark.parametrize(
    ("name", "environ", "given"),
    [
        ("dashscope", {"DASHSCOPE_API_KEY": "k"}, {"type": "dashscope", "api_key": "k"}),
        (
            "baidu",
            {"BAIDU_API_KEY": "a", "BAIDU_SECRET_KEY": "s"},
            {"type": "baidu", "api_key": "a", "secret_key": "s"},
        ),
        ("baidu", {"BAIDU_API_KEY": "a"}, None),
        ("openai", {"OPENAI_API_KEY": "k"}, {"type": "openai", "api_key": "k"}),
        (
            "openai",
            {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://h/v1"},
            {"type": "openai", "api_key": "k", "base_url": "http://h/v1"},
        ),
        ("openai", {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": ""}, {"type": "openai", "api_key": "k"}),
        ("gemini", {"GEMINI_API_KEY": "k", "GOOGLE_API_KEY": "l"}, {"type": "gemini", "api_key": "k"}),
        ("gemini", {"GEMINI_API_KEY": "", "GOOGLE_API_KEY": "l"}, {"type": "gemini", "api_key": "l"}),
        ("ollama", {"OLLAMA_HOST": "gpu-box"}, {"type": "ollama", "base_url": "http://gpu-box:11434"}),
        ("lexical", {"LEXICAL": "1"}, None),
    ],
)
def test_the_environment_switches_an_upstream_on(
    name: str, environ: dict[str, str], given: dict[str, Any] | None
) -> None:
    found = UPSTREAMS[name].environment(environ)
    assert found == given
    if found is not None:
        settings_of(**found)


@pytest.mark.parametrize("name", list(UPSTREAMS))
def test_variables_that_are_empty_count_as_unset(name: str) -> None:
    variables = {variable for kind in UPSTREAMS.values() for variable in kind.variables}
    assert {"BAIDU_SECRET_KEY", "OPENAI_BASE_URL", "OLLAMA_HOST", "GOOGLE_API_KEY"} < variables
    assert UPSTREAMS[name].environment({}) is None
    assert UPSTREAMS[name].environment(dict.fromkeys(variables, "")) is None


@pytest.mark.parametrize(
    ("host", "base_url"),
    [
        ("localhost", "http://localhost:11434"),
        ("host:1234", "http://host:1234"),
        ("http://host:1234", "http://host:1234"),
        ("http://host", "http://host:80"),
        ("https://host", "https://host:443"),
        ("https://host:8443/ollama/", "https://host:8443/ollama"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("http://0.0.0.0:5000", "http://127.0.0.1:5000"),
        (":11434", "http://127.0.0.1:11434"),
        ("[::]:1234", "http://[::1]:1234"),
        ("::1", "http://[::1]:11434"),
        ("host:port", "http://host:11434"),
        (" 'quoted:1' ", "http://quoted:1"),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(host: str, base_url: str) -> None:
    assert UPSTREAMS["ollama"].environment({"OLLAMA_HOST": host}) == {"type": "ollama", "base_url": base_url}


# --- what is sent -----------------------------------------------------------------------------------


def built(given: dict[str, Any], model: str, params: Params) -> tuple[WireRequest, Any]:
    kind, settings = UPSTREAMS[given["type"]], settings_of(**given)
    facts = kind.models(settings).get(model) or kind.unlisted_model(model)
    batch = Batch("public", ["a", "b"], [b"", b""], params, True, 0.0)
    request = kind.adapter(settings).build_request(batch, Target(settings.base_url, facts))
    return request, orjson.loads(request.body)


def gemini_body(model: str, *texts: str, **options: object) -> dict[str, Any]:
    contents = ({"parts": [{"text": text}]} for text in texts)
    return {"requests": [{"model": f"models/{model}", "content": content, **options} for content in contents]}


DASHSCOPE = {"type": "dashscope", "api_key": "k"}
BAIDU = {"type": "baidu", "api_key": "a", "secret_key": "s"}
GEMINI = {"type": "gemini", "api_key": "k"}
V1_PATH = "https://aip.baidubce.com/rpc/2.0/ai_custom/v1/wenxinworkshop/embeddings/"


@pytest.mark.parametrize(
    ("given", "model", "params", "body"),
    [
        (
            DASHSCOPE,
            "text-embedding-v4",
            Params(256, "query", "dense&sparse", "find"),
            {
                "model": "text-embedding-v4",
                "input": {"texts": ["a", "b"]},
                "parameters": {
                    "text_type": "query",
                    "dimension": 256,
                    "output_type": "dense&sparse",
                    "instruct": "find",
                },
            },
        ),
        (
            DASHSCOPE,
            "text-embedding-v1",
            Params(),
            {
                "model": "text-embedding-v1",
                "input": {"texts": ["a", "b"]},
                "parameters": {"text_type": "document"},
            },
        ),
        (
            {**DASHSCOPE, "mode": "compatible"},
            "text-embedding-v4",
            Params(256, "document"),
            {
                "model": "text-embedding-v4",
                "input": ["a", "b"],
                "dimensions": 256,
                "encoding_format": "float",
            },
        ),
        (BAIDU, "embedding-v1", Params(), {"input": ["a", "b"]}),
        (
            {"type": "baidu", "mode": "v2", "api_key": "k"},
            "bge-large-zh",
            Params(),
            {"model": "bge-large-zh", "input": ["a", "b"], "encoding_format": "float"},
        ),
        (
            {"type": "openai", "api_key": "k"},
            "text-embedding-3-small",
            Params(256),
            {
                "model": "text-embedding-3-small",
                "input": ["a", "b"],
                "dimensions": 256,
                "encoding_format": "base64",
            },
        ),
        (
            {"type": "openai", "base_url": "http://h/v1", "encoding_format": "omit"},
            "m",
            Params(input_type="query", instruct="x"),
            {"model": "m", "input": ["a", "b"]},
        ),
        (GEMINI, "gemini-embedding-001", Params(), gemini_body("gemini-embedding-001", "a", "b")),
        (
            GEMINI,
            "gemini-embedding-001",
            Params(256, "query"),
            gemini_body("gemini-embedding-001", "a", "b", taskType="RETRIEVAL_QUERY", outputDimensionality=256),
        ),
        (
            GEMINI,
            "gemini-embedding-001",
            Params(input_type="document"),
            gemini_body("gemini-embedding-001", "a", "b", taskType="RETRIEVAL_DOCUMENT"),
        ),
        (
            GEMINI,
            "gemini-embedding-2",
            Params(256),
            gemini_body("gemini-embedding-2", "a", "b", outputDimensionality=256),
        ),
        ({"type": "ollama"}, "m", Params(), {"model": "m", "input": ["a", "b"], "truncate": False}),
        (
            {"type": "ollama", "keep_alive": -1, "truncate": True},
            "m",
            Params(128),
            {"model": "m", "input": ["a", "b"], "truncate": True, "dimensions": 128, "keep_alive": -1},
        ),
    ],
)
def test_the_body_is_the_dialects(given: dict[str, Any], model: str, params: Params, body: Any) -> None:
    assert built(given, model, params)[1] == body


@pytest.mark.parametrize(
    ("given", "model", "url"),
    [
        (BAIDU, "embedding-v1", V1_PATH + "embedding-v1"),
        (BAIDU, "Embedding-V1", V1_PATH + "embedding-v1"),
        (BAIDU, "bge-large-zh", V1_PATH + "bge_large_zh"),
        (BAIDU, "bge-large-en", V1_PATH + "bge_large_en"),
        (BAIDU, "tao-8k", V1_PATH + "tao_8k"),
        (BAIDU, "my/../service?x", V1_PATH + "my%2F..%2Fservice%3Fx"),
        (
            DASHSCOPE,
            "text-embedding-v3",
            "https://dashscope.aliyuncs.com/api/v1/services/embeddings/text-embedding/text-embedding",
        ),
        ({"type": "openai", "base_url": "http://h/v1/", "path": "/embed"}, "m", "http://h/v1/embed"),
        (
            GEMINI,
            "gemini-embedding-001",
            "https://generativelanguage.googleapis.com/v1beta/models/gemini-embedding-001:batchEmbedContents",
        ),
        ({"type": "ollama"}, "m", "http://localhost:11434/api/embed"),
    ],
)
def test_the_path_is_the_dialects(given: dict[str, Any], model: str, url: str) -> None:
    assert built(given, model, Params())[0].url == url


def test_a_query_is_kept_apart_from_the_url() -> None:
    given = {"type": "openai", "base_url": "http://h/v1", "query": {"api-version": "2024-10-21"}}
    assert built(given, "m", Params())[0].query == {"api-version": "2024-10-21"}


def test_openais_dialect_of_dashscope_has_no_roles_to_offer() -> None:
    settings = settings_of(**DASHSCOPE, mode="compatible")
    facts = UPSTREAMS["dashscope"].models(settings).values()
    assert all(model.roles == ("document",) and not model.instruct for model in facts)
