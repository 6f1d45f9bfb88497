"""A role that is told before the text is told nowhere else."""

from __future__ import annotations

import pytest

from app.catalog import ROLES, Model, Role
from app.pipeline.prefix import Prefix
from app.types import Batch, BatchResult, Embedding, Media, Params

IMAGE = Media("image", "https://example.com/a.png")
TOLD = Model("m", roles=ROLES, prefixes=("Instruct: {instruct}\nQuery:", ""), instruct=True, instruction="search")
UNTOLD = Model("m", roles=ROLES, instruct=True)


@pytest.mark.parametrize(
    ("model", "role", "instruct", "text", "kept"),
    [
        (TOLD, "query", None, "Instruct: search\nQuery:a", False),
        (TOLD, "query", "find", "Instruct: find\nQuery:a", False),
        (TOLD, "document", None, "a", False),
        (TOLD, None, None, "a", True),
        (UNTOLD, "query", "find", "a", True),
    ],
)
async def test_a_role_is_told_before_each_text_or_by_the_parameters(
    model: Model, role: Role | None, instruct: str | None, text: str, kept: bool
) -> None:
    sent: list[Batch] = []

    async def embed(batch: Batch) -> BatchResult:
        sent.append(batch)
        return BatchResult([Embedding(b"v", 1) for _ in batch.inputs])

    params = Params(input_type=role, instruct=instruct, dimensions=2)
    await Prefix(embed, model)(Batch("m", ["a", IMAGE], [b"a", b"i"], params, store=True, deadline=0))
    assert sent[0].inputs == [text, IMAGE]
    assert sent[0].params == (params if kept else Params(dimensions=2))
