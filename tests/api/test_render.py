"""The bytes of responses, parsed again."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from app.api import render
from app.api.usage import Usage
from app.types import Embedding, EmbedResult, Source

COUNT = 2_050
"""More inputs than OpenAI takes; the operator sets how many the gateway takes."""


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("sparse", [None, b'[{"index":7,"value":0.5,"token":"a"}]'])
async def test_every_row_has_its_own_index_and_vector(encoding: str, sparse: bytes | None) -> None:
    rows = [np.array([i, 0.5], "<f4").tobytes() for i in range(COUNT)]
    result = EmbedResult([Embedding(row, 1, sparse) for row in rows], [Source.UPSTREAM] * COUNT)
    body = json.loads(b"".join(await render.embeddings(result, Usage.of(result), "some model", encoding)))
    given = [row["embedding"] for row in body["data"]]
    vectors = [base64.b64decode(each) if encoding == "base64" else np.array(each, "<f4").tobytes() for each in given]
    assert vectors == rows
    assert [row["index"] for row in body["data"]] == list(range(COUNT))
    assert {row["object"] for row in body["data"]} == {"embedding"}
    assert [row.get("sparse_embedding") for row in body["data"]] == [json.loads(sparse or b"null")] * COUNT
    assert body["usage"]["prompt_tokens"] == COUNT


@pytest.mark.parametrize("sparse", [False, True])
def test_the_headers_of_a_result_read_one_by_one(sparse: bool) -> None:
    """For servers that need single headers. Names come from upstreams, and may hold any character."""
    result = EmbedResult([Embedding(b"" if sparse else bytes(8), 1, b"[]" if sparse else None)], [Source.UPSTREAM])
    result.calls, result.deployments, result.truncated, result.split = 3, ("a/b\r\nx: y", "c/d"), 1, 2
    lines = render.result_headers(result, Usage.of(result), "vendor/m: 1")
    assert lines.endswith(b"\r\n")
    assert dict(render.decode_headers(lines)) == {
        b"x-embedding-cache": b"miss",
        b"x-embedding-cached-inputs": b"0",
        b"x-embedding-upstream-calls": b"3",
        b"x-embedding-space": b"vendor/m: 1;sparse" if sparse else b"vendor/m: 1;2",
        b"x-embedding-upstream": b"a/b%0D%0Ax: y, c/d",
        b"x-embedding-truncated-inputs": b"1",
        b"x-embedding-split-inputs": b"2",
    }
