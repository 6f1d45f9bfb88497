"""What a call's outcomes say: of the deployment, and of asking again. Decides nothing: `app.pipeline.route` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from app.errors import (
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


def whole(result: BatchResult) -> bool:
    """Whether all of it is embedded, as nearly always."""
    return set(map(type, result.outcomes)) == {Embedding}


def has_what_was_none(result: BatchResult, pending: Sequence[int], retried: BatchResult) -> bool:
    """Whether there is a vector after all of inputs of which a deployment's were none, while of others it had some.
    Where it had not one, that was its failure already."""
    if len(pending) == len(result.outcomes):
        return False
    pairs = zip((result.outcomes[i] for i in pending), retried.outcomes, strict=True)
    return any(isinstance(one, UpstreamInvalidVector) and isinstance(other, Embedding) for one, other in pairs)


def worth_asking_again(outcome: Embedding | GatewayError, elsewhere: bool) -> bool:
    """`elsewhere`: another deployment can be asked, for which trouble with this one's key, quota, names or lengths of
    vectors is none."""
    if isinstance(outcome, Embedding):
        return False
    return outcome.retryable or (elsewhere and isinstance(outcome, UpstreamError | QuotaExhausted))


def is_its_own(outcome: Embedding | GatewayError, first: Embedding | GatewayError) -> bool:
    """Whether a deployment's trouble says nothing of the first one, which may do better when it is asked again: it has
    a lasting one of its own where the first one's may pass, or gives lengths of its own."""
    if isinstance(outcome, UpstreamIgnoredDimensions):
        return True
    lasts = isinstance(outcome, UpstreamError | QuotaExhausted) and not outcome.retryable
    return lasts and isinstance(first, GatewayError) and first.retryable


def is_outage(outcome: Embedding | GatewayError) -> TypeGuard[UpstreamError]:
    """Whether it is trouble that may pass by itself, and says nothing more special than that."""
    if not isinstance(outcome, UpstreamUnreachable | UpstreamTimeout) and type(outcome) is not UpstreamError:
        return False
    return outcome.retryable


def is_ours(error: GatewayError | None) -> bool:
    """Whether no upstream has part in it: there was no room here to ask one."""
    return type(error) is Overloaded


def of(result: BatchResult) -> GatewayError | None:
    """What a batch tells of its deployment: a limit reached in any part of it, or that all of it failed and was not
    refused. Where every vector is none, that is no input's doing; where it gives its own length whatever is asked for,
    it serves those who ask for none."""
    if whole(result):
        return None
    spared = Embedding | InvalidRequest | UpstreamIgnoredDimensions
    errors = [each for each in result.outcomes if not isinstance(each, spared)]
    limited = next((error for error in errors if isinstance(error, RateLimited | QuotaExhausted)), None)
    return limited or (errors[0] if len(errors) == len(result.outcomes) else None)
