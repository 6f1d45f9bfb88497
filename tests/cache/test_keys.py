from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from app.cache.keys import derive
from app.types import EmbedRequest, Params

# Few letters, so that the end of a field often equals the beginning of another, and length prefixes look like text.
words = st.text("a\x00\x01s\x07", max_size=4) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
params = st.builds(
    Params,
    dimensions=st.none() | st.integers(0, 3) | st.integers(1, 4096),
    input_type=st.sampled_from([None, "query", "document"]),
    output_type=st.sampled_from(["dense", "sparse", "dense&sparse"]),
    instruct=st.none() | words,
)
identities = st.tuples(words, params, words, words)


def one(identity: tuple[str, Params, str, str]) -> bytes:
    space, chosen, namespace, text = identity
    return derive(space, chosen, [text], namespace)[0]


@given(identities, identities)
def test_two_identities_have_one_key_only_if_they_are_equal(
    a: tuple[str, Params, str, str], b: tuple[str, Params, str, str]
) -> None:
    assert (one(a) == one(b)) == (a == b)


@given(words, words, words)
def test_moving_the_boundary_between_two_fields_changes_the_key(a: str, b: str, c: str) -> None:
    # namespace|input, space|namespace, instruct|input
    splits = [
        derive(a, Params(), [b + c], ""),
        derive(a, Params(), [c], b),
        derive(a, Params(), [b], c),
        derive(a + b, Params(), [c], ""),
        derive(a, Params(instruct=b), [c], ""),
        derive(a, Params(instruct=b + c), [""], ""),
    ]
    identities = [
        (a, None, "", b + c),
        (a, None, b, c),
        (a, None, c, b),
        (a + b, None, "", c),
        (a, b, "", c),
        (a, b + c, "", ""),
    ]
    assert len({split[0] for split in splits}) == len(set(identities))


@given(st.lists(words, max_size=8))
def test_a_key_does_not_depend_on_the_inputs_beside_it(texts: list[str]) -> None:
    assert derive("s", Params(), texts) == [derive("s", Params(), [text])[0] for text in texts]


def test_absent_empty_and_zero_are_three_different_things() -> None:
    odd = [None, "", 0, "0", False, 1, True, b""]
    keys = {derive("s", Params(instruct=cast("Any", value)), ["t"])[0] for value in odd}
    assert len(keys) == len(odd)


@pytest.mark.parametrize("name", Params.__struct_fields__)
def test_every_parameter_is_part_of_the_key(name: str) -> None:
    changed = replace(Params(), **cast("Any", {name: "something else"}))
    assert derive("s", changed, ["t"]) != derive("s", Params(), ["t"])


def test_the_same_value_in_another_parameter_is_another_key() -> None:
    assert derive("s", Params(input_type=cast("Any", "x")), ["t"]) != derive("s", Params(instruct="x"), ["t"])


def test_each_field_of_a_request_is_known_to_alter_the_vector_or_not_to() -> None:
    """`model` is the public name; the vector space takes its place."""
    alter = {"params", "inputs"}
    do_not = {"model", "deadline", "caller", "read_cache", "write_cache", "keys", "held", "positions", "media"}
    do_not |= {"numbers", "on_long_input", "collect_too_long"}
    assert set(EmbedRequest.__struct_fields__) == alter | do_not


def test_a_parameter_of_a_type_without_a_tag_is_refused() -> None:
    with pytest.raises(TypeError, match="dict"):
        derive("s", Params(instruct=cast("Any", {})), ["t"])


def test_a_key_is_a_whole_sha_256() -> None:
    assert [len(each) for each in derive("s", Params(), ["a", "b"])] == [32, 32]


def test_a_key_stays_what_it_is_from_release_to_release() -> None:
    # A change here invalidates every existing cache: change the format's number with it.
    chosen = Params(dimensions=1024, input_type="query")
    assert derive("dashscope/text-embedding-v3", chosen, ["风急天高"], "team-a")[0].hex() == KNOWN


KNOWN = "30d08c43b963e5ea4bcfcf6889ab82df49abb60f55bc8fcaa3e2cb14fc438430"
