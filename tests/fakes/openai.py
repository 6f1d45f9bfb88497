"""A fake of OpenAI's embeddings, of Azure's route to them, and of servers that imitate them.

Facts: the OpenAPI file of openai/openai-openapi, the error texts collected from public issues,
azure.py of the openai SDK, and the sources of vLLM and of text-embeddings-inference (TEI).
Texts marked "own words" appear in none of these sources.
"""

import uuid
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from .faults import VendorError
from .openai_tables import (
    ERRORS,
    MAX_TOKENS_PER_INPUT,
    MAX_TOKENS_PER_REQUEST,
    OPENAI_MODELS,
    SELF_HOSTED_MODELS,
)
from .upstream import Call, Embedded, FakeUpstream
from .vectors import (
    Row,
    Text,
    Vector,
    base64_floats,
    count_tokens,
    cut,
    numbers,
    texts_in,
    vector,
)
from .wire import Reply, Request, json_reply

Flavour = Literal["openai", "vllm", "vllm_old", "tei"]


class FakeOpenAI(FakeUpstream):
    """`/v1/embeddings`, `/v1/models` and Azure's deployments, with one key for all.

    `api_key`: None accepts every key, or none. `models` maps names to lengths. `base64`: honour
    ``encoding_format: base64``, or answer floats to it as Mistral does. `listed`: the models that
    `/v1/models` lists; None lists all. `deployments` maps Azure's deployment names to models (by default,
    each model is deployed under its own name). Only the flavour "openai" checks the token limits.
    """

    aliases: ClassVar[Mapping[str, str]] = {
        "rate_limit": "rate_limit_exceeded",
        "quota": "insufficient_quota",
        "auth": "invalid_api_key",
        "unavailable": "server_is_overloaded",
        "internal": "server_error",
        "bad_input": "invalid_input",
    }

    def __init__(
        self,
        api_key: str | None = "sk-fake",
        models: Mapping[str, int] | None = None,
        *,
        flavour: Flavour = "openai",
        base64: bool = True,
        deployments: Mapping[str, str] | None = None,
        matryoshka: tuple[str, ...] = ("text-embedding-3-",),
        delay: float = 0.0,
        shuffle: bool = True,
        max_batch: int | None = None,
        max_tokens_per_request: int = MAX_TOKENS_PER_REQUEST,
        concurrency_limit: int | None = None,
    ) -> None:
        limit = {"tei": 32, "openai": 2048}.get(flavour)
        super().__init__(
            delay=delay,
            shuffle=shuffle,
            max_batch=max_batch or limit,
            concurrency_limit=concurrency_limit,
        )
        self.max_tokens_per_request = max_tokens_per_request
        self.api_key = api_key
        self.flavour = flavour
        self.models = models or (OPENAI_MODELS if flavour == "openai" else SELF_HOSTED_MODELS)
        self.listed: Mapping[str, int] | None = None
        self.deployments = deployments or {name: name for name in self.models}
        self.base64 = base64
        self.matryoshka = matryoshka

    def expected(self, model: str, text: Text, dimensions: int | None = None) -> Vector:
        """Return the vector this server answers with; token ids give a different one than their text.

        A shorter one is the beginning of the full one, scaled to unit length: OpenAI's guide to embeddings.
        """
        native = vector(model, text, self.models[model])
        return native if dimensions in (None, self.models[model]) else cut(native, dimensions)

    # --- requests -------------------------------------------------------------------------

    def is_embedding(self, request: Request) -> bool:
        return request.method == "POST" and request.path.endswith("/embeddings")

    def texts_of(self, request: Request) -> list[Text]:
        return texts_in(request.json.get("input")) if isinstance(request.json, dict) else []

    def other(self, request: Request) -> Reply:
        if request.path == "/v1/models":
            return json_reply({"object": "list", "data": [_model(name) for name in self.listed or self.models]})
        name = request.path.removeprefix("/v1/models/")
        if name in self.models:
            return json_reply(_model(name))
        return self._unknown_model(request, name)

    def embed(self, call: Call) -> Embedded | Reply:
        azure = call.path.startswith("/openai/deployments/")
        refusal = self._check_key(call, azure)
        if refusal is not None:
            return refusal
        if azure and "api-version" not in call.query:
            return _nested(404, {"code": "404", "message": "Resource not found"})
        body = call.json
        if not isinstance(body, dict):
            return self._invalid(call, "We could not parse the JSON body of your request.")
        name = self._model_name(call, body, azure)
        if name is None or name not in self.models:
            return self._unknown_model(call, str(name), azure=azure)
        refusal = self._check_input(call, body, name)
        if refusal is not None:
            return refusal
        dimensions = body.get("dimensions")
        rows = [Row(i, t, self.expected(name, t, dimensions)) for i, t in enumerate(call.texts)]
        return self._answer(body, name, rows, sum(map(count_tokens, call.texts)))

    def _model_name(self, call: Call, body: dict[str, Any], azure: bool) -> str | None:
        if azure:
            deployment = call.path.removeprefix("/openai/deployments/").removesuffix("/embeddings")
            return self.deployments.get(deployment)
        if self.flavour == "tei":
            return next(iter(self.models))  # TEI serves one model and ignores the name
        return body.get("model")

    def _check_key(self, call: Call, azure: bool) -> Reply | None:
        key = call.headers.get("api-key", call.bearer) if azure else call.bearer
        if self.api_key in (None, key):
            return None
        if azure:
            message = "Access denied due to invalid subscription key or wrong API endpoint."
            return _nested(401, {"code": "401", "message": message})
        if key is None:
            return self.refuse(call, "invalid_api_key", "You didn't provide an API key.")
        message = f"Incorrect API key provided: {key}. You can find your API key at "
        link = "https://platform.openai.com/account/api-keys."
        return self.refuse(call, "invalid_api_key", message + link)

    def _unknown_model(self, request: Request, name: str, *, azure: bool = False) -> Reply:
        if azure:
            message = "The API deployment for this resource does not exist."
            return _nested(404, {"code": "DeploymentNotFound", "message": message})
        error = VendorError("model_not_found", f"The model '{name}' does not exist")
        return self.error_reply(request, error)

    def _check_input(self, call: Call, body: dict[str, Any], name: str) -> Reply | None:
        raw_input = body.get("input")
        ids_of_one = isinstance(raw_input, list) and call.texts == [raw_input]
        wellformed = isinstance(raw_input, str) or ids_of_one or raw_input == call.texts
        one_kind = len({type(text) for text in call.texts}) == 1
        if not wellformed or not one_kind or not all(call.texts):
            return self.refuse(call, "invalid_input")
        if self.max_batch is not None and call.rows > self.max_batch:
            return self._too_many(call)
        encoding = body.get("encoding_format") or "float"
        if encoding not in ("float", "base64"):
            message = f"Invalid value for 'encoding_format' = {encoding}."
            return self._invalid(call, f"{message} Supported values: ['float', 'base64'].")
        if self.flavour == "openai" and (long := self._too_long(call)) is not None:
            return long
        return self._check_dimensions(call, body.get("dimensions"), name)

    def _too_many(self, call: Call) -> Reply:
        if self.flavour == "tei":
            message = f"batch size {call.rows} > maximum allowed batch size {self.max_batch}"
            return self.error_reply(call, VendorError("batch_size", message, status=413))
        return self.refuse(call, "invalid_input")

    def _too_long(self, call: Call) -> Reply | None:
        counts = [count_tokens(text) for text in call.texts]
        if max(counts) > MAX_TOKENS_PER_INPUT:
            message = (
                f"This model's maximum context length is {MAX_TOKENS_PER_INPUT} tokens, however "
                f"you requested {max(counts)} tokens ({max(counts)} in your prompt; 0 for the "
                "completion). Please reduce your prompt; or completion length."
            )
            return self._invalid(call, message)
        if sum(counts) > self.max_tokens_per_request:
            message = f"Requested {sum(counts)} tokens, max {self.max_tokens_per_request} tokens"
            code = "max_tokens_per_request"
            return _nested(400, _error(f"{message} per request", code, code))
        return None

    def _check_dimensions(self, call: Call, requested: Any, name: str) -> Reply | None:
        if requested is None or self.flavour == "tei":
            return None
        if not name.startswith(self.matryoshka):
            vllm = f'Model "{name}" does not support matryoshka representation, changing output '
            vllm += "dimensions will lead to poor results."
            openai = "This model does not support specifying dimensions."
            return self._invalid(call, openai if self.flavour == "openai" else vllm)
        if type(requested) is not int or not 0 < requested <= self.models[name]:
            return self._invalid(call, f"Invalid value for 'dimensions' = {requested}.")  # own words
        return None

    # --- answers --------------------------------------------------------------------------

    def _answer(self, body: dict[str, Any], name: str, rows: list[Row], tokens: int) -> Embedded:
        as_base64 = self.base64 and body.get("encoding_format") == "base64"
        show = base64_floats if as_base64 else numbers

        def render(shuffled: list[Row]) -> Reply:
            data = [{"object": "embedding", "index": row.index, "embedding": show(row)} for row in shuffled]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            answer = {"object": "list", "data": data, "model": name, "usage": usage}
            return json_reply(answer, headers=_headers())

        return Embedded(rows, tokens, render)

    def _invalid(self, request: Request, message: str) -> Reply:
        return self.refuse(request, "invalid_input", message)

    def error_reply(self, request: Request, error: VendorError) -> Reply:
        name = self.aliases.get(error.name, error.name)
        status, kind, code, message = ERRORS.get(name, (400, "invalid_request_error", name, name))
        status, message = error.status or status, error.message or message
        headers = {**_headers(), **error.headers}
        if name == "rate_limit_exceeded" and not error.headers:
            headers |= {"retry-after": "2", "retry-after-ms": "2000"}
        if self.flavour == "tei":
            kind = {413: "validation", 422: "tokenizer", 424: "backend", 429: "overloaded"}.get(
                status, "validation" if status < 500 else "backend"
            )
            return json_reply({"message": message, "code": status, "type": kind}, status, headers)
        if self.flavour.startswith("vllm"):
            names = {400: "BadRequestError", 404: "NotFoundError", 401: "AuthenticationError"}
            flat: dict[str, Any] = {"message": message, "type": names.get(status, kind)}
            flat |= {"param": None, "code": status}
            content = {"object": "error", **flat} if self.flavour == "vllm_old" else {"error": flat}
            return json_reply(content, status, headers)
        param = "model" if name == "model_not_found" else None
        return _nested(status, _error(message, kind, code, param), headers)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1_687_882_411, "owned_by": "openai"}


def _error(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, str | None]:
    return {"message": message, "type": kind, "param": param, "code": code}


def _nested(status: int, error: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Reply:
    return json_reply({"error": error}, status, headers or _headers())


def _headers() -> dict[str, str]:
    return {
        "x-request-id": f"req_{uuid.uuid4().hex}",
        "openai-version": "2020-10-01",
        "openai-processing-ms": "12",
        "x-ratelimit-limit-requests": "3000",
        "x-ratelimit-remaining-requests": "2999",
        "x-ratelimit-reset-requests": "20ms",
    }
