"""Secrets are removed from upstreams' messages before anybody reads them, and before they are cut."""

from __future__ import annotations

import random
from urllib.parse import quote, quote_plus

import pytest
from pydantic import SecretStr

from app.types import Media
from app.upstreams import UPSTREAMS
from app.upstreams.ollama import OllamaSettings
from app.upstreams.redact import MAX_MESSAGE, Redactor, quotes_input
from app.upstreams.upstream import Upstream
from tests.clock import HandClock


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("no access with Bearer abc.def-123, sorry", "no access with Bearer ***, sorry"),
        ('{"api_key": "abc123", "n": 1}', '{"api_key": "***", "n": 1}'),
        ("client_id=abc&client_secret=def&grant=x", "client_id=***&client_secret=***&grant=x"),
        ("Incorrect API key provided: sk-pr****-9xYZ.", "Incorrect API key provided: ***."),
        ("token 24.0123456789abcdef0123456789abcdef.2592000.1700000000.282335-1 expired", "token *** expired"),
        ("see https://host.example/v1?key=abc for help", "see https://*** for help"),
        ("proxy-authorization: Basic dXNlcjpwYXNz<br>", "proxy-authorization: Basic ***"),
        ("bad bce-auth-v1/ak/2026-01-01T00:00:00Z/1800/host;x-bce-date/0a1b2c, sorry", "bad ***, sorry"),
        ("the basic plan is used up", "the basic plan is used up"),
        ("max 8192 tokens, at most 10 texts", "max 8192 tokens, at most 10 texts"),
    ],
)
def test_what_is_shaped_like_a_secret_is_not_shown(said: str, shown: str) -> None:
    assert Redactor()(said) == shown


def test_a_known_secret_is_taken_out_wherever_it_stands_and_whole() -> None:
    redact = Redactor(["canary", "canary-and-more", ""])
    assert redact("xcanary-and-morex, canary") == "x***x, ***"


def test_a_stand_in_for_a_key_leaves_words_and_numbers_whole() -> None:
    said = "it exceeds the context of 512 tokens"
    assert Redactor(["x", "1", "the"])(said) == said
    assert Redactor(["cont"])(said) == "it exceeds the ***ext of 512 tokens"


def test_half_a_secret_is_not_left_where_a_message_is_cut() -> None:
    secret = "canary-0123456789"
    for before in range(MAX_MESSAGE - len(secret) - 5, MAX_MESSAGE + 5):
        shown = Redactor([secret])("x" * before + secret + "y" * MAX_MESSAGE)
        assert len(shown) == MAX_MESSAGE
        assert "c" not in shown


def test_what_is_left_of_a_secret_where_an_upstream_was_cut_short_is_not_shown() -> None:
    secret, redact = "canary-0123456789", Redactor(["canary-0123456789", "canary-0123-and-more"])
    for length in range(8, len(secret) + 1):
        assert redact(f"you sent {secret[:length]}") == "you sent ***"
    assert redact("you sent a canary") == "you sent a canary"


def test_a_secret_is_known_as_it_stands_in_a_url() -> None:
    assert Redactor(["a+canary/=="])("no route /x?sig=a%2Bcanary%2F%3D%3D&y") == "no route /x?sig=***&y"


def test_a_proxys_password_is_not_shown_in_any_form() -> None:
    settings = OllamaSettings(proxy=SecretStr("http://corp:pass%40word@proxy.example"))
    redact = Upstream("up", settings, UPSTREAMS["ollama"], HandClock()).redact
    for form in ("http://corp:pass%40word@proxy.example", "pass@word", "Y29ycDpwYXNzQHdvcmQ="):
        assert redact(f"you sent {form}!") == "you sent ***!"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("my diagnosis is XYZ", "worker died on input 'my diagnosis …'"),
        (" \n my\n\ndiagnosis", "worker died on my diagnosis"),
        ("my\ndiagnosis", r'cannot embed ["my\ndiagnosis"]'),
        ('so "sick" she said', r"{\"input\": \"so \"sick\" she\"}"),
        ("我的诊断是", "无法处理：我的诊断是"),
        ("我的诊断是", r"cannot embed \u6211\u7684\u8bca\u65ad\u662f"),
        ("诊断：\n疑似", r'cannot embed "诊断：\n疑似"'),
    ],
)
def test_a_text_is_known_by_its_beginning_in_whatever_form_it_is_quoted(text: str, said: str) -> None:
    assert quotes_input(said, ["another text", Media("image", "https://host.example/x.png"), text])


def test_a_word_that_upstreams_use_as_well_is_no_quotation() -> None:
    assert not quotes_input("the model is overloaded", ["model", "the", "", " ", "overtime is", "I ask: the model?"])
    assert not quotes_input("", ["", "a text of some length"])
    # White space does not make a word longer.
    assert not quotes_input(
        "batch size is invalid, it should not be larger than 1 0", ["1       Introduction", "a\n\n\n\n\n\n\nb"]
    )


RECORD = "Patient Johanna Mustermann, born 1961, has been diagnosed with a rare condition of the liver"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RECORD, "worker died on patient johanna mustermann, born 1961, has"),
        (RECORD, "tokens: patient johanna mustermann , born 1961 , has"),
        (RECORD, f"worker died on …{RECORD[20:60]}…"),
        (RECORD, f"… {RECORD[-40:]}"),
        (RECORD, f"no route for /embed?text={quote(RECORD)}"),
        (RECORD, f"no route for /embed?text={quote_plus(RECORD)}"),
        ("my diagnosis", "no route for /embed?text=my%20diagnosis"),
        ("Johanna Mustermann", "cannot embed johanna mustermann"),
        ("患者张伟，生于一九六一年，被诊断出患有一种罕见的肝脏疾病", "无法处理：一年，被诊断出患有一种罕见"),
        ("Die STRASSE nach Süden ist seit gestern gesperrt", "unk: straße nach süden ist seit gestern"),
    ],
)
def test_a_text_is_known_by_any_part_of_it_in_any_case_and_spacing(text: str, said: str) -> None:
    assert quotes_input(said, ["another text", text])


def test_every_quotation_of_31_bytes_is_found_wherever_it_stands() -> None:
    text = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=200))
    for start in range(len(text) - 31):
        assert quotes_input(f"worker died on {text[start : start + 31]}!", [text])


def test_upstreams_own_words_are_no_quotation_where_texts_speak_of_the_same() -> None:
    texts = [
        "What is the maximum context length of this model? It is 8192 tokens.",
        "A model that is overloaded with work: please try again in a week.",
        "We process a batch at a time, whose size should not be larger than what fits.",
        "If a server is out of memory, it has an internal error.",
        "Your request was too large: it has more tokens per minute than your plan allows.",
    ]
    for said in (
        "This model's maximum context length is 8192 tokens, however you requested 9000 tokens",
        "The model is overloaded. Please try again later.",
        "batch size is invalid, it should not be larger than 10",
        "An internal error has occurred. Please retry",
        "Request too large for text-embedding-3-small on tokens per min (TPM): Limit 40000, Requested 75000.",
    ):
        assert not quotes_input(said, texts), said


def test_so_much_of_all_texts_is_searched_and_no_more() -> None:
    beginning, end = ("".join(random.Random(seed).choices("abcdefghij", k=2**18)) for seed in (1, 2))
    assert quotes_input(beginning[-60:], [beginning + end])
    assert not quotes_input(end[:60], [beginning + end])
    assert quotes_input(beginning[2**17 - 60 : 2**17], ["another", beginning])
    assert not quotes_input(beginning[2**17 : 2**17 + 60], ["another", beginning])
