"""The requests every dialect makes, as plain data."""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from app.types import WireRequest


def post(url: str, body: object, query: Mapping[str, str] | None = None) -> WireRequest:
    """A POST of JSON."""
    headers = {"content-type": "application/json", "accept": "application/json"}
    return WireRequest("POST", url, headers, orjson.dumps(body), dict(query) if query else {})


def get(url: str, query: Mapping[str, str] | None = None) -> WireRequest:
    return WireRequest("GET", url, {"accept": "application/json"}, query=dict(query) if query else {})
