"""The error tree. A class knows its HTTP status, OpenAI `type`, `code`, and what may be done about it.

    GatewayError
    ├── InvalidRequest                400   invalid_value: the caller's input; `param` names the field
    │   ├── InvalidJson               400
    │   ├── ContextLengthExceeded     400   an input longer than the model takes
    │   ├── ExceedsTokensPerMinute    400   more tokens than the upstream's account may use per minute; another may
    │   ├── UnreadableMedia           400   an image or video that could not be fetched or read, even when asked again
    │   ├── UnsupportedDimensions     400
    │   ├── InvalidApiKey             401   the caller's key
    │   ├── ModelNotAllowed           403   the caller's key, for this model
    │   ├── ModelNotFound             404
    │   ├── NotFound                  404   no such route
    │   ├── MethodNotAllowed          405
    │   ├── SlowBody                  408
    │   ├── BodyTooLarge              413
    │   ├── UnsupportedEncoding       415   a compressed body
    │   └── UnsupportedMediaType      415   a web page's body that is not declared as JSON
    ├── RateLimited                   429   a rate limit; passes by itself
    ├── QuotaExhausted                429   a quota; does not pass by itself
    ├── UpstreamError                 502   the upstream failed in a way that may pass
    │   ├── UpstreamAuth              502   it refused our key; never a 401 to the caller
    │   ├── UpstreamUnreachable       502   no connection, or a broken one
    │   ├── UpstreamInvalidResponse   502   its answer is not the vectors requested
    │   │   ├── UpstreamIgnoredDimensions  its vectors have its default length, not the one requested
    │   │   ├── UpstreamWrongCount         more or fewer vectors than inputs: some servers always return one
    │   │   └── UpstreamInvalidVector      one of its vectors is invalid; the others are good
    │   ├── UpstreamMisconfigured     502   it does not know the model or the path we were configured with
    │   └── UpstreamTimeout           504
    └── Overloaded                    503   the gateway has no room
        ├── Shortage                  503   the system gave it too little memory, or no thread
        └── UpstreamUnavailable       503   the upstream has no room, or every deployment is out of the rotation

Adapters raise nothing: `parse_error` returns one of these. Messages reach the caller, so they never contain
a key, a token or a URL: those of upstreams are redacted first (`app.upstreams.redact`).
"""

from __future__ import annotations

from typing import Self


class GatewayError(Exception):
    """Base of every error the gateway answers with. `str(error)` is the message the caller reads."""

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"
    retryable: bool = False
    """Whether the same call, repeated or made elsewhere, may succeed."""
    blames_input: bool = False
    """Whether a single input may be at fault, so that the rest of the batch would succeed without it."""
    stops_batch: bool = False
    """Whether the batch's other calls to the deployment would fail the same way, or wait in vain."""
    needs_operator: bool = False
    """Whether an operator has to act, and is told, because it does not pass by itself."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code  # an instance may be more specific than its class
        self.retry_after = retry_after
        """Seconds after which a retry makes sense, if known."""
        self.model: str | None = None
        """The model requested, if it could be read from a request that was refused for another reason."""
        self.no_client_retry = False
        """Whether the caller should not retry at once either."""
        self.calls = 0
        """Upstream calls that the request took part in."""

    def __str__(self) -> str:
        return self.message

    def without_traceback(self) -> Self:
        """Drops its traceback and context, and returns it. For code that keeps an error it has caught: the traceback
        refers to the frame that keeps the error, and to the frames below, which hold bodies and inputs. They would live
        until the cyclic garbage collector runs, which counts objects and not their bytes."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self

    def at_input(self, index: int) -> GatewayError:
        """A copy of the error that names `input[index]` of the caller's request.

        Callers that share an upstream call share its error; each gets a copy with its own index.
        """
        copy = type(self)(self.message, code=self.code, retry_after=self.retry_after)
        blamed = self.blames_input and isinstance(self, InvalidRequest)
        copy.param = f"input[{index}]" if blamed else self.param
        copy.retryable, copy.no_client_retry = self.retryable, self.no_client_retry
        copy.__cause__ = self
        return copy


class InvalidRequest(GatewayError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"
    blames_input = True


class InvalidJson(InvalidRequest):
    code = "invalid_json"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class ExceedsTokensPerMinute(InvalidRequest):
    pass


class UnreadableMedia(InvalidRequest):
    retryable = True


class UnsupportedDimensions(InvalidRequest):
    code = "unsupported_dimensions"
    blames_input = False
    stops_batch = True


class InvalidApiKey(InvalidRequest):
    status = 401
    code = "invalid_api_key"


class ModelNotAllowed(InvalidRequest):
    status = 403
    code = "model_not_allowed"


class ModelNotFound(InvalidRequest):
    status = 404
    code = "model_not_found"

    @classmethod
    def of(cls, name: str, caveat: str = "") -> Self:
        """The error for a name that is not served, in OpenAI's words."""
        return cls(f"The model '{name[:200]}' does not exist{caveat}", param="model")


class NotFound(InvalidRequest):
    status = 404
    code = "not_found"


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"


class SlowBody(InvalidRequest):
    status = 408
    code = "slow_body"


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "body_too_large"


class UnsupportedEncoding(InvalidRequest):
    status = 415
    code = "unsupported_encoding"


class UnsupportedMediaType(InvalidRequest):
    status = 415
    code = "unsupported_media_type"


class RateLimited(GatewayError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retryable = True
    stops_batch = True


class QuotaExhausted(GatewayError):
    status = 429
    type = "rate_limit_error"
    code = "insufficient_quota"
    stops_batch = True
    needs_operator = True


class UpstreamError(GatewayError):
    status = 502
    type = "upstream_error"
    code = "upstream_error"
    retryable = True


class UpstreamAuth(UpstreamError):
    code = "upstream_auth"
    retryable = False
    stops_batch = True
    needs_operator = True


class UpstreamUnreachable(UpstreamError):
    code = "upstream_unreachable"
    stops_batch = True


class UpstreamInvalidResponse(UpstreamError):
    code = "upstream_invalid_response"
    needs_operator = True


class UpstreamIgnoredDimensions(UpstreamInvalidResponse):
    retryable = False
    stops_batch = True


class UpstreamWrongCount(UpstreamInvalidResponse):
    pass


class UpstreamInvalidVector(UpstreamInvalidResponse):
    blames_input = True


class UpstreamMisconfigured(UpstreamError):
    retryable = False
    stops_batch = True
    needs_operator = True


class UpstreamTimeout(UpstreamError):
    status = 504
    code = "upstream_timeout"
    stops_batch = True


class Overloaded(GatewayError):
    status = 503
    type = "overloaded_error"
    code = "overloaded"
    # The gateway's own, not the upstream's: retrying at once would only add to the overload.
    retryable = False
    stops_batch = True


class Shortage(Overloaded):
    """What the system has too little of: an operator may give it more."""


class UpstreamUnavailable(Overloaded):
    code = "upstream_unavailable"
    retryable = True


def lacks_memory(error: ValueError) -> bool:
    """Whether orjson had no memory, which it reports as invalid JSON."""
    return "Not enough memory" in str(error)


def shortage(fault: Exception) -> Shortage | None:
    """The error if the system had no memory or no thread for a request; None for any other exception."""
    if isinstance(fault, MemoryError):
        return Shortage("the gateway is out of memory", retry_after=1)
    if isinstance(fault, RuntimeError) and "can't start new thread" in str(fault):
        return Shortage("the gateway is out of threads", retry_after=1)
    return None
