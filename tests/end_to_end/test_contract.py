"""Replies that are not the requested vectors: whatever an upstream does, no caller ever gets a wrong one."""

from __future__ import annotations

import html
from urllib.parse import quote

import numpy as np
import orjson
import pytest

from app.upstreams import UPSTREAMS as KINDS
from tests.end_to_end.cases import CASES, Case, gateway_for, vectors_of
from tests.fakes import FakeOpenAI, faults
from tests.harness import Running, running

UPSTREAMS = [
    "dashscope native text-embedding-v3",
    "dashscope compatible text-embedding-v3",
    "baidu token embedding-v1",
    "baidu v2",
    "ollama",
    "openai base64",
    "openai numbers only",
    "gemini",
]
TEXTS = ["one", "two", "three"]
REFUSALS = {"ollama": faults.http_error(400, b'{"error":"the input length exceeds the context length"}')}
"""A refusal that is the caller's fault, for a fake whose own refusal of an input is not."""

every_upstream = pytest.mark.parametrize("name", UPSTREAMS)
every_payload_fault = pytest.mark.parametrize("fault", faults.PAYLOAD_FAULTS, ids=lambda fault: fault.name)


def test_no_type_of_upstream_is_left_out_here() -> None:
    networked = {name for name, kind in KINDS.items() if not kind.built_in}
    assert {CASES[name]().config["type"] for name in UPSTREAMS} == networked


def assert_right(case: Case, gateway: Running, texts: list[str]) -> None:
    response = gateway.post({"model": case.model, "input": texts})
    assert response.status_code == 200, response.text
    for text, vector in zip(texts, vectors_of(response.json()), strict=True):
        assert np.array_equal(vector, case.expected(text)), text


@every_upstream
@every_payload_fault
def test_a_reply_that_breaks_the_contract_is_a_502_and_is_never_cached(name: str, fault: faults.Payload) -> None:
    case = CASES[name]()
    with gateway_for(case, cache={}) as gateway:
        case.fake.fail(fault, times=None)
        response = gateway.post({"model": case.model, "input": TEXTS})
        if response.status_code == 200:
            # A dialect without indexes cannot get one wrong, so its vectors must be right.
            assert "index" in fault.name
            assert name in ("ollama", "gemini")
        else:
            assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_invalid_response")
        case.fake.heal()
        assert_right(case, gateway, TEXTS)


@every_upstream
@pytest.mark.parametrize("fault", [*faults.BROKEN_TRANSFERS, *faults.BROKEN_BODIES], ids=lambda fault: fault.name)
def test_a_broken_reply_is_asked_again_once_and_the_answer_is_right(name: str, fault: faults.Fault) -> None:
    case = CASES[name]()
    with gateway_for(case) as gateway:
        case.fake.fail(fault, times=1)
        assert_right(case, gateway, TEXTS)
        assert len(case.fake.calls) == 2


@every_upstream
def test_who_gives_fewer_vectors_than_it_got_texts_is_asked_for_fewer(name: str) -> None:
    """Some servers have answered a list with one vector, or none (garrytan/gbrain#328)."""
    case = CASES[name]()
    with gateway_for(case) as gateway:
        case.fake.fail(faults.one_vector_fewer, times=None, when=lambda texts: len(texts) > 1)
        assert_right(case, gateway, TEXTS)
        assert [call.rows for call in case.fake.calls] == [3, 2, 1, 1, 1]
        case.fake.fail(faults.one_vector_fewer, times=None)
        broken = gateway.post({"model": case.model, "input": ["four", "five", "six"]})
        assert (broken.status_code, broken.json()["error"]["code"]) == (502, "upstream_invalid_response")
        assert [call.rows for call in case.fake.calls[5:]] == [3, 2, 1, 1] * 2, "and then no more of it"


@every_upstream
def test_a_reply_that_stays_broken_is_one_error_after_one_retry(name: str) -> None:
    case = CASES[name]()
    with gateway_for(case) as gateway:
        case.fake.fail(faults.reset_mid_body, times=None)
        response = gateway.post({"model": case.model, "input": TEXTS})
        assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_unreachable")
        assert len(case.fake.calls) == 2
        assert response.headers["x-embedding-upstream-calls"] == "2"
        assert " calls=2 " in gateway.log.getvalue()


@every_upstream
def test_a_stale_kept_alive_connection_is_nobodys_business(name: str) -> None:
    case = CASES[name]()
    with gateway_for(case) as gateway:
        case.fake.fail(faults.stale_keep_alive, times=1)
        assert_right(case, gateway, ["first"])
        assert_right(case, gateway, ["second"])
        assert gateway.metric("upstream_retries_total") == 0


@every_upstream
def test_a_redirect_is_never_followed(name: str) -> None:
    case = CASES[name]()
    with CASES[name]().fake as elsewhere, gateway_for(case) as gateway:
        case.fake.fail(faults.redirect(elsewhere.url + "/anywhere", 307), times=None)
        response = gateway.post({"model": case.model, "input": TEXTS})
        assert response.status_code == 502
        assert not elsewhere.requests


@every_upstream
@pytest.mark.parametrize("status", [200, 502])
def test_a_page_instead_of_a_reply_is_told_of_in_few_words_and_without_our_key(name: str, status: int) -> None:
    case = CASES[name]()
    keys = [value for key, value in case.config.items() if key.endswith("_key")]
    page = f"<html><script>evil()</script><p>Bad gateway for {' '.join(keys)}</p>{'<b>long</b> ' * 5000}</html>"
    with gateway_for(case) as gateway:
        case.fake.fail(faults.http_error(status, page.encode(), {"content-type": "text/html"}), times=None)
        response = gateway.post({"model": case.model, "input": TEXTS})
        message = response.json()["error"]["message"]
        assert response.status_code == 502
        assert "Bad gateway" in message
        assert len(message) <= 400
        assert not [word for word in (*keys, "<", "evil") if word in message + gateway.log.getvalue()]


