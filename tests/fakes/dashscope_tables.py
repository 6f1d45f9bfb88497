"""DashScope's models, limits and error texts.

Facts: the Beijing table of `text-embedding-synchronous-api` and the page `error-code` at
help.aliyun.com; where sources differ, the newest counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TextModel:
    """Limits of a model; the first of `dimensions` is the default."""

    dimensions: tuple[int, ...]
    rows: int
    tokens: int
    sparse: bool = False
    images: int = 0
    """Maximum images per request, and as many videos."""
    fuses: bool = False
    """All contents of a request become one vector."""

    @property
    def fixed(self) -> bool:
        """Whether the model gives one length only."""
        return len(self.dimensions) == 1


MODELS: Mapping[str, TextModel] = {
    "text-embedding-v1": TextModel((1536,), 25, 2048),
    "text-embedding-v2": TextModel((1536,), 25, 2048),
    "text-embedding-v3": TextModel((1024, 768, 512, 256, 128, 64), 10, 8192, sparse=True),
    "text-embedding-v4": TextModel((1024, 2048, 1536, 768, 512, 256, 128, 64), 10, 8192, sparse=True),
    "qwen3.7-text-embedding": TextModel((1024, 2560, 2048, 1536, 768, 512, 256), 20, 128_000),
}
MULTIMODAL_MODELS: Mapping[str, TextModel] = {
    "multimodal-embedding-v1": TextModel((1024,), 20, 512, images=1),
    "qwen3-vl-embedding": TextModel((2560, 2048, 1536, 1024, 768, 512, 256), 20, 32_000, images=5),
    "qwen2.5-vl-embedding": TextModel((1024, 2048, 768, 512), 20, 32_000, images=1, fuses=True),
}

# name: (status, compatible code, native message, compatible message)
ERRORS: Mapping[str, tuple[int, str, str, str | None]] = {
    "InvalidParameter": (400, "InvalidParameter", "Required parameter missing or invalid.", None),
    "BadRequest.EmptyInput": (400, "invalid_request_error", "Required input is missing.", None),
    "BadRequest.EmptyModel": (
        400,
        "invalid_request_error",
        "Required model is missing.",
        "you must provide a model parameter.",
    ),
    "DataInspectionFailed": (
        400,
        "data_inspection_failed",
        "Input data may contain inappropriate content.",
        None,
    ),
    "Arrearage": (
        400,
        "Arrearage",
        "Access denied, please make sure your account is in good standing.",
        None,
    ),
    "InvalidApiKey": (
        401,
        "invalid_api_key",
        "Invalid API-key provided.",
        (
            "Incorrect API key provided. For details, see: "
            "https://help.aliyun.com/zh/model-studio/error-code#apikey-error"
        ),
    ),
    "AccessDenied": (403, "access_denied", "Access denied.", None),
    "AccessDenied.Unpurchased": (403, "AccessDenied.Unpurchased", "Access denied.", None),
    "AllocationQuota.FreeTierOnly": (
        403,
        "AllocationQuota.FreeTierOnly",
        "The free quota has been exhausted.",
        None,
    ),
    "ModelNotFound": (404, "model_not_found", "Model can not be found.", None),
    "NotFound": (404, "NotFound", "Not found.", None),
    "RequestTimeOut": (500, "RequestTimeOut", "Request timed out.", None),
    "Throttling": (429, "Throttling", "Requests throttling triggered.", None),
    "Throttling.RateQuota": (
        429,
        "limit_requests",
        "Requests rate limit exceeded, please try again later.",
        (
            "You have exceeded your current request limit. For details, see: "
            "https://help.aliyun.com/zh/model-studio/error-code#rate-limit"
        ),
    ),
    "Throttling.BurstRate": (
        429,
        "limit_burst_rate",
        "Request rate increased too quickly.",
        None,
    ),
    "Throttling.AllocationQuota": (
        429,
        "insufficient_quota",
        "Allocated quota exceeded, please increase your quota limit.",
        "You exceeded your current quota, please check your plan and billing details.",
    ),
    "InternalError": (500, "internal_error", "An internal error has occured.", None),
    "InternalError.Algo": (500, "internal_error", "Inference internal error.", None),
    "ModelServingError": (
        503,
        "ModelServingError",
        "Too many requests. Your requests are being throttled due to system capacity limits.",
        None,
    ),
    "ModelUnavailable": (503, "ModelUnavailable", "Model is unavailable.", None),
    "GatewayTimeout": (504, "GatewayTimeout", "Gateway timeout.", None),
}
