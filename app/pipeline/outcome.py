"""A request's result, or its one error, from the outcomes of its inputs. Decides no retry."""

from __future__ import annotations

from collections.abc import Sequence

from app.errors import ContextLengthExceeded, GatewayError, InvalidRequest, Overloaded, UpstreamTimeout
from app.pipeline.queue import CallRecord, Job, Waiter
from app.types import NO_EMBEDDING, Embedding, EmbedRequest, EmbedResult, Source

MAX_NAMED = 20
"""Refused inputs that an error names. A request with more fails at once: waiting for the others would tell the caller
nothing more, and each that is refused as well may cost several calls to isolate."""


def is_fatal(outcome: Embedding | GatewayError) -> bool:
    """Whether the request need not wait for its other inputs, because they would be refused alike.

    Otherwise it waits: what is embedded meanwhile is cached, so a retry costs only the rest.
    """
    return not isinstance(outcome, Embedding) and not outcome.retryable and not outcome.blames_input


def refuses_too_many(waiter: Waiter, outcome: Embedding | GatewayError) -> bool:
    """Counts the outcome if it refuses an input. Returns whether that is one more than the request's error names."""
    collected = waiter.collect_too_long and isinstance(outcome, ContextLengthExceeded)
    if collected or not isinstance(outcome, InvalidRequest):
        return False
    waiter.refused += 1
    return waiter.refused > MAX_NAMED


def collect(jobs: list[Job], sources: list[Source], request: EmbedRequest) -> EmbedResult:
    """The request's embeddings, in the order of its `jobs`; `sources` says where each came from.

    Raises `GatewayError` if an input has none, unless it is too long and the request collects such inputs. All jobs are
    done, unless their errors end the request sooner.
    """
    outcomes = [job.outcome for job in jobs]
    call_records = _call_records(jobs)
    too_long: dict[int, GatewayError] = {}
    if set(map(type, outcomes)) <= {Embedding}:  # nearly always
        embeddings: list[Embedding] = outcomes  # type: ignore[assignment]
        if len(call_records) == 1:
            return EmbedResult(embeddings, sources, call_records[0].calls, call_records[0].deployments)
    else:
        if error := _error(jobs, request):
            error.calls = sum([call_record.calls for call_record in call_records])
            raise error
        for i, (position, job) in enumerate(zip(_positions(request), jobs, strict=True)):
            if isinstance(job.outcome, ContextLengthExceeded):
                too_long[i] = job.outcome.at_input(position)
        embeddings = [outcome if isinstance(outcome, Embedding) else NO_EMBEDDING for outcome in outcomes]
    return EmbedResult(
        embeddings=embeddings,
        sources=sources,
        calls=sum([call_record.calls for call_record in call_records]),
        deployments=tuple(dict.fromkeys([name for call_record in call_records for name in call_record.deployments])),
        too_long=too_long,
    )


def deadline_error(jobs: Sequence[Job], request: EmbedRequest) -> GatewayError:
    """The error of a request whose deadline has passed before its jobs were done."""
    calls = sum([record.calls for record in _call_records(jobs)])
    error = _error(jobs, request, ignored=(UpstreamTimeout,))  # any other says more than that time is up
    if error is None and not calls:  # no upstream was slow: too much was ahead of it in the queue
        error = Overloaded("no upstream call was free before the request's deadline", retry_after=1)
    elif error is None:
        # By the caller's own index: an input may be embedded in pieces.
        outcomes = zip(_positions(request), [job.outcome for job in jobs], strict=True)
        missing = {position for position, outcome in outcomes if isinstance(outcome, UpstreamTimeout | None)}
        # None is missing if all came just before the deadline, and others were answered first.
        what = f"{len(missing)} of the inputs had no answer" if missing else "no answer could be sent"
        error = UpstreamTimeout(f"{what} before the request's deadline")
    error.calls = calls
    return error


def _call_records(jobs: Sequence[Job]) -> list[CallRecord]:
    return [record for record in dict.fromkeys([job.call_record for job in jobs]) if record]


def _positions(request: EmbedRequest) -> Sequence[int]:
    """Each input's index in the caller's request."""
    return range(len(request.inputs)) if request.positions is None else request.positions


def _error(
    jobs: Sequence[Job], request: EmbedRequest, *, ignored: tuple[type[GatewayError], ...] = ()
) -> GatewayError | None:
    """The request's one error: a refusal of its inputs, naming each by the caller's own index, or else the first error
    in input order. A refusal tells the caller more than trouble that may pass. None if there is none, apart from those
    `ignored` and, if the request collects them, those of inputs that are too long."""
    if request.collect_too_long:
        ignored += (ContextLengthExceeded,)
    errors = [
        (position, job.outcome)
        for position, job in zip(_positions(request), jobs, strict=True)
        if isinstance(job.outcome, GatewayError) and not isinstance(job.outcome, ignored)
    ]
    if not errors:
        return None
    refused = [(position, error) for position, error in errors if isinstance(error, InvalidRequest)]
    position, error = (refused or errors)[0]
    reported = error.at_input(position)
    indexes = list(dict.fromkeys(position for position, _ in refused))
    if error.blames_input and len(indexes) > 1:
        names = ", ".join(map(str, indexes[:MAX_NAMED]))
        reported.message += f" (inputs {names}{' …' if len(indexes) > MAX_NAMED else ''})"
    return reported
