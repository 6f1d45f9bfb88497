"""Verification of ``bce-auth-v1`` signatures, as the IAM service in front of V1 does it.

Facts: the signature page cloud.baidu.com/doc/Reference/s/njwvz1yfu. The signed names may come
in any order, and the body is not signed.
"""

import hashlib
import hmac
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

SKEW = timedelta(minutes=15)  # how far ahead a client's clock may be; not documented
DEFAULT_HEADERS = ("host", "content-length", "content-type", "content-md5")


class BadSignature(Exception):
    """The request was not signed with the secret key; the message says why."""


def verify(
    method: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    secrets: Mapping[str, str],
    now: datetime,
) -> str:
    """Return the access key that signed this request; `headers` have lower-case names.

    `secrets` gives the secret key of each known access key. Raises BadSignature.
    """
    parts = headers.get("authorization", "").split("/")
    if len(parts) != 6 or parts[0] != "bce-auth-v1":
        raise BadSignature("not a bce-auth-v1 authorization of six parts")
    _, access_key, timestamp, lifetime, names, claimed = parts
    if access_key not in secrets:
        raise BadSignature("unknown access key")
    _check_time(timestamp, lifetime, now)
    signed = _signed_names(names, headers)
    prefix = "/".join(parts[:4])
    signing_key = _hmac_hex(secrets[access_key], prefix)
    expected = _hmac_hex(signing_key, canonical_request(method, path, query, headers, signed))
    if not hmac.compare_digest(expected.encode(), claimed.encode()):
        raise BadSignature("signature does not match")
    return access_key


def canonical_request(
    method: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    signed: list[str],
) -> str:
    """Return the text that is signed: method, path, query and each header, one per line."""
    arguments = [
        f"{_encode(name)}={_encode(value)}" for name, value in query.items() if name.lower() != "authorization"
    ]
    fields = [f"{_encode(name)}:{_encode(headers[name].strip())}" for name in signed]
    parts = [method.upper(), quote(path, safe="/-._~"), "&".join(sorted(arguments))]
    return "\n".join([*parts, *sorted(fields)])


def _signed_names(names: str, headers: Mapping[str, str]) -> list[str]:
    if names:
        listed = [name.strip().lower() for name in names.split(";")]
        if not {"host", "x-bce-date"} <= set(listed):
            raise BadSignature("host and x-bce-date must be signed")
    else:
        listed = [n for n in headers if n in DEFAULT_HEADERS or n.startswith("x-bce-")]
    return [name for name in listed if headers.get(name, "").strip()]


def _check_time(timestamp: str, lifetime: str, now: datetime) -> None:
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", timestamp) or not lifetime.isdigit():
        raise BadSignature("timestamp or lifetime is malformed")
    signed_at = datetime.strptime(timestamp, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    if not signed_at - SKEW <= now <= signed_at + timedelta(seconds=int(lifetime)):
        raise BadSignature("signed too long ago, or in the future")


def _encode(value: str) -> str:
    return quote(value, safe="-._~")


def _hmac_hex(key: str, message: str) -> str:
    return hmac.new(key.encode(), message.encode(), hashlib.sha256).hexdigest()
