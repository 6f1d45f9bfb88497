"""Baidu's embedding models, limits and error texts.

Facts: the pages of Embedding-V1 and of the V2 vector API, the model cards (lengths of the bge
and tao vectors), and both tables of error codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BaiduModel:
    """Limits of a model, and the last part of its V1 path."""

    v1_name: str
    dimensions: int
    rows: int
    tokens: int
    characters: int


MODELS: Mapping[str, BaiduModel] = {
    "embedding-v1": BaiduModel("embedding-v1", 384, 16, 384, 1000),
    "bge-large-zh": BaiduModel("bge_large_zh", 1024, 16, 512, 2000),
    "bge-large-en": BaiduModel("bge_large_en", 1024, 16, 512, 2000),
    "tao-8k": BaiduModel("tao_8k", 1024, 1, 8192, 28_000),
}

V1_MESSAGES: Mapping[int, str] = {
    1: "Unknown error",
    2: "Service temporarily unavailable",
    3: "Unsupported openapi method",
    4: "Open api request limit reached",
    6: "No permission to access data",
    13: "Get service token failed",
    14: "IAM Certification failed",
    15: "app not exists or create failed",
    17: "Open api daily request limit reached",
    18: "Open api qps request limit reached",
    19: "Open api total request limit reached",
    100: "Invalid parameter",
    110: "Access token invalid or no longer valid",
    111: "Access token expired",
    336000: "Internal error",
    336001: "Invalid argument",
    336002: "Invalid JSON",
    336003: "message content can not be empty",
    336004: "Permission error",
    336005: "API name does not exist",
    336007: "the max input characters is 20000",
    336100: "try again later",
    336101: "Invalid HTTP method",
    336103: "Prompt tokens too long",
    336200: "internal service error",
    336501: "Rate limit reached for RPM",
    336502: "Rate limit reached for TPM",
}

_INVALID = "invalid_request_error"
_RATE = "rate_limit_exceeded"

# code: (status, type, message)
V2_ERRORS: Mapping[str, tuple[int, str, str]] = {
    "malformed_json": (400, _INVALID, "malformed json"),
    "invalid_model": (400, _INVALID, "The model does not exist or you do not have access to it."),
    "invalid_argument": (400, _INVALID, "invalid argument"),
    "characters_too_long": (400, _INVALID, "the max input characters is 1000"),
    "tokens_too_long": (400, _INVALID, "Prompt tokens too long"),
    "invalid_iam_token": (401, _INVALID, "IAM Certification failed"),
    "invalid_appid": (401, _INVALID, "invalid appid"),
    "no_parameter_permission": (401, "access_denied", "no parameter permission"),
    "account_overdue": (403, "access_denied", "account overdue"),
    "model_offline": (403, "access_denied", "model offline"),
    "method_not_supported": (405, _INVALID, "method not supported"),
    "rpm_rate_limit_exceeded": (429, _RATE, "Rate limit reached for RPM"),
    "tpm_rate_limit_exceeded": (429, _RATE, "Rate limit reached for TPM"),
    "cluster_rate_limit_exceeded": (429, _RATE, "Rate limit reached for cluster"),
    "internal_error": (500, "Internal_error", "Internal error"),
    "dispatch_internal_error": (500, "Internal_error", "Internal error"),
}
