"""What a call's outcomes say about the deployment, and about a retry. Decides nothing: `app.pipeline.route` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from app.errors import (
    ExceedsTokensPerMinute,
    GatewayError,
    InvalidRequest,
    Overloaded,
    QuotaExhausted,
    RateLimited,
    Shortage,
    UpstreamError,
    UpstreamIgnoredDimensions,
    UpstreamInvalidVector,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from app.types import BatchResult, Embedding

_OWN_ERRORS = (UpstreamError, QuotaExhausted, ExceedsTokensPerMinute)
"""Errors that another deployment may not share: it has its own key, quotas, names and lengths of vectors."""


def fully_embedded(result: BatchResult) -> bool:
    """Whether every input has an embedding, as nearly always."""
    return set(map(type, result.outcomes)) == {Embedding}


def found_missing_vectors(result: BatchResult, pending: Sequence[int], retried: BatchResult) -> bool:
    """Whether another deployment returned vectors of inputs for which the first had none, though it had some for
    others: without a single one, the call has already counted as its failure."""
    if len(pending) == len(result.outcomes):
        return False
    pairs = zip((result.outcomes[i] for i in pending), retried.outcomes, strict=True)
    return any(isinstance(first, UpstreamInvalidVector) and isinstance(second, Embedding) for first, second in pairs)


def worth_retrying(outcome: Embedding | GatewayError, elsewhere: bool) -> bool:
    """`elsewhere`: another deployment can be asked. It may have an open connection even if there is no room for a new
    one. A reply that there was no memory to read has been paid for."""
    if isinstance(outcome, Embedding | Shortage):
        return False
    return outcome.retryable or (elsewhere and (isinstance(outcome, _OWN_ERRORS) or is_local(outcome)))


def is_own_error(outcome: Embedding | GatewayError, first: Embedding | GatewayError) -> bool:
    """Whether the second deployment's error is its own trouble (it lasts, or is a vector length that only it returns),
    so that the first one's error, which may pass, tells the caller more."""
    if isinstance(outcome, UpstreamIgnoredDimensions):
        return True
    persistent = isinstance(outcome, _OWN_ERRORS) and not outcome.retryable
    return persistent and isinstance(first, GatewayError) and (first.retryable or is_local(first))


def is_outage(outcome: Embedding | GatewayError) -> TypeGuard[UpstreamError]:
    """Whether the error says only that the upstream failed, could not be reached or did not answer, and may pass by
    itself."""
    if not isinstance(outcome, UpstreamUnreachable | UpstreamTimeout) and type(outcome) is not UpstreamError:
        return False
    return outcome.retryable


def is_local(error: Embedding | GatewayError | None) -> bool:
    """Whether no upstream had a part in it: there was no room here to ask one."""
    return type(error) in (Overloaded, Shortage)


def deployment_error(result: BatchResult) -> GatewayError | None:
    """What a batch says against its deployment: the error of a limit that any part of it reached, or the first error if
    all of it failed. Refused inputs do not count, nor does a deployment that returns its own vector length whatever is
    requested: it serves callers that request none. A batch without a single valid vector does count, for that is no
    single input's doing."""
    if fully_embedded(result):
        return None
    ignored = Embedding | InvalidRequest | UpstreamIgnoredDimensions
    errors = [outcome for outcome in result.outcomes if not isinstance(outcome, ignored)]
    limited = next((error for error in errors if isinstance(error, RateLimited | QuotaExhausted)), None)
    return limited or (errors[0] if len(errors) == len(result.outcomes) else None)
