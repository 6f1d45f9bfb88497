"""The settings: frozen, strict about their keys, secrets as SecretStr.

`app.config.load` reads YAML and environment into them. Knows no upstream: each type has its own settings class
(`app.upstreams`), which the caller of `load` passes in.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from app.catalog import Role
from app.config.values import (
    Count,
    Duration,
    FilePath,
    Headers,
    Key,
    ModelName,
    Name,
    Pause,
    RedisUrl,
    Size,
    base_url_text,
    key_text,
    proxy_text,
)
from app.types import MAX_DIMENSIONS, Lane, OnLongInput


class Section(BaseModel):
    """A part of the configuration: frozen, strict about its keys, and without empty strings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, str_min_length=1, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Otherwise YAML's `yes` would pass for 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise PydanticKnownError("int_type")
        return value


class ServerSettings(Section):
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    workers: int = Field(default=1, ge=1, le=256)
    request_timeout: Duration = 60.0
    max_body: Size = 32 * 2**20
    max_inputs: Count = 2048
    max_inflight: Count = 1000
    max_inflight_size: Size = 256 * 2**20
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    drain: Pause = 5.0

    @field_validator("metrics_port")
    @classmethod
    def _differs_from_port(cls, value: int | None, others: ValidationInfo) -> int | None:
        if value and value == others.data.get("port"):
            raise ValueError("is the main port; give it another, or null to share the main one")
        return value