@every_upstream
@pytest.mark.parametrize("text", ["a text that is nobody else's", "it's <b>nobody</b> else's"])
def test_a_page_that_quotes_a_text_is_not_told_of_to_others(name: str, text: str) -> None:
    case = CASES[name]()
    with gateway_for(case) as gateway:
        page = f"<html>cannot embed {html.escape(text)}</html>".encode()
        case.fake.fail(faults.http_error(200, page, {"content-type": "text/html"}), times=None)
        message = gateway.post({"model": case.model, "input": [text]}).json()["error"]["message"]
        assert "text/html) is not an embeddings reply" in message
        assert "cannot embed" not in message


@every_upstream
def test_words_that_quote_a_text_in_any_form_are_told_to_nobody(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[name]()
    text = "Patient Johanna Mustermann, born 1961, is ill"
    with gateway_for(case) as gateway:
        for quoted in (text, text.lower(), text[10:], quote(text)):
            said = f"worker died on {quoted}"
            fault = faults.http_error(
                500, orjson.dumps({"error": {"message": said}, "error_msg": said, "message": said})
            )
            case.fake.fail(fault, times=None)
            for _ in range(6):  # five failures in a row are shown in /readyz
                response = gateway.post({"model": case.model, "input": [text]})
                assert response.status_code >= 500
                told = response.text + gateway.get("/readyz").text + gateway.log.getvalue() + caplog.text
                assert "worker" not in told, quoted


@every_upstream
def test_an_upstream_that_refuses_our_key_is_a_502_and_never_the_callers_401(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]()
    with gateway_for(case) as gateway:
        case.fake.fail(faults.vendor_error("auth"), times=None)
        response = gateway.post({"model": case.model, "input": TEXTS})
        code = response.json()["error"]["code"]
        if name == "ollama":  # it has no keys; its error is reported as the upstream's failure
            assert response.status_code >= 500
        else:
            assert (response.status_code, code) == (502, "upstream_auth")
            assert response.headers["x-should-retry"] == "false"
            (shown,) = gateway.get("/readyz").json()["upstreams"].values()
            assert shown["trouble"][case.model].startswith("upstream_auth: ")
            assert f"{case.model}: upstream_auth: " in caplog.text


@every_upstream
def test_a_rate_limit_is_a_429_that_says_when_to_come_back(name: str) -> None:
    case = CASES[name]()
    with gateway_for(case) as gateway:
        case.fake.fail(faults.vendor_error("rate_limit"), times=None)
        response = gateway.post({"model": case.model, "input": TEXTS})
        if name == "ollama":
            assert response.status_code == 503
        else:
            assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(response.headers["retry-after"]) >= 1
        assert float(response.headers["retry-after-ms"]) >= 1000


@pytest.mark.parametrize("name", [name for name in UPSTREAMS if name != "ollama"])  # Ollama has no quota
def test_a_quota_that_is_used_up_is_not_asked_again(name: str) -> None:
    case = CASES[name]()
    # DashScope's usual error for a quota is a rate limit that passes.
    word = "AllocationQuota.FreeTierOnly" if name.startswith("dashscope") else "quota"
    with gateway_for(case) as gateway:
        case.fake.fail(faults.vendor_error(word), times=None)
        response = gateway.post({"model": case.model, "input": TEXTS})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "insufficient_quota")
        assert response.headers["x-should-retry"] == "false"
        assert "retry-after" not in response.headers
        assert gateway.metric("upstream_retries_total") == 0


@every_upstream
def test_one_refused_input_among_many_is_named_and_costs_the_others_nothing(name: str) -> None:
    case = CASES[name]()
    texts = [f"text {i}" for i in range(40)]
    texts[17] = "guilty"
    with gateway_for(case, cache={}) as gateway:
        case.fake.fail(REFUSALS.get(name, faults.vendor_error("bad_input")), times=None, when=lambda it: "guilty" in it)
        response = gateway.post({"model": case.model, "input": texts})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == "input[17]"
        asked = len(case.fake.calls)
        assert_right(case, gateway, [text for text in texts if text != "guilty"])
        assert len(case.fake.calls) == asked, "the innocent inputs were cached"


@pytest.mark.parametrize(
    "fault",
    [faults.nan_as_null, faults.nan_literal, faults.null_vector, faults.empty_vector, faults.zero_vector],
    ids=lambda each: each.name,
)
def test_a_text_without_a_vector_costs_the_others_in_its_call_nothing(fault: faults.Payload) -> None:
    with FakeOpenAI(api_key="sk-fake", base64=False) as fake:
        fake.fail(fault.on("bad"), times=None, when=lambda texts: "bad" in texts)
        upstream = {"type": "openai", "api_key": "sk-fake", "base_url": fake.url + "/v1"}
        with running({"upstreams": {"up": upstream}}) as gateway:
            body = {"model": "text-embedding-3-small"}
            response = gateway.post({**body, "input": ["a", "b", "bad", "c"]})
            assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_invalid_response")
            asked = len(fake.calls)
            assert [sum(text in call.texts for call in fake.calls) for text in "abc"] == [1, 1, 1]
            again = gateway.post({**body, "input": ["a", "b", "c"]})
            assert again.headers["x-embedding-cache"] == "hit"
            assert len(fake.calls) == asked
            for text, row in zip("abc", again.json()["data"], strict=True):
                assert np.array_equal(np.array(row["embedding"], "<f4"), fake.expected("text-embedding-3-small", text))
