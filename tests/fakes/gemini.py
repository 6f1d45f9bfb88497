"""A fake of Gemini's Developer API: `batchEmbedContents`, `embedContent`, and the list of models.

Facts: ai.google.dev/api/embeddings, google-genai 3.4.0, and live error texts from public issues. Texts
marked "own words" appear in none of these sources. The fake has no limit on an input's tokens: how Gemini treats
long inputs is unknown.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from .faults import VendorError
from .upstream import Call, Embedded, FakeUpstream
from .vectors import Row, Text, Vector, count_tokens, numbers, vector
from .wire import Reply, Request, json_reply

MODELS: Mapping[str, int] = {
    "gemini-embedding-001": 2048,
    "gemini-embedding-2": 8192,
    "gemini-embedding-2-preview": 8192,
}
"""Model name -> maximum tokens of an input, as the model list states it."""
LENGTH = 3072
SHORTEST = 128
MAX_BATCH = 100
TASK_TYPES = (
    *("TASK_TYPE_UNSPECIFIED", "RETRIEVAL_QUERY", "RETRIEVAL_DOCUMENT", "SEMANTIC_SIMILARITY", "CLASSIFICATION"),
    *("CLUSTERING", "QUESTION_ANSWERING", "FACT_VERIFICATION", "CODE_RETRIEVAL_QUERY"),
)
FIELDS = frozenset({"model", "content", "taskType", "title", "outputDimensionality"})

_TYPE = "type.googleapis.com/google.rpc."
_KEY = {"@type": _TYPE + "ErrorInfo", "domain": "googleapis.com", "reason": "API_KEY_INVALID"}
_RETRY = {"@type": _TYPE + "RetryInfo", "retryDelay": "2s"}
_EXCEEDED = "You exceeded your current quota, please check your plan and billing details."


def _quota(period: str) -> dict[str, Any]:
    metric = "generativelanguage.googleapis.com/embed_content_free_tier_requests"
    quota = f"EmbedContentRequestsPer{period}PerUserPerProjectPerModel-FreeTier"
    return {"@type": _TYPE + "QuotaFailure", "violations": [{"quotaMetric": metric, "quotaId": quota}]}


# name: (HTTP status, its name in google.rpc, text, details)
ERRORS: Mapping[str, tuple[int, str, str, list[dict[str, Any]]]] = {
    "invalid": (400, "INVALID_ARGUMENT", "* EmbedContentRequest.content contains an empty Part.\n", []),
    "key": (400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", [_KEY]),
    "location": (400, "FAILED_PRECONDITION", "User location is not supported for the API use.", []),
    "no_key": (
        403,
        "PERMISSION_DENIED",
        "Method doesn't allow unregistered callers (callers without established identity). Please use API Key or "
        "other form of API consumer identity to call this API.",
        [],
    ),
    "not_found": (404, "NOT_FOUND", "models/unknown is not found for API version v1beta.", []),
    "minute": (429, "RESOURCE_EXHAUSTED", _EXCEEDED, [_quota("Minute"), _RETRY]),
    "day": (429, "RESOURCE_EXHAUSTED", _EXCEEDED, [_quota("Day"), _RETRY]),
    "internal": (500, "INTERNAL", "An internal error has occurred. Please retry.", []),
    "unavailable": (503, "UNAVAILABLE", "The model is overloaded. Please try again later.", []),
    "deadline": (504, "DEADLINE_EXCEEDED", "Deadline expired before operation could complete.", []),
}


class FakeGemini(FakeUpstream):
    """`/v1beta/models` and `/v1/models`, with one key for all.

    `usage`: whether answers have a token count; older ones do not. `errors_in_list`: an error is a list of one.
    Rows have no index, so they are always in order.
    """

    aliases: ClassVar[Mapping[str, str]] = {
        "rate_limit": "minute",
        "quota": "day",
        "auth": "key",
        "bad_input": "invalid",
    }

    def __init__(
        self,
        api_key: str = "AIza-fake",
        *,
        usage: bool = True,
        errors_in_list: bool = False,
        models: Mapping[str, int] = MODELS,
        delay: float = 0.0,
        max_batch: int | None = None,
        concurrency_limit: int | None = None,
    ) -> None:
        super().__init__(
            delay=delay, shuffle=False, max_batch=max_batch or MAX_BATCH, concurrency_limit=concurrency_limit
        )
        self.api_key = api_key
        self.usage = usage
        self.errors_in_list = errors_in_list
        self.models = models

    def printed(self, model: str, text: str, dimensions: int | None = None, *, task_type: str | None = None) -> Vector:
        """Return the vector as this server prints it: a shorter one is cut off the full one and not of unit length."""
        return vector(model, text, LENGTH, task_type=task_type)[: dimensions or LENGTH]

    def expected(self, model: str, text: str, dimensions: int | None = None, *, task_type: str | None = None) -> Vector:
        """Return the printed vector at unit length: divided by its norm in float64."""
        wide = self.printed(model, text, dimensions, task_type=task_type).astype(np.float64)
        scaled: Vector = (wide / float(np.linalg.norm(wide))).astype(np.float32)
        return scaled

    # --- requests -------------------------------------------------------------------------

    def is_embedding(self, request: Request) -> bool:
        return request.method == "POST" and request.path.endswith((":batchEmbedContents", ":embedContent"))

    def texts_of(self, request: Request) -> list[Text]:
        return [_text(item) for item in _requests(request)]

    def other(self, request: Request) -> Reply:
        if (refusal := self._check_key(request)) is not None:
            return refusal
        name = _resource(request)
        if request.path.endswith("/models"):
            return json_reply({"models": [self._model_entry(name) for name in self.models]})
        return json_reply(self._model_entry(name)) if name in self.models else self._unknown(request, name)

    def embed(self, call: Call) -> Embedded | Reply:
        name, _, method = _resource(call).partition(":")
        refusal = self._check_key(call)
        if refusal is not None:
            return refusal
        if name not in self.models:
            return self._unknown(call, name)
        requests = _requests(call)
        problem = self._problem(name, requests, repeated=method == "batchEmbedContents")
        if problem is not None:
            return self.refuse(call, "invalid", problem)
        rows = [
            Row(i, text, self.printed(name, text, item.get("outputDimensionality"), task_type=item.get("taskType")))
            for i, (item, text) in enumerate(zip(requests, map(_text, requests), strict=True))
        ]
        return self._answer(rows, sum(map(count_tokens, call.texts)), batch=method == "batchEmbedContents")

    def _check_key(self, request: Request) -> Reply | None:
        key = request.headers.get("x-goog-api-key") or request.query.get("key")
        if key is None:
            return self.refuse(request, "no_key")
        return None if key == self.api_key else self.refuse(request, "key")

    def _unknown(self, request: Request, name: str) -> Reply:
        words = f"models/{name} is not found for API version v1beta, or is not supported for embedContent."
        return self.refuse(request, "not_found", words)

    def _problem(self, name: str, requests: list[dict[str, Any]], *, repeated: bool) -> str | None:
        """Return the vendor's complaint about the first invalid request, or None."""
        limit = self.max_batch
        if not requests:
            return "* BatchEmbedContentsRequest.requests: requests must not be empty\n"  # own words
        if limit is not None and len(requests) > limit:
            return f"* BatchEmbedContentsRequest.requests: at most {limit} requests can be in one batch\n"
        for i, item in enumerate(requests):
            where = f"BatchEmbedContentsRequest.requests[{i}]" if repeated else "EmbedContentRequest"
            if item.get("model", None if repeated else f"models/{name}") != f"models/{name}":
                return f"* {where}.model: unexpected model name format\n"
            if (problem := _problem(name, item, where)) is not None:
                return problem
        return None

    # --- answers --------------------------------------------------------------------------

    def _answer(self, rows: list[Row], tokens: int, *, batch: bool) -> Embedded:
        def render(shown: list[Row]) -> Reply:
            vectors = [{"values": numbers(row)} for row in shown]
            answer: dict[str, Any] = {"embeddings": vectors} if batch else {"embedding": vectors[0]}
            if self.usage:
                details = [{"modality": "TEXT", "tokenCount": tokens}]
                answer["usageMetadata"] = {"promptTokenCount": tokens, "promptTokenDetails": details}
            return json_reply(answer, headers={"Content-Type": "application/json; charset=UTF-8"})

        return Embedded(rows, tokens, render)

    def _model_entry(self, name: str) -> dict[str, Any]:
        methods = ["embedContent", "countTextTokens", "countTokens", "asyncBatchEmbedContent"]
        return {
            "name": f"models/{name}",
            "version": "001",
            "displayName": name,
            "inputTokenLimit": self.models[name],
            "outputTokenLimit": 1,
            "supportedGenerationMethods": methods,
        }

    def error_reply(self, request: Request, error: VendorError) -> Reply:
        name = self.aliases.get(error.name, error.name)
        status, word, text, details = ERRORS.get(name, (400, "INVALID_ARGUMENT", name, []))
        status = error.status or status
        content: dict[str, Any] = {"code": status, "message": error.message or text, "status": word}
        if details:
            content["details"] = details
        body = {"error": content}
        return json_reply([body] if self.errors_in_list else body, status, error.headers)