class KeySettings(Section):
    """One caller's key: exactly one of `key`, in plain text, and its `sha256`."""

    key: Key | None = None
    sha256: str | None = Field(default=None, repr=False)
    models: tuple[ModelName, ...] | None = Field(default=None, min_length=1)
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    lane: Lane | None = None
    cache: Literal["shared", "own"] = "shared"

    @field_validator("sha256")
    @classmethod
    def _is_a_digest(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch("[0-9a-fA-F]{64}", value):
            raise ValueError("must be 64 hexadecimal digits, the SHA-256 of the key")
        return value and value.lower()

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("set exactly one of key and sha256")
        return self

    def digest(self) -> bytes:
        """SHA-256 of the key: all that is needed to recognise it."""
        if self.key is None:
            return bytes.fromhex(self.sha256 or "")
        return hashlib.sha256(self.key.get_secret_value().encode()).digest()


class AuthSettings(Section):
    keys: dict[Name, KeySettings] = Field(min_length=1, description="one entry per caller, name: {key: ...}")


class MemorySettings(Section):
    max_size: Size = 256 * 2**20


class DiskSettings(Section):
    path: FilePath = Field(description="the file to keep embeddings in")
    max_size: Size = 2 * 2**30


class RedisSettings(Section):
    url: RedisUrl = Field(description="the server's address, such as redis://localhost:6379/0")
    timeout: Duration = 0.05


class CacheSettings(Section):
    """The tiers, in lookup order. None switches a tier off; all may be off."""

    ttl: Duration = 30 * 86400.0
    memory: MemorySettings | None = MemorySettings()
    disk: DiskSettings | None = None
    redis: RedisSettings | None = None


class UpstreamSettings(Section):
    """The settings common to all upstreams. Each type's own settings derive from this class."""

    type: str
    base_url: str = Field(description="the address requests go to, such as https://host/v1")
    """Has no trailing slash once it is validated."""
    api_key: SecretStr | None = None
    api_keys: tuple[SecretStr, ...] = ()
    timeout: Duration = 30.0
    connect_timeout: Duration = 5.0
    max_concurrency: Count = 10
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    headers: Headers = Field(default={}, repr=False)
    proxy: SecretStr | None = None

    key_variable: ClassVar[str] = ""
    """For a type that always needs a key: the variable to suggest to whoever has set none."""
    base_urls: ClassVar[Mapping[str, str]] = {}
    """The default `base_url` by `mode`, for types with modes; the first is the default mode's."""

    @model_validator(mode="before")
    @classmethod
    def _default_base_url(cls, data: Any) -> Any:
        if cls.base_urls and isinstance(data, Mapping) and "base_url" not in data:
            first = next(iter(cls.base_urls.values()))
            return {**data, "base_url": cls.base_urls.get(str(data.get("mode")), first)}
        return data

    # Validators are bound to fields, not types, so that a subclass that overrides a field's default keeps the check.

    @field_validator("*")
    @classmethod
    def _secrets_can_be_sent(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(cls._secrets_can_be_sent, value))
        return key_text(value) if isinstance(value, SecretStr) else value

    @field_validator("base_url")
    @classmethod
    def _is_a_base_url(cls, value: str) -> str:
        return base_url_text(value)

    @field_validator("proxy")
    @classmethod
    def _is_a_proxy(cls, value: SecretStr | None) -> SecretStr | None:
        return value and SecretStr(proxy_text(value.get_secret_value()))

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.api_key is not None and self.api_keys:
            raise ValueError("set api_key or api_keys, not both")
        if self.key_variable:
            self.need_key(self.key_variable)
        setting = "api_key" if self.api_key is not None else "api_keys" if self.api_keys else ""
        for name in self.headers:
            if setting and name.lower() == self.key_header:
                raise ValueError(f"headers: {name} would replace {setting}; leave one of them out")
        return self

    @property
    def key_header(self) -> str:
        """The header that `api_key` is sent in, in lower case; empty if it is in none."""
        return "authorization"

    def need_key(self, variable: str) -> None:
        """Raises a `ValueError` that says what to set if there is no key."""
        if self.api_key is None and not self.api_keys:
            raise ValueError(f'api_key: needed; set it here, for instance to "${{{variable}}}"')


class DeploymentSettings(Section):
    upstream: str = Field(description="the name of an upstream")
    model: ModelName = Field(description="the upstream's own name for the model")
    weight: float = Field(default=1, gt=0)
    priority: int = Field(default=1, ge=0)
    space: str | None = None
    """The operator's assurance that deployments with the same `space` give equal vectors, whatever the upstream."""


class PrefixSettings(Section):
    """What precedes a text to state its role, for models that learn the role from a prefix."""

    query: str = Field(default="", max_length=1000)
    document: str = Field(default="", max_length=1000)


class ModelSettings(Section):
    aliases: tuple[ModelName, ...] = ()
    deployments: tuple[DeploymentSettings, ...] = Field(
        min_length=1, description="a list of {upstream: ..., model: ...}"
    )
    dimensions: int | None = Field(default=None, ge=1, le=MAX_DIMENSIONS)
    input_type: Role | None = None
    on_long_input: OnLongInput = "error"
    normalize: bool = False
    prefixes: PrefixSettings | None = None
    max_batch: int | None = Field(default=None, ge=1)
    max_tokens_per_input: int | None = Field(default=None, ge=1)
    max_characters_per_input: int | None = Field(default=None, ge=1)
    cuts_silently: bool | None = None
    max_tokens_per_batch: int | None = Field(default=None, ge=1)
    dimension_choices: tuple[Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)], ...] | None = Field(
        default=None, min_length=1
    )
    instruct: bool | None = None
    sparse: bool | None = None
    images: int | None = Field(default=None, ge=0)
    videos: int | None = Field(default=None, ge=0)
    price_per_million_tokens: float | None = Field(default=None, ge=0)


class Settings(Section):
    """The whole configuration. It reads nothing by itself, since two gateways in one process may differ;
    `app.config.load` reads from its arguments."""

    server: ServerSettings = ServerSettings()
    auth: AuthSettings | None = None
    cache: CacheSettings = CacheSettings()
    upstreams: dict[Name, UpstreamSettings]
    models: dict[ModelName, ModelSettings] = {}


CAPABILITIES = ("instruct", "sparse", "images", "videos")
"""What a model may accept or return that not every dialect can express."""
