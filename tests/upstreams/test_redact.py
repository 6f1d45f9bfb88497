"""What upstreams say is freed of secrets before anybody reads it, and only then cut."""

from __future__ import annotations

import pytest

from app.upstreams.redact import LONGEST, Redactor


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("no access with Bearer abc.def-123, sorry", "no access with Bearer ***, sorry"),
        ('{"api_key": "abc123", "n": 1}', '{"api_key": "***", "n": 1}'),
        ("client_id=abc&client_secret=def&grant=x", "client_id=***&client_secret=***&grant=x"),
        ("Incorrect API key provided: sk-pr****-9xYZ.", "Incorrect API key provided: ***."),
        ("token 24.0123456789abcdef0123456789abcdef.2592000.1700000000.282335-1 expired", "token *** expired"),
        ("see https://host.example/v1?key=abc for help", "see https://*** for help"),
        ("max 8192 tokens, at most 10 texts", "max 8192 tokens, at most 10 texts"),
    ],
)
def test_what_is_shaped_like_a_secret_is_not_shown(said: str, shown: str) -> None:
    assert Redactor()(said) == shown


def test_a_known_secret_is_taken_out_wherever_it_stands_and_whole() -> None:
    redact = Redactor(["canary", "canary-and-more", ""])
    assert redact("xcanary-and-morex, canary") == "x***x, ***"


def test_half_a_secret_is_not_left_where_a_message_is_cut() -> None:
    secret = "canary-0123456789"
    for before in range(LONGEST - len(secret) - 5, LONGEST + 5):
        shown = Redactor([secret])("x" * before + secret + "y" * LONGEST)
        assert len(shown) == LONGEST
        assert "c" not in shown
