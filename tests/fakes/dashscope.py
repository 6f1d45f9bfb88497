"""A fake of DashScope's text and multimodal embedding, native and OpenAI-compatible.

Facts: docs of `text-embedding-synchronous-api`, `multimodal-embedding-api-reference` and
`error-code` at help.aliyun.com, and live error texts from public issues. Texts marked "own
words" appear in none of these sources; clients must not depend on them.
"""

import re
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar

from .dashscope_tables import ERRORS, MODELS, MULTIMODAL_MODELS, TextModel
from .faults import VendorError
from .upstream import Call, Embedded, FakeUpstream
from .vectors import (
    Row,
    Text,
    Vector,
    base64_floats,
    count_tokens,
    numbers,
    sparse_vector,
    texts_in,
    vector,
)
from .wire import Reply, Request, json_reply

NATIVE = "/api/v1/services/embeddings/text-embedding/text-embedding"
MULTIMODAL = "/api/v1/services/embeddings/multimodal-embedding/multimodal-embedding"
COMPATIBLE = "/compatible-mode/v1/embeddings"


class FakeDashScope(FakeUpstream):
    """Native and compatible mode in one server.

    `usage_field`: the field of native answers with the token count (one old page says ``input_tokens``).
    `base64`: compatible mode honours ``encoding_format: base64`` instead of answering floats.
    """

    aliases: ClassVar[Mapping[str, str]] = {
        "rate_limit": "Throttling.RateQuota",
        "quota": "Throttling.AllocationQuota",
        "auth": "InvalidApiKey",
        "unavailable": "ModelUnavailable",
        "internal": "InternalError",
        "bad_input": "InvalidParameter",
    }

    def __init__(
        self,
        api_key: str = "sk-fake",
        *,
        usage_field: str = "total_tokens",
        base64: bool = False,
        models: Mapping[str, TextModel] = MODELS,
        delay: float = 0.0,
        shuffle: bool = True,
        max_batch: int | None = None,
        concurrency_limit: int | None = None,
    ) -> None:
        super().__init__(delay=delay, shuffle=shuffle, max_batch=max_batch, concurrency_limit=concurrency_limit)
        self.api_key = api_key
        self.usage_field = usage_field
        self.base64 = base64
        self.models = models

    def expected(
        self,
        model: str,
        text: str,
        dimensions: int | None = None,
        *,
        text_type: str | None = None,
        instruct: str | None = None,
    ) -> Vector:
        """Return the vector this server answers with; ``document`` is the default role."""
        length = dimensions or (self.models.get(model) or MULTIMODAL_MODELS[model]).dimensions[0]
        role = None if text_type == "document" else text_type
        return vector(model, text, length, text_type=role, instruct=instruct)

    # --- requests -------------------------------------------------------------------------

    def is_embedding(self, request: Request) -> bool:
        return request.method == "POST" and request.path in (NATIVE, COMPATIBLE, MULTIMODAL)

    def texts_of(self, request: Request) -> list[Text]:
        raw_input = _object(request.json).get("input")
        if request.path == COMPATIBLE:
            return texts_in(raw_input)
        if request.path == NATIVE:
            return texts_in(_object(raw_input).get("texts"))
        return [content for _, content in _contents(request.json)]

    def other(self, request: Request) -> Reply:
        if request.path in (NATIVE, COMPATIBLE, MULTIMODAL):
            message = f"Request method '{request.method}' is not supported."
            return self.refuse(request, "InvalidParameter", message)
        return self.refuse(request, "NotFound")

    def embed(self, call: Call) -> Embedded | Reply:
        if (refusal := self._check_key(call)) is not None:
            return refusal
        body = call.json
        if not isinstance(body, dict):
            message = "Required body invalid, please check the request body format."
            return self.refuse(call, "InvalidParameter", message)
        if not body.get("model"):
            return self.refuse(call, "BadRequest.EmptyModel")
        if call.path == MULTIMODAL:
            return self._multimodal(call, body)
        return self._text(call, body)

    def _check_key(self, call: Call) -> Reply | None:
        key = call.bearer or call.headers.get("x-dashscope-apikey")
        if key is None:
            return self.refuse(call, "InvalidApiKey", "No API-key provided.")
        return None if key == self.api_key else self.refuse(call, "InvalidApiKey")

    def _text(self, call: Call, body: dict[str, Any]) -> Embedded | Reply:
        name = str(body["model"])
        compatible = call.path == COMPATIBLE
        refusal = self._check_model(call, name)
        if refusal is not None:
            return refusal
        model = self.models[name]
        raw_input = body.get("input") if compatible else _object(body.get("input")).get("texts")
        options = body if compatible else _object(body.get("parameters"))
        dimension = options.get("dimensions" if compatible else "dimension")
        problem = self._problem(model, raw_input, dimension, options)
        if problem is not None:
            code = "BadRequest.EmptyInput" if raw_input is None else "InvalidParameter"
            return self.refuse(call, code, problem)
        if model.fixed:
            dimension = None  # silently ignored: langchain4j-community pull request 783
        texts = [str(text) for text in call.texts]
        role = {} if compatible else {key: options.get(key) for key in ("text_type", "instruct")}
        rows = [Row(index, text, self.expected(name, text, dimension, **role)) for index, text in enumerate(texts)]
        tokens = sum(map(count_tokens, texts))
        if compatible:
            return self._compatible_answer(body, rows, tokens)
        return self._native_answer(name, str(options.get("output_type", "dense")), rows, tokens)

    def _check_model(self, call: Call, name: str) -> Reply | None:
        asynchronous = name.startswith("text-embedding-async-")
        if asynchronous and "x-dashscope-async" not in call.headers:
            message = "current user api does not support synchronous calls."
            return self.refuse(call, "AccessDenied", message)
        if "x-dashscope-async" in call.headers:
            message = "Current user api does not support asynchronous calls."
            return self.refuse(call, "AccessDenied", message)
        if call.path == COMPATIBLE and name in MULTIMODAL_MODELS:
            message = f"Unsupported model `{name}` for OpenAI compatibility mode."
            return _compatible_error(404, "model_not_supported", message)
        if name not in self.models:
            message = f"The model `{name}` does not exist or you do not have access to it."
            compatible = call.path == COMPATIBLE
            return self.refuse(call, "ModelNotFound", message if compatible else None)
        return None

    def _problem(self, model: TextModel, raw_input: Any, dimension: Any, options: Mapping[str, Any]) -> str | None:
        """Return the vendor's complaint about the parameters, or None if they are valid."""
        texts = [raw_input] if isinstance(raw_input, str) else raw_input
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return "contents is neither str nor list of str.: input.contents"
        limit = self.max_batch or model.rows
        if not 0 < len(texts) <= limit:
            return f"batch size is invalid, it should not be larger than {limit}.: input.contents"
        if not all(text and count_tokens(text) <= model.tokens for text in texts):
            return f"Range of input length should be [1, {model.tokens}]"
        if not model.fixed and dimension is not None and dimension not in model.dimensions:
            return f"dimension {dimension} is invalid: parameters.dimension"  # own words
        if options.get("text_type") not in (None, "query", "document"):
            return "text_type is invalid: parameters.text_type"  # own words
        kinds = (None, "dense", "sparse", "dense&sparse") if model.sparse else (None, "dense")
        if options.get("output_type") not in kinds:
            return "output_type is invalid: parameters.output_type"  # own words
        return None

    # --- answers --------------------------------------------------------------------------

    def _native_answer(self, model: str, kind: str, rows: list[Row], tokens: int) -> Embedded:
        def show(row: Row) -> dict[str, Any]:
            item: dict[str, Any] = {"text_index": row.index}
            if kind != "sparse":
                item["embedding"] = numbers(row)
            if "sparse" in kind:
                item["sparse_embedding"] = sparse_vector(model, str(row.text))
            return item

        return self._native(rows, {self.usage_field: tokens}, tokens, show)

    def _native(self, rows: list[Row], usage: dict[str, int], tokens: int, show: Any) -> Embedded:
        def render(shuffled: list[Row]) -> Reply:
            embeddings = [show(row) for row in shuffled]
            answer = {"output": {"embeddings": embeddings}, "usage": usage}
            return json_reply({**answer, "request_id": str(uuid.uuid4())})

        return Embedded(rows, tokens, render)

    def _compatible_answer(self, body: dict[str, Any], rows: list[Row], tokens: int) -> Embedded:
        as_base64 = self.base64 and body.get("encoding_format") == "base64"
        show = base64_floats if as_base64 else numbers

        def render(shuffled: list[Row]) -> Reply:
            data = [{"embedding": show(row), "index": row.index, "object": "embedding"} for row in shuffled]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            answer = {"data": data, "model": body["model"], "object": "list", "usage": usage}
            return json_reply({**answer, "id": str(uuid.uuid4())})

        return Embedded(rows, tokens, render)

    def _multimodal(self, call: Call, body: dict[str, Any]) -> Embedded | Reply:
        name = str(body["model"])
        if name not in MULTIMODAL_MODELS:
            return self.refuse(call, "ModelNotFound")
        model = MULTIMODAL_MODELS[name]
        contents = _contents(body)
        limit = self.max_batch or model.rows
        if not 0 < len(contents) <= limit:
            message = f"batch size is invalid, it should not be larger than {limit}."
            return self.refuse(call, "InvalidParameter", f"{message}: input.contents")
        requested = _object(body.get("parameters")).get("dimension")
        length = requested if requested in model.dimensions else None  # otherwise silently ignored
        kinds = [kind for kind, _ in contents]
        if max(kinds.count("image"), kinds.count("video")) > model.images:
            message = f"the number of images or videos exceeds {model.images}"  # own words
            return self.refuse(call, "InvalidParameter", f"{message}: input.contents")
        if model.fuses:
            contents = [("fused", "\n".join(content for _, content in contents))] if len(contents) > 1 else contents
            kinds = [kind for kind, _ in contents]
        texts = [content for _, content in contents]
        rows = [Row(i, text, self.expected(name, text, length)) for i, text in enumerate(texts)]
        images = sum(kind != "text" for kind in kinds)
        tokens = sum(count_tokens(text) for kind, text in contents if kind == "text")
        usage = {"input_tokens": tokens, "image_count": images, "duration": 0}

        def show(row: Row) -> dict[str, Any]:
            kind = kinds[min(row.index, len(kinds) - 1)]
            return {"index": row.index, "embedding": numbers(row), "type": kind}

        return self._native(rows, usage, tokens, show)

    # --- errors ---------------------------------------------------------------------------

    def error_reply(self, request: Request, error: VendorError) -> Reply:
        name = self.aliases.get(error.name, error.name)
        status, code, native, compatible = ERRORS.get(name, (400, name, name, None))
        status = error.status or status
        if request.path != COMPATIBLE:
            content = {"code": name, "message": error.message or native}
            content["request_id"] = str(uuid.uuid4())
            return json_reply(content, status, error.headers)
        message = error.message or compatible or native
        if name == "InvalidParameter":
            # Errors of the algorithm have this prefix; those of its validator also say "Value error".
            validator = re.match("batch size|contents is|.* is invalid", message)
            prefix = "<400> InternalError.Algo.InvalidParameter: "
            message = prefix + ("Value error, " if validator else "") + message
        return _compatible_error(status, code, message, error.headers)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _contents(body: Any) -> list[tuple[str, str]]:
    """Return the (kind, content) pairs of a multimodal request; a bare string is a text."""
    items = _object(_object(body).get("input")).get("contents")
    pairs = [("text", item) if isinstance(item, str) else next(iter(_object(item).items()), None)
             for item in (items if isinstance(items, list) else [])]  # fmt: skip
    return [(kind, str(content)) for kind, content in filter(None, pairs)]


def _compatible_error(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Reply:
    snake = code in ("invalid_api_key", "model_not_found", "model_not_supported")
    kind = "invalid_request_error" if snake else code
    error = {"message": message, "type": kind, "param": None, "code": code}
    identity = str(uuid.uuid4())
    return json_reply({"error": error, "id": identity, "request_id": identity}, status, headers)
