"""Schemas for `/docs`, as data: the framework neither parses the requests nor builds the responses they describe."""

from __future__ import annotations

from typing import Any

from app.api.schema import CHOICES, MAX_INSTRUCT_CHARACTERS
from app.types import MAX_DIMENSIONS

_TEXT = {"type": "string", "minLength": 1}
_IDS = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": 100_255},
    "description": "cl100k_base token ids",
}

_ADDRESS = {"type": "string", "pattern": "^[hH][tT][tT][pP][sS]?://[!-~]+$"}
_LETTER = "[A-Za-z0-9+/]"
_BASE64 = f"({_LETTER}{{4}})*({_LETTER}{{2}}==|{_LETTER}{{3}}=|{_LETTER}{{4}})"
_IMAGE = {"anyOf": [_ADDRESS, {"type": "string", "pattern": f"^data:image/[a-z0-9.+-]+;base64,{_BASE64}$"}]}


def _object(required: str, **properties: Any) -> dict[str, Any]:
    fields = ["type", required] if "type" in properties else [required]
    return {"type": "object", "required": fields, "properties": properties, "additionalProperties": False}


_CONTENT = [
    _object("text", text=_TEXT),
    _object("image", image=_IMAGE),
    _object("video", video=_ADDRESS),
    _object("text", type={"const": "text"}, text=_TEXT),
    _object("image_url", type={"const": "image_url"}, image_url=_object("url", url=_IMAGE)),
]

REQUEST: dict[str, Any] = {
    "type": "object",
    "required": ["model", "input"],
    "properties": {
        "model": {"type": "string", "minLength": 1, "description": "a model of GET /v1/models"},
        "input": {
            "description": "what to embed: one text, several (up to server.max_inputs), their token ids, or "
            "(multimodal models) content objects",
            "anyOf": [
                _TEXT,
                {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, *_CONTENT]}},
                _IDS,
                {"type": "array", "minItems": 1, "items": _IDS},
            ],
        },
        "encoding_format": {
            "type": ["string", "null"],
            "enum": [*CHOICES["encoding_format"], None],
            "description": "numbers (also when absent), or base64 of little-endian float32",
        },
        "dimensions": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_DIMENSIONS},
        "user": {"type": ["string", "null"]},
        "input_type": {
            "type": ["string", "null"],
            "enum": [*CHOICES["input_type"], None],
            "description": "what the texts are for, if the model distinguishes the two; text_type is a synonym",
        },
        "output_type": {
            "type": ["string", "null"],
            "enum": [*CHOICES["output_type"], None],
            "description": "sparse vectors, from models that give them, stand beside the dense one or alone",
        },
        "instruct": {"type": ["string", "null"], "maxLength": MAX_INSTRUCT_CHARACTERS},
        "on_long_input": {
            "type": ["string", "null"],
            "enum": [*CHOICES["on_long_input"], None],
            "description": "a text longer than the model takes: refuse it, cut it, or take the mean of its pieces",
        },
    },
}

_RESPONSE = {
    "type": "object",
    "required": ["object", "data", "model", "usage"],
    "properties": {
        "object": {"const": "list"},
        "model": {"type": "string", "description": "the name that was asked for"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["object", "index", "embedding"],
                "properties": {
                    "object": {"const": "embedding"},
                    "index": {"type": "integer"},
                    "embedding": {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]},
                    "sparse_embedding": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {
                                "index": {"type": "integer"},
                                "value": {"type": "number"},
                                "token": {"type": "string"},
                            },
                        },
                    },
                },
            },
        },
        "usage": {
            "type": "object",
            "required": ["prompt_tokens", "total_tokens"],
            "properties": {
                "prompt_tokens": {"type": "integer"},
                "total_tokens": {"type": "integer"},
                "prompt_tokens_details": {
                    "type": "object",
                    "properties": {"cached_tokens": {"type": "integer", "description": "the part that cost nothing"}},
                },
            },
        },
    },
}

