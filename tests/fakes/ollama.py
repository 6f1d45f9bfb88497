"""A fake of an Ollama server: embedding, discovery, and their errors.

Facts: ollama/ollama v0.33.0-rc2, server/routes.go, api/types.go and docs/. Vectors have no
index, so they are always in order, and numbers are printed as Go prints a float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .faults import VendorError
from .upstream import Call, Embedded, FakeUpstream
from .vectors import Row, Text, Vector, count_tokens, cut, numbers, vector
from .wire import Reply, Request, json_reply


@dataclass(frozen=True)
class OllamaModel:
    """A pulled model, as /api/show describes it."""

    dimensions: int
    context: int
    family: str
    capabilities: tuple[str, ...] = ("embedding",)
    parameters: str = "137M"


MODELS: Mapping[str, OllamaModel] = {
    "nomic-embed-text:latest": OllamaModel(768, 2048, "nomic-bert"),
    "bge-m3:latest": OllamaModel(1024, 8192, "bert", parameters="566.70M"),
    "llama3:latest": OllamaModel(4096, 8192, "llama", ("completion",), "8.0B"),
}

# name: (status, text)
ERRORS: Mapping[str, tuple[int, str]] = {
    "bad_input": (400, "invalid input type"),
    "context_length": (400, "the input length exceeds the context length"),
    "still_too_long": (400, "input after truncation exceeds maximum context length"),
    "nan": (400, "embedding contains NaN or Inf values"),
    "nan_old": (500, "failed to encode response: json: unsupported value: NaN"),
    "runner_crash": (400, 'do embedding request: Post "http://127.0.0.1:40001/embedding": EOF'),
    "rate_limit": (503, "server busy, please try again.  maximum pending requests exceeded"),
    "unavailable": (503, "server busy, please try again.  maximum pending requests exceeded"),
    "internal": (500, "model requires more system memory (5.6 GiB) than is available (3.1 GiB)"),
    "not_found": (404, "model 'unknown' not found"),
    "try_pulling": (404, 'model "unknown" not found, try pulling it first'),
    "canceled": (499, "request canceled"),
    "auth": (401, "unauthorized"),  # only ollama.com and proxies in front of a server
    "quota": (429, "you have reached your hourly usage limit"),  # cloud models; own words
}


class FakeOllama(FakeUpstream):
    """A local server with `models` pulled.

    `old`: /api/tags has neither capabilities nor lengths, so clients ask /api/show.
    `show_capabilities`: False for an even older server, whose /api/show has no capabilities either.
    `max_batch` has no effect: Ollama has no limit.
    """

    def __init__(
        self,
        models: Mapping[str, OllamaModel] = MODELS,
        *,
        old: bool = False,
        show_capabilities: bool = True,
        version: str = "0.33.0",
        delay: float = 0.0,
        max_batch: int | None = None,
        concurrency_limit: int | None = None,
    ) -> None:
        super().__init__(delay=delay, shuffle=False, max_batch=max_batch, concurrency_limit=concurrency_limit)
        self.models = models
        self.old = old
        self.show_capabilities = show_capabilities
        self.version = version

    def expected(self, model: str, text: str, dimensions: int | None = None) -> Vector:
        """Return the vector this server answers with; a long text is truncated first."""
        name = _full_name(model)
        known = self.models[name]
        native = vector(name, _truncate(text, known.context), known.dimensions)
        shorter = dimensions is not None and 0 < dimensions < known.dimensions
        return cut(native, dimensions) if dimensions is not None and shorter else native

    # --- requests -------------------------------------------------------------------------

    def is_embedding(self, request: Request) -> bool:
        return request.method == "POST" and request.path == "/api/embed"

    def texts_of(self, request: Request) -> list[Text]:
        given = request.json.get("input") if isinstance(request.json, dict) else None
        if isinstance(given, str):
            return [given] if given else []
        texts = given if isinstance(given, list) else []
        return [text for text in texts if isinstance(text, str)]

    def other(self, request: Request) -> Reply:
        match request.method, request.path:
            case "GET" | "HEAD", "/":
                plain = {"Content-Type": "text/plain; charset=utf-8"}
                return Reply(200, b"Ollama is running", plain)
            case "GET" | "HEAD", "/api/version":
                return json_reply({"version": self.version})
            case "GET" | "HEAD", "/api/tags":
                return json_reply({"models": [self._tag(name) for name in self.models]})
            case "POST", "/api/show":
                return self._show(request)
            case _:
                return Reply(404, b"404 page not found", {"Content-Type": "text/plain"})

    def embed(self, call: Call) -> Embedded | Reply:
        if not call.body:
            return _error(400, "missing request body")
        body = call.json
        if not isinstance(body, dict):
            return _error(400, "invalid character looking for beginning of value")
        problem = self._problem(body)
        if problem is not None:
            return problem
        name = str(body["model"])
        known = self.models[_full_name(name)]
        texts = [str(text) for text in call.texts]
        too_long = any(count_tokens(text) > known.context for text in texts)
        if too_long and body.get("truncate") is False:
            return self.refuse(call, "context_length")
        dimensions = body.get("dimensions")
        rows = [Row(i, text, self.expected(name, text, dimensions)) for i, text in enumerate(texts)]
        tokens = sum(count_tokens(_truncate(text, known.context)) for text in texts)
        return _answer(name, rows, tokens)

    def _problem(self, body: dict[str, Any]) -> Reply | None:
        given, name = body.get("input"), body.get("model")
        texts = [given] if isinstance(given, str) else given or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return _error(400, "invalid input type")
        dimensions = body.get("dimensions")
        if dimensions is not None and type(dimensions) is not int:
            kind = "string" if isinstance(dimensions, str) else "number"
            field = "Go struct field EmbedRequest.dimensions of type int"
            return _error(400, f"json: cannot unmarshal {kind} into {field}")
        if not name:
            return _error(400, "model is required")
        if _full_name(str(name)) not in self.models:
            return _error(404, f"model '{name}' not found")
        return None

    # --- discovery ------------------------------------------------------------------------

    def _tag(self, name: str) -> dict[str, Any]:
        known = self.models[name]
        details = self._details(known)
        tag: dict[str, Any] = {"name": name, "model": name, "details": details}
        tag["modified_at"] = "2026-08-21T10:00:00.000000000Z"
        tag["size"] = known.dimensions * 1_000_000
        tag["digest"] = f"{known.dimensions:x}".ljust(64, "0")  # clients read only its beginning
        if not self.old:
            details["context_length"] = known.context
            details["embedding_length"] = known.dimensions
            tag["capabilities"] = list(known.capabilities)
        return tag

    def _show(self, request: Request) -> Reply:
        body = request.json if isinstance(request.json, dict) else {}
        name = body.get("model") or body.get("name")
        if not name:
            return _error(400, "model is required")
        if _full_name(str(name)) not in self.models:
            return _error(404, f"model '{name}' not found")
        known = self.models[_full_name(str(name))]
        shown: dict[str, Any] = {
            "modelfile": "",
            "parameters": "",
            "template": "{{ .Prompt }}",
            "details": self._details(known),
            "model_info": {
                "general.architecture": known.family,
                f"{known.family}.context_length": known.context,
                f"{known.family}.embedding_length": known.dimensions,
            },
            "modified_at": "2026-08-21T10:00:00.000000000Z",
        }
        if self.show_capabilities:
            shown["capabilities"] = list(known.capabilities)
        return json_reply(shown)

    def _details(self, known: OllamaModel) -> dict[str, Any]:
        return {
            "parent_model": "",
            "format": "gguf",
            "family": known.family,
            "families": [known.family],
            "parameter_size": known.parameters,
            "quantization_level": "F16",
        }

    def error_reply(self, request: Request, error: VendorError) -> Reply:
        status, text = ERRORS.get(error.name, (500, error.name))
        return json_reply({"error": error.message or text}, error.status or status, error.headers)


def _answer(name: str, rows: list[Row], tokens: int) -> Embedded:
    def render(shown: list[Row]) -> Reply:
        answer: dict[str, Any] = {
            "model": name,
            "embeddings": [numbers(row, np.float32) for row in shown],
            "total_duration": 14_143_917,
            "load_duration": 1_019_500,
        }
        if tokens:
            answer["prompt_eval_count"] = tokens  # omitempty
        return json_reply(answer, headers={"Content-Type": "application/json; charset=utf-8"})

    return Embedded(rows, tokens, render)


def _full_name(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


def _truncate(text: str, tokens: int) -> str:
    """Cut to this many tokens, as `count_tokens` counts them, never inside a character."""
    return text.encode()[: 4 * tokens].decode(errors="ignore")


def _error(status: int, text: str) -> Reply:
    return json_reply({"error": text}, status)
