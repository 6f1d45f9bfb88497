"""Every upstream through the whole program: real sockets on both sides, every vector compared."""

from __future__ import annotations

import numpy as np
import pytest

from tests.end_to_end.cases import CASES, gateway_for, mixed_texts, vectors_of


@pytest.mark.parametrize("name", CASES)
def test_2048_inputs_of_mixed_length_come_back_in_order_each_vector_the_right_one(name: str) -> None:
    case = CASES[name]()
    count = 300 if case.rows == 1 else 2048
    texts = mixed_texts(count, case.longest)
    with gateway_for(case) as gateway:
        response = gateway.post({"model": case.model, "input": texts})
        assert response.status_code == 200, response.text
        answer = response.json()
        for text, vector in zip(texts, vectors_of(answer), strict=True):
            assert np.array_equal(vector, case.expected(text)), text
        calls = case.fake.calls
        assert max(call.rows for call in calls) <= case.rows
        assert sum(call.rows for call in calls) == count
        if case.rows < 2048:
            assert len(calls) == -(-count // case.rows), "every call is as full as the upstream allows"
        assert case.fake.max_in_flight <= 4
        assert answer["usage"]["prompt_tokens"] == case.fake.billed_tokens
        assert answer["model"] == case.model