def _problem(name: str, request: dict[str, Any], where: str) -> str | None:
    unknown = set(request) - FIELDS
    task, title, length = (request.get(field) for field in ("taskType", "title", "outputDimensionality"))
    if unknown:
        return f"Invalid JSON payload received. Unknown name \"{min(unknown)}\" at '{where}': Cannot find field."
    if not all(isinstance(part.get("text"), str) and part["text"] for part in _parts(request)) or not _parts(request):
        return f"* {where}.content contains an empty Part.\n"
    if task is not None and (task not in TASK_TYPES or not name.startswith("gemini-embedding-001")):
        return f"* {where}.task_type: not supported by this model\n"  # own words
    if title is not None and task != "RETRIEVAL_DOCUMENT":
        return f"* {where}.title: only with RETRIEVAL_DOCUMENT\n"  # own words
    if length is not None and (type(length) is not int or not SHORTEST <= length <= LENGTH):
        return f"* {where}.output_dimensionality: must be from {SHORTEST} to {LENGTH}\n"  # own words
    return None


def _resource(request: Request) -> str:
    """Return what follows `models/` in the path. Both API versions are served: the SDK has moved to v1."""
    return re.sub("^/v1(beta)?/models/", "", request.path)


def _requests(request: Request) -> list[dict[str, Any]]:
    """Return the requests of a batch, or the whole body as the only one."""
    body = request.json
    if not request.path.endswith(":batchEmbedContents"):
        return [body] if isinstance(body, dict) else []
    given = body.get("requests") if isinstance(body, dict) else None
    return [item for item in given if isinstance(item, dict)] if isinstance(given, list) else []


def _parts(request: dict[str, Any]) -> list[dict[str, Any]]:
    content = request.get("content")
    parts = content.get("parts") if isinstance(content, dict) else None
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def _text(request: dict[str, Any]) -> str:
    """Return the text of a request: the parts of its content make one vector."""
    return "\n".join(str(part.get("text", "")) for part in _parts(request))
