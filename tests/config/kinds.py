"""Upstream types made up for these tests: with keys and modes, without any default, with an address, and built in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import SecretStr, model_validator

from app.catalog import Model
from app.config import Settings, UpstreamKind, UpstreamSettings, VendorVariable
from app.config.load import load
from app.upstreams import lexical


class AlphaSettings(UpstreamSettings):
    type: Literal["alpha"] = "alpha"
    base_url: str = "https://alpha.example/v1"
    mode: Literal["native", "compatible"] = "native"
    secret_key: SecretStr | None = None
    full: bool = False

    @model_validator(mode="after")
    def _has_a_key(self) -> Self:
        if self.api_key is None and not self.api_keys:
            raise ValueError("api_key: needed")
        return self


class BetaSettings(UpstreamSettings):
    type: Literal["beta"] = "beta"


class GammaSettings(UpstreamSettings):
    type: Literal["gamma"] = "gamma"
    base_url: str = "http://localhost:1234"
    keep: str | int | None = None


class PlainSettings(UpstreamSettings):
    type: Literal["plain"] = "plain"
    base_url: str = "http://plain.invalid"


_ALPHA = (VendorVariable("api_key", "ALPHA_API_KEY"), VendorVariable("base_url", "ALPHA_BASE_URL", optional=True))
_GAMMA = (VendorVariable("base_url", "GAMMA_HOST"),)


def _kind(name: str, settings: type[UpstreamSettings], *models: Model, **more: Any) -> UpstreamKind:
    known = {model.name: model for model in models}
    return UpstreamKind(name, settings, lexical.KIND.adapter, lexical.KIND.auth, lambda _: known, **more)


KINDS: Mapping[str, UpstreamKind] = {
    kind.name: kind
    for kind in (
        _kind("alpha", AlphaSettings, Model("a-1"), Model("a-2"), vendor_variables=_ALPHA),
        _kind("beta", BetaSettings),
        _kind("gamma", GammaSettings, vendor_variables=_GAMMA, default_address=("127.0.0.1", 1234)),
        _kind("plain", PlainSettings, Model("words", revision="1"), built_in=True),
    )
}


def nobody_listens(_host: str, _port: int) -> bool:
    return False


def environ(**variables: str) -> dict[str, str]:
    """`environ(SERVER__PORT="1")`: overrides, by the part of their names after the prefix."""
    return {f"EMBEDDING_GATEWAY__{name}": value for name, value in variables.items()}


def settings_from(text: str, tmp_path: Any, variables: Mapping[str, str] | None = None) -> Settings:
    """The settings loaded from a `config.yaml` that contains `text`."""
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    return load(None, variables or {}, KINDS, cwd=tmp_path, listening=nobody_listens)
