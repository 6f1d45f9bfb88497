"""The limits that upstreams state when they refuse a call. Decides nothing: `app.pipeline.adapt` and
`app.pipeline.long_inputs` do."""

from __future__ import annotations

import re

# "batch size is invalid, it should not be larger than 10", "at most 100 requests can be in one batch",
# "batch size 33 > maximum allowed batch size 32", "Too many inputs. The max number of inputs is 16.", "batchSize must
# be 1 but the entered value was 56".
_CALL_INPUTS = re.compile(
    r"batch.{0,40}(?:not be larger than|maximum allowed batch size|at most|maximum of)\s*:?\s*(\d++)(?! tokens?\b)"
    r"|at most (\d+) (?!tokens?\b)\w+ can be in one batch"
    r"|max(?:imum)? number of inputs is (\d+)"
    r"|batchSize must be (\d+) but",
    re.IGNORECASE | re.DOTALL,
)
# What OpenAI and pydantic (FastAPI's 422) say of any list that is too long: "array too long. Expected an array with
# maximum length 2048, but got an array with length 3000 instead", "List should have at most 32 items after validation,
# not 33". It is the list of inputs if it has as many items as the call has inputs, unless it is "input[0]".
_ITEMS = re.compile(
    r"(?<!\]': )\barray too long\. Expected an array with maximum length (\d+), but got an array with length (\d+)"
    r"|\bList should have at most (\d+) items? after validation, not (\d+)",
    re.IGNORECASE,
)
# "Requested 300001 tokens, max 300000 tokens per request", "at most 8192 tokens can be in one batch", "the limit is
# 8192 tokens summed across all inputs", "the max allowed tokens per submitted batch is 120000", "batch … not be larger
# than 8192 tokens", "tokens per min (TPM): Limit 40000, Requested 75000" (but not with "Used" in between: then that is
# the obstacle). Not "maximum context length is 8192 tokens", which limits one input.
_PER_CALL = (
    r"(?:per|in|for|across)\s+(?:an? |one |each |all |the )?(?:single |submitted )?(?:batch|request|call|inputs)\b"
)
_CALL_TOKENS = re.compile(
    r"(?:\bmax(?:imum)?(?: of)?|at most|limit(?: is| of)?|exceeds?|larger than)\D{0,20}?"
    rf"(\d[\d,]*) (?:input )?tokens?\s+(?:summed |in total |total |can be |allowed )?{_PER_CALL}"
    rf"|\btokens? {_PER_CALL}\D{{0,40}}?(\d[\d,]*)"
    r"|\bbatch[^.\d]{0,40}(?:at most|maximum of|larger than)\s*:?\s*(\d[\d,]*) tokens?\b"
    r"|\btokens per min \(TPM\): Limit (\d[\d,]*), Requested\b",
    re.IGNORECASE,
)

# "maximum context length is 8192 tokens", "must have less than 512 tokens", "input (1024 tokens) is too large to
# process. increase the physical batch size (current batch size: 512)", "is larger than the max context size (512
# tokens)", "Range of input length should be [1, 8192]"
_INPUT_TOKENS = re.compile(
    r"(?:(less than)|length (?:is|of)|at most|limit(?: is| of)?|max(?:imum)?(?: of)?):? (\d[\d,]{0,9}) tokens\b"
    r"|(?:current batch size: |context size \(|length should be \[1, )(\d{1,9})\b",
    re.IGNORECASE,
)
# "the max input characters is 1000", "String should have at most 122880 characters"
_INPUT_CHARACTERS = re.compile(r"characters is (\d[\d,]{0,9})\b|at most (\d[\d,]{0,9}) characters\b", re.IGNORECASE)


def call_inputs(message: str, count: int) -> int:
    """The most inputs of a call, by the refusal of one with `count` inputs; 0 if it states none."""
    pairs = (filter(None, match.groups()) for match in _ITEMS.finditer(message))
    in_list = (int(limit) for limit, actual in pairs if int(actual) == count)
    return _first(_CALL_INPUTS, message) or next(in_list, 0)


def call_tokens(message: str) -> int:
    """The most tokens of a call; 0 if the message states none."""
    return _first(_CALL_TOKENS, message)


def input_tokens(message: str) -> int | None:
    """The most tokens of an input, at least 1; None if the message states none."""
    match = _INPUT_TOKENS.search(message)
    return max(1, _number(match[2] or match[3]) - (match[1] is not None)) if match else None


def input_characters(message: str) -> int | None:
    """The most characters of an input; None if the message states none."""
    match = _INPUT_CHARACTERS.search(message)
    return _number(match[1] or match[2]) if match else None


def _first(pattern: re.Pattern[str], message: str) -> int:
    match = pattern.search(message)
    return _number(next(filter(None, match.groups()))) if match else 0


def _number(digits: str) -> int:
    return int(digits.replace(",", ""))
