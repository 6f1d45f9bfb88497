"""What a request's inputs came to, wherever each was embedded: its result, or its one error. Decides no retry."""

from __future__ import annotations

from collections.abc import Sequence

from app.errors import ContextLengthExceeded, GatewayError, InvalidRequest
from app.pipeline.queue import Job
from app.types import NO_EMBEDDING, Embedding, EmbedRequest, EmbedResult, Source


def is_fatal(outcome: Embedding | GatewayError) -> bool:
    """Whether the request need not wait for its other inputs: they would meet the same refusal.

    Otherwise it waits, for what is embedded meanwhile is cached, and asking again then costs only the rest.
    """
    return not isinstance(outcome, Embedding) and not outcome.retryable and not outcome.blames_input


def collect(jobs: list[Job], sources: list[Source], request: EmbedRequest) -> EmbedResult:
    """The request's embeddings, in the order of its inputs' `jobs`, which are done; `sources` are where it found them.

    Raises `GatewayError` where an input has none, unless it is too long and the request spares that.
    """
    outcomes = [job.outcome for job in jobs]
    flights = [call_record for call_record in dict.fromkeys([job.call_record for job in jobs]) if call_record]
    too_long: dict[int, GatewayError] = {}
    if set(map(type, outcomes)) <= {Embedding}:  # nearly always
        embeddings: list[Embedding] = outcomes  # type: ignore[assignment]
        if len(flights) == 1:
            return EmbedResult(embeddings, sources, flights[0].calls, flights[0].deployments)
    else:
        positions = request.positions or range(len(jobs))
        others = [job.outcome for job in jobs if not isinstance(job.outcome, Embedding | ContextLengthExceeded)]
        if others or not request.collect_too_long:
            error = _error(jobs, positions)
            error.calls = sum([call_record.calls for call_record in flights])
            raise error
        for i, job in enumerate(jobs):
            if isinstance(job.outcome, ContextLengthExceeded):
                too_long[i] = job.outcome.at_input(positions[i])
        embeddings = [outcome if isinstance(outcome, Embedding) else NO_EMBEDDING for outcome in outcomes]
    return EmbedResult(
        embeddings=embeddings,
        sources=sources,
        calls=sum([call_record.calls for call_record in flights]),
        deployments=tuple(dict.fromkeys([name for call_record in flights for name in call_record.deployments])),
        too_long=too_long,
    )


def _error(jobs: list[Job], positions: Sequence[int]) -> GatewayError:
    """The request's one error: a refusal of its inputs, naming each by the caller's own index, or else
    the first trouble in input order. A refusal tells the caller more than trouble that may pass."""
    errors = [
        (position, job.outcome)
        for position, job in zip(positions, jobs, strict=True)
        if isinstance(job.outcome, GatewayError)
    ]
    refused = [(position, error) for position, error in errors if isinstance(error, InvalidRequest)]
    position, error = (refused or errors)[0]
    told = error.at_input(position)
    places = list(dict.fromkeys(position for position, _ in refused))
    if error.blames_input and len(places) > 1:
        names = ", ".join(map(str, places[:20]))
        told.message += f" (inputs {names}{' …' if len(places) > 20 else ''})"
    return told
