"""A response's bytes, read back."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from app.api import render
from app.api.usage import Usage
from app.types import Embedding, EmbedResult, Source

COUNT = 2_050
"""More than OpenAI takes; how many there may be is the operator's to say."""


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