_NUMBER = {"type": ["integer", "null"]}
_LENGTHS = {"type": ["array", "null"], "items": {"type": "integer"}}
_WORDS = {"type": "array", "items": {"type": "string"}}

MODEL: dict[str, Any] = {
    "type": "object",
    "description": "OpenAI's fields, and what is known of the model; null where nothing is",
    "properties": {
        "id": {"type": "string", "description": "the name to ask for"},
        "object": {"const": "model", "description": "as at OpenAI"},
        "created": {"type": "integer", "description": "when the gateway started"},
        "owned_by": {"type": "string", "description": "its first upstream"},
        "dimensions": {**_NUMBER, "description": "of a vector when the request does not ask for a length"},
        "modalities": {**_WORDS, "description": "what an input may be: text, image, video"},
        "sparse": {"type": "boolean", "description": "whether it gives sparse vectors too"},
        "dimension_choices": {
            **_LENGTHS,
            "description": "lengths the upstream can return: null, only the default one; empty, any that it accepts",
        },
        "shortened_here": {
            **_LENGTHS,
            "description": "lengths to which the gateway shortens vectors: null, it does not",
        },
        "max_input_tokens": {**_NUMBER, "description": "in one input; a longer one is subject to on_long_input"},
        "max_input_characters": {**_NUMBER, "description": "likewise"},
        "max_batch_tokens": {**_NUMBER, "description": "in one upstream call, as max_batch"},
        "max_batch": {"type": "integer", "description": "inputs in one upstream call: requests may have more"},
        "input_types": {**_WORDS, "description": "values of input_type that make a difference"},
        "prefixes": {
            "type": ["object", "null"],
            "additionalProperties": {"type": "string"},
            "description": "what the gateway puts before a text, by input_type",
        },
        "instruct": {"type": "boolean", "description": "whether it takes an instruction"},
        "upstreams": {**_WORDS, "description": "its deployments, as upstream/model"},
        "vector_space": {"type": "string", "description": "models with an equal one give comparable vectors"},
        "source": {"type": ["string", "null"], "description": "where these facts come from"},
    },
}

MODELS: dict[str, Any] = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": MODEL}},
}

ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_ERRORS = {
    400: "the request; `param` names the field",
    401: "the caller's key",
    403: "the caller's key, for this model",
    404: "no such model",
    408: "the body came too slowly",
    413: "the body, or the text that its token ids stand for, is too large",
    415: "the body is compressed, or a web page's and not declared as JSON",
    429: "a rate or quota, with `retry-after` where waiting helps",
    502: "the upstream failed",
    503: "no room here or upstream, with `retry-after`",
    504: "the upstream did not answer in time",
}


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def success(summary: str, schema: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """The response description of a 200."""
    return {200: {"description": summary, "content": _content(schema)}}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Response descriptions of these statuses, and of every other error, in the gateway's one error shape."""
    texts = {status: _ERRORS[status] for status in statuses} | {"default": "any other error"}
    return {status: {"description": summary, "content": _content(ERROR)} for status, summary in texts.items()}


_HEADERS = {
    "x-request-id": "the caller's own if it sent one, else the gateway's; also in the log",
    "x-embedding-cache": "hit, partial or miss",
    "x-embedding-cached-inputs": "inputs found in the cache",
    "x-embedding-upstream-calls": "upstream calls that the request took part in",
    "x-embedding-upstream": "the deployments that served it, as upstream/model",
    "x-embedding-space": "vectors of two responses are comparable if it is equal",
    "x-embedding-truncated-inputs": "how many inputs were truncated; absent if none",
    "x-embedding-split-inputs": "how many inputs were embedded in pieces; absent if none",
    "openai-processing-ms": "milliseconds",
}
_EMBEDDED = {
    "description": "The embeddings, in input order.",
    "content": _content(_RESPONSE),
    "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()},
}

EMBEDDINGS: dict[str, Any] = {
    "requestBody": {"required": True, "content": _content(REQUEST)},
    "responses": {
        "200": _EMBEDDED,
        **{str(status): response for status, response in error_responses(*_ERRORS).items()},
    },
}
