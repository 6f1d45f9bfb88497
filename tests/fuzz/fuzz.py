"""The fuzzer: requests that Schemathesis makes from our OpenAPI description, and raw HTTP that Hypothesis makes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.fuzz.cases import KEY, MODEL, Parts, parts, variants
from tests.fuzz.face import Face, Served, check_error

NEAR = 40
"""Cases made of each Hypothesis example."""
ROUND = 250
"""Examples per Hypothesis run, to bound its memory: it remembers all it has tried."""


@dataclass
class Report:
    """How much was tried, and what went wrong."""

    described: int = 0
    """Requests made from our OpenAPI description."""
    raw: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return self.described + self.raw

    def summary(self) -> str:
        shown = ", ".join(f"{status} {count}" for status, count in sorted(self.statuses.items()))
        return (
            f"fuzz {self.seconds:.0f} s: {self.cases} cases "
            f"({self.described} of the OpenAPI description, {self.raw} raw), {len(self.problems)} problems; {shown}"
        )


def _settings(examples: int) -> settings:
    """No shrinking: a failure is shown as it is, and the time stays bounded."""
    return settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def fuzz(served: Served, report: Report, *, described: int, raw: int, seed: int, until: float = float("inf")) -> None:
    """Sends about `described` and `raw` cases, fewer if `until` (monotonic) comes first; adds problems to `report`."""
    began = time.monotonic()
    if described:
        _fuzz_description(served.url, report, described, seed)
    _fuzz_raw(served.url, report, raw, seed, until)
    report.problems += served.troubles()
    report.seconds += time.monotonic() - began


def _run(report: Report, test: Callable[[], None]) -> None:
    """Runs a Hypothesis test; if it fails, the error and its notes are added to the problems."""
    try:
        test()
    except (Exception, BaseExceptionGroup) as error:
        notes = "\n".join(getattr(error, "__notes__", ()))
        report.problems.append(f"{type(error).__name__}: {error}\n{notes}"[:4000])


# --- raw ----------------------------------------------------------------------------------------------------


def _fuzz_raw(url: str, report: Report, cases: int, seed: int, until: float) -> None:
    face = Face(url, report.statuses)
    done = 0
    failed = len(report.problems)
    while done < cases and time.monotonic() < until and len(report.problems) == failed:
        examples = min(ROUND, -(-(cases - done) // NEAR))

        @seeded(seed + done)
        @_settings(examples)
        @given(parts, st.integers(0, 2**32))
        def throw(given_parts: Parts, dice: int) -> None:
            nonlocal done
            for case in variants(given_parts, dice, NEAR):
                done += 1
                face.throw(case)

        _run(report, throw)
    face.close()
    report.raw += done


# --- the description ----------------------------------------------------------------------------------------


def _fuzz_description(url: str, report: Report, cases: int, seed: int) -> None:
    """Nine in ten go to the embeddings route: half of them valid by the description, half not."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {KEY}"
        for result in schema.get_all_operations():
            operation: Any = result.ok()  # type: ignore[union-attr]  # a description that cannot be read raises
            main = operation.path == "/v1/embeddings"
            modes = list(GenerationMode) if main else [GenerationMode.POSITIVE]
            for mode in modes:
                examples = max(1, int(cases * (0.45 if main else 0.02)))
                _run(report, _described(operation, mode, session, report, examples, seed))


def _described(
    operation: Any, mode: GenerationMode, session: requests.Session, report: Report, examples: int, seed: int
) -> Callable[[], None]:
    strategy: st.SearchStrategy[Any] = operation.as_strategy(generation_mode=mode)

    @seeded(seed)
    @_settings(examples)
    @given(strategy)
    def call(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = MODEL
        response = case.call(session=session)
        report.described += 1
        report.statuses[str(response.status_code)] += 1
        # A schema cannot say what a model takes (token ids, lengths): a valid body may still be refused.
        excluded = [positive_data_acceptance]
        if response.status_code == 413:  # a refusal that Schemathesis does not expect
            excluded.append(negative_data_rejection)
        case.validate_response(response, excluded_checks=excluded)
        if response.status_code >= 400:
            check_error(response.content, {name: values[0] for name, values in response.headers.items()})

    return call
