"""The value types of the settings: durations, sizes, names, keys, addresses.

A ValueError is one readable sentence. It never contains the value, which may be or contain a secret.
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
MAX_DURATION = 36500 * 86400.0
"""Seconds. Longer ones exceed the range of calendars, Redis's and others'."""
MAX_SIZE = 2**50
"""Bytes."""
_ESCAPES = "in a password write %23 for #, %2F for / and %3F for ?"


def parse_duration(value: Any) -> Any:
    """Parses one of `DURATIONS` into seconds. Raises `ValueError`. Leaves a value that is not text to the field."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d)?\s*", value)
        if not match:
            raise ValueError(f"must be a duration: {DURATIONS}")
        return float(match[1]) * _DURATION[match[2] or "s"]
    return value


def parse_size(value: Any) -> Any:
    """Parses one of `SIZES` into bytes, likewise."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]{1,16}(?:\.[0-9]+)?)\s*([KMGT]i?B|B)?\s*", value)
        if not match:
            raise ValueError(f"must be a size: {SIZES}")
        return int(float(match[1]) * _SIZE[match[2] or "B"])
    return value


def bounded_duration(value: float) -> float:
    if value > MAX_DURATION:
        raise ValueError("must be at most 36500d")
    return value


def bounded_size(value: int) -> int:
    if value > MAX_SIZE:
        raise ValueError("must be at most 1024TiB")
    return value


def plain_name(value: str) -> str:
    """A name that is valid in a path, a metric label and an environment variable."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError("a name here is letters, digits, '.', '_' and '-', and begins with a letter or digit")
    return value


def model_name(value: str) -> str:
    """Model names are the vendors' and may contain `/` and `:`, but never whitespace."""
    if not value or re.search(r"[\s\x00-\x1f\x7f]", value):
        raise ValueError("a model's name must not be empty or hold spaces")
    return value


def key_text(value: SecretStr) -> SecretStr:
    """A key is sent in a header, hence printable ASCII. Surrounding whitespace (a line end from a file) is dropped."""
    text = value.get_secret_value().strip()
    if not text:
        raise ValueError("must not be empty")
    if not re.fullmatch(r"[\x21-\x7e]+", text):
        raise ValueError("must be printable ASCII without spaces")
    # Shell syntax that no shell has read: for `docker --env-file` the quotes in an .env file are part of the value.
    if re.fullmatch(r"(['\"]).*\1", text):
        raise ValueError("is in quotes, which are taken for a part of it; leave them out")
    if re.fullmatch(r"\$(\(\w+\)|[A-Z_][A-Z0-9_]*)", text):
        raise ValueError("names a variable as a shell does; write ${NAME}")
    return SecretStr(text)


def file_path(value: str) -> str:
    """A file path. No shell expands it, so `~` would be a directory of that name."""
    if value.startswith("~"):
        raise ValueError("begins with ~ as a shell has it; write ${HOME} or the whole path")
    return value


def check_url(text: str, schemes: tuple[str, ...], *, credentials: bool) -> str:
    """An absolute URL without a trailing slash. Raises `ValueError`, never with the URL: it may contain a password."""
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
        raise ValueError("must not contain spaces")
    try:
        sound = url.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise ValueError(f"must be a URL whose port is a number from 1 to 65535{escapes}")
    if not credentials and "@" in url.netloc:
        raise ValueError("must not contain a user or password; use the keys meant for credentials")
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
"""The options allowed in the query of a Redis URL: those of redis-py's that do not affect deadlines."""


def redis_url(value: SecretStr) -> SecretStr:
    """`redis://` or `rediss://` with a database number as its path, or `unix://` with a socket's path."""
    checked = check_url(value.get_secret_value(), ("redis", "rediss", "unix"), credentials=True)
    url = urlsplit(checked)
    if url.fragment:
        raise ValueError(f"must not contain a #; {_ESCAPES}")
    if url.scheme == "unix" and not url.path:
        raise ValueError("must name a socket, such as unix:///run/redis.sock")
    if url.scheme != "unix" and not re.fullmatch(r"(/\d{0,9})?", url.path):
        raise ValueError("the path of a Redis URL is the number of a database, such as /0")
    known = [name for name in _REDIS_OPTIONS if url.scheme == "rediss" or not name.startswith("ssl_")]
    for name, option in parse_qsl(url.query, keep_blank_values=True):
        if name not in known:
            raise ValueError(f"after the ? of a {url.scheme}:// URL only these are allowed: {', '.join(known)}")
        if not re.fullmatch(_REDIS_OPTIONS[name], option):
            raise ValueError(f"{name}, after the ?, has an invalid value")
    return SecretStr(checked)


def base_url_text(value: str) -> str:
    """A URL that paths are appended to: http(s), and nothing after the path."""
    checked = check_url(value, ("http", "https"), credentials=False)
    if "?" in checked or "#" in checked:
        raise ValueError("must not contain a query (?) or fragment (#)")
    return _check_host(checked)


def proxy_text(value: str) -> str:
    """The URL of a proxy: http(s), with or without user and password."""
    return _check_host(check_url(value, ("http", "https"), credentials=True))


def _check_host(url: str) -> str:
    try:
        httpx.URL(url)  # validates international host names
    except httpx.InvalidURL:
        raise ValueError("must be a URL whose host is a name that can be looked up, or an address") from None
    return url


def header_fields(value: dict[str, str]) -> dict[str, str]:
    """Extra request headers: valid names and values, and none that affect message framing."""
    for name, text in value.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            raise ValueError("a header's name is letters, digits and '-'")
        if name.lower() in ("content-length", "transfer-encoding", "connection"):
            raise ValueError(f"{name} is set by the gateway itself")
        if not re.fullmatch(r"[\t\x20-\x7e]*", text):
            raise ValueError(f"the value of {name} must be printable ASCII on one line")
    return value


Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0), AfterValidator(bounded_duration)]
Pause = Annotated[float, BeforeValidator(parse_duration), Field(ge=0), AfterValidator(bounded_duration)]
"""A duration that may be 0."""
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0), AfterValidator(bounded_size)]
Count = Annotated[int, Field(ge=1, le=10**12)]
"""A bounded whole number: Python's integers are unbounded, but these are converted to types that are not."""
Name = Annotated[str, AfterValidator(plain_name)]
FilePath = Annotated[str, AfterValidator(file_path)]
ModelName = Annotated[str, AfterValidator(model_name)]
Key = Annotated[SecretStr, AfterValidator(key_text)]
RedisUrl = Annotated[SecretStr, AfterValidator(redis_url)]
Headers = Annotated[dict[str, str], AfterValidator(header_fields)]
