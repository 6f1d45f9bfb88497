"""What a call's outcomes say: of the deployment, and of asking again. Decides nothing: `app.pipeline.route` does."""

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
    UpstreamError,
    UpstreamIgnoredDimensions,
    UpstreamInvalidVector,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from app.types import BatchResult, Embedding

_ONES_OWN = (UpstreamError, QuotaExhausted, ExceedsTokensPerMinute)
"""What another deployment may not share: it has a key, quotas, names and lengths of vectors of its own."""


def whole(result: BatchResult) -> bool:
    """Whether all of it is embedded, as nearly always."""
    return set(map(type, result.outcomes)) == {Embedding}


def has_what_was_none(result: BatchResult, pending: Sequence[int], retried: BatchResult) -> bool:
    """Whether another deployment has vectors of inputs for which the first had none, while it had some for others:
    where it had not a single one, that has counted as its failure already."""
    if len(pending) == len(result.outcomes):
        return False
    pairs = zip((result.outcomes[i] for i in pending), retried.outcomes, strict=True)
    return any(isinstance(one, UpstreamInvalidVector) and isinstance(other, Embedding) for one, other in pairs)


def worth_asking_again(outcome: Embedding | GatewayError, elsewhere: bool) -> bool:
    """`elsewhere`: another deployment can be asked. It may also have a connection already where there is no room for a
    new one."""
    if isinstance(outcome, Embedding):
        return False
    return outcome.retryable or (elsewhere and (isinstance(outcome, _ONES_OWN) or is_ours(outcome)))


def is_its_own(outcome: Embedding | GatewayError, first: Embedding | GatewayError) -> bool:
    """Whether the second deployment's error is its own trouble (it lasts, or is a length of vectors that only it
    gives), so that the caller is better told the first one's error, which may pass."""
    if isinstance(outcome, UpstreamIgnoredDimensions):
        return True
    lasts = isinstance(outcome, _ONES_OWN) and not outcome.retryable
    return lasts and isinstance(first, GatewayError) and (first.retryable or is_ours(first))


def is_outage(outcome: Embedding | GatewayError) -> TypeGuard[UpstreamError]:
    """Whether the error says no more than that the upstream failed, could not be reached or did not answer, and may
    pass by itself."""
    if not isinstance(outcome, UpstreamUnreachable | UpstreamTimeout) and type(outcome) is not UpstreamError:
        return False
    return outcome.retryable


def is_ours(error: Embedding | GatewayError | None) -> bool:
    """Whether no upstream has part in it: there was no room here to ask one."""
    return type(error) is Overloaded


def of(result: BatchResult) -> GatewayError | None:
    """What a batch says of its deployment: the error of a limit that any part of it reached, or the first error where
    all of it failed. Refused inputs are not held against it, nor that it gives its own length whatever is asked for: it
    serves callers that ask for none. That all vectors are none is, for it is no single input's doing."""
    if whole(result):
        return None
    spared = Embedding | InvalidRequest | UpstreamIgnoredDimensions
    errors = [each for each in result.outcomes if not isinstance(each, spared)]
    limited = next((error for error in errors if isinstance(error, RateLimited | QuotaExhausted)), None)
    return limited or (errors[0] if len(errors) == len(result.outcomes) else None)
