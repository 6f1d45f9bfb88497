"""OpenAI's models, limits and error texts.

Facts: the OpenAPI file of openai/openai-openapi for the limits; the texts were collected from
public issues.
"""

from collections.abc import Mapping

OPENAI_MODELS: Mapping[str, int] = {
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
    "text-embedding-ada-002": 1536,
}
SELF_HOSTED_MODELS: Mapping[str, int] = {"BAAI/bge-m3": 1024}

MAX_TOKENS_PER_INPUT = 8192
MAX_TOKENS_PER_REQUEST = 300_000

# name: (status, type, code, message)
ERRORS: Mapping[str, tuple[int, str, str | None, str]] = {
    "invalid_input": (
        400,
        "invalid_request_error",
        None,
        ("'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference."),
    ),
    "invalid_api_key": (
        401,
        "invalid_request_error",
        "invalid_api_key",
        (
            "Incorrect API key provided: sk-wrong. You can find your API key at "
            "https://platform.openai.com/account/api-keys."
        ),
    ),
    "forbidden": (
        403,
        "invalid_request_error",
        "model_not_found",
        "Project `proj_x` does not have access to model `text-embedding-ada-002`",
    ),
    "model_not_found": (
        404,
        "invalid_request_error",
        "model_not_found",
        "The model 'unknown' does not exist",
    ),
    "rate_limit_exceeded": (
        429,
        "requests",
        "rate_limit_exceeded",
        (
            "Rate limit reached for text-embedding-3-small in organization org-x on requests per min "
            "(RPM): Limit 3000, Used 3000, Requested 1. Please try again in 2s."
        ),
    ),
    "insufficient_quota": (
        429,
        "insufficient_quota",
        "insufficient_quota",
        "You exceeded your current quota, please check your plan and billing details.",
    ),
    "server_error": (
        500,
        "server_error",
        None,
        "The server had an error while processing your request.",
    ),
    "server_is_overloaded": (
        503,
        "service_unavailable_error",
        "server_is_overloaded",
        "The server is currently overloaded, please try again later.",
    ),
}
