"""Kinds of value the settings are made of: durations, sizes, names, keys, addresses.

A ValueError is one readable sentence, and never holds the value: it may be a secret, or hold one.
"""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlsplit

import httpx
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

_DURATION = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


DURATIONS = "250ms, 30s, 10m, 1h, 30d, or a number of seconds"
SIZES = "64KiB, 256MiB, 2GiB, or a number of bytes"
LONGEST = 36500 * 86400.0
"""Seconds. What ends later ends beyond calendars, Redis's and others'."""
LARGEST = 2**50
"""Bytes."""
_ESCAPES = "in a password write %23 for #, %2F for / and %3F for ?"


def parse_duration(value: Any) -> Any:
    """One of `DURATIONS` to seconds. Raises `ValueError`; what is no text is left for the field to judge."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d)?\s*", value)
        if not match:
            raise ValueError(f"must be a duration: {DURATIONS}")
        return float(match[1]) * _DURATION[match[2] or "s"]
    return value


def parse_size(value: Any) -> Any:
    """One of `SIZES` to bytes, likewise."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]{1,16}(?:\.[0-9]+)?)\s*([KMGT]i?B|B)?\s*", value)
        if not match:
            raise ValueError(f"must be a size: {SIZES}")
        return int(float(match[1]) * _SIZE[match[2] or "B"])
    return value


def not_for_ever(value: float) -> float:
    if value > LONGEST:
        raise ValueError("must be at most 36500d")
    return value


def not_endless(value: int) -> int:
    if value > LARGEST:
        raise ValueError("must be at most 1024TiB")
    return value


def plain_name(value: str) -> str:
    """A name that can stand in a path, a metric's label and an environment variable."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError("a name here is letters, digits, '.', '_' and '-', and begins with a letter or digit")
    return value


def model_name(value: str) -> str:
    """Model names are the vendors' and may hold `/` and `:`; what they never hold is space."""
    if not value or re.search(r"[\s\x00-\x1f\x7f]", value):
        raise ValueError("a model's name must not be empty or hold spaces")
    return value


def key_text(value: SecretStr) -> SecretStr:
    """A key travels in a header: printable ASCII. What stands around it (a line end from a file) is dropped."""
    text = value.get_secret_value().strip()
    if not text:
        raise ValueError("must not be empty")
    if not re.fullmatch(r"[\x21-\x7e]+", text):
        raise ValueError("must be printable ASCII without spaces")
    # What no shell has read: an .env file's quotes are part of the value for `docker --env-file`.
    if re.fullmatch(r"(['\"]).*\1", text):
        raise ValueError("is in quotes, which are taken for a part of it; leave them out")
    if re.fullmatch(r"\$(\(\w+\)|[A-Z_][A-Z0-9_]*)", text):
        raise ValueError("names a variable as a shell does; write ${NAME}")
    return SecretStr(text)


def file_path(value: str) -> str:
    """A file's path, which no shell has read: `~` would be a directory of that name."""
    if value.startswith("~"):
        raise ValueError("begins with ~ as a shell has it; write ${HOME} or the whole path")
    return value


def check_url(text: str, schemes: tuple[str, ...], *, credentials: bool) -> str:
    """An absolute URL without a trailing slash, or ValueError. Messages never hold the URL: it may hold a password."""
    written = " or ".join(f"{scheme}://" for scheme in schemes)
    escapes = f"; {_ESCAPES}" if credentials and "@" in text else ""
    try:
        url = urlsplit(text.strip())
        sound = url.scheme in schemes and (url.hostname or url.scheme == "unix")
    except ValueError:
        sound = False
    if not sound:
        raise ValueError(f"must be a URL that begins with {written}{escapes}")
    if re.search(r"\s", text.strip()):
        raise ValueError("must not hold spaces")
    try:
        sound = url.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise ValueError(f"must be a URL whose port is a number from 1 to 65535{escapes}")
    if not credentials and "@" in url.netloc:
        raise ValueError("must not hold a user or password; use the keys meant for credentials")
    return text.strip().rstrip("/")


_TRUTH = "(?i:0|f|false|n|no|1|t|true|y|yes)"
_REDIS_OPTIONS = {
    "db": r"\d{1,9}",
    "username": ".+",
    "password": ".+",
    "client_name": r"[\x21-\x7e]+",
    "ssl_ca_certs": ".+",
    "ssl_certfile": ".+",
    "ssl_keyfile": ".+",
    "ssl_cert_reqs": "none|optional|required",
    "ssl_check_hostname": _TRUTH,
}
"""What may stand behind the `?` of a Redis URL: of redis-py's options those that leave deadlines to us."""


def redis_url_text(value: str) -> str:
    """`redis://` or `rediss://` with a database's number for a path, or `unix://` with a socket's."""
    checked = check_url(value, ("redis", "rediss", "unix"), credentials=True)
    url = urlsplit(checked)
    if url.fragment:
        raise ValueError(f"must not hold a #; {_ESCAPES}")
    if url.scheme == "unix" and not url.path:
        raise ValueError("must name a socket, such as unix:///run/redis.sock")
    if url.scheme != "unix" and not re.fullmatch(r"(/\d{0,9})?", url.path):
        raise ValueError("the path of a Redis URL is the number of a database, such as /0")
    known = [name for name in _REDIS_OPTIONS if url.scheme == "rediss" or not name.startswith("ssl_")]
    for name, option in parse_qsl(url.query, keep_blank_values=True):
        if name not in known:
            raise ValueError(f"behind the ? of a {url.scheme}:// URL may stand {', '.join(known)}")
        if not re.fullmatch(_REDIS_OPTIONS[name], option):
            raise ValueError(f"{name}, behind the ?, has a value that it cannot have")
    return checked


def base_url_text(value: str) -> str:
    """Where paths are appended to: http(s), and nothing after the path."""
    checked = check_url(value, ("http", "https"), credentials=False)
    if "?" in checked or "#" in checked:
        raise ValueError("must not hold a query (?) or fragment (#)")
    return _can_be_asked(checked)


def proxy_text(value: str) -> str:
    """Where requests go through: http(s), with a user and password or without."""
    return _can_be_asked(check_url(value, ("http", "https"), credentials=True))


def _can_be_asked(url: str) -> str:
    try:
        httpx.URL(url)  # which knows what names in other scripts can be
    except httpx.InvalidURL:
        raise ValueError("must be a URL whose host is a name that can be looked up, or an address") from None
    return url


def header_fields(value: dict[str, str]) -> dict[str, str]:
    """Extra request headers: sendable names and values, and none that frame the message."""
    for name, text in value.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            raise ValueError("a header's name is letters, digits and '-'")
        if name.lower() in ("content-length", "transfer-encoding", "connection"):
            raise ValueError(f"{name} is set by the gateway itself")
        if not re.fullmatch(r"[\t\x20-\x7e]*", text):
            raise ValueError(f"the value of {name} must be printable ASCII on one line")
    return value


Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0), AfterValidator(not_for_ever)]
Pause = Annotated[float, BeforeValidator(parse_duration), Field(ge=0), AfterValidator(not_for_ever)]
"""A duration that may be none at all."""
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0), AfterValidator(not_endless)]
Count = Annotated[int, Field(ge=1, le=10**12)]
"""A bounded whole number: Python's have no end, but these are turned into numbers of other kinds, which do."""
Name = Annotated[str, AfterValidator(plain_name)]
FilePath = Annotated[str, AfterValidator(file_path)]
ModelName = Annotated[str, AfterValidator(model_name)]
Key = Annotated[SecretStr, AfterValidator(key_text)]
