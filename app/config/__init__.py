"""The configuration: what may be said (`settings`), and how it is read and held to that (`load`)."""

from app.config.kind import UpstreamKind
from app.config.settings import (
    CAPABILITIES,
    AuthSettings,
    CacheSettings,
    DeploymentSettings,
    KeySettings,
    ModelSettings,
    PrefixSettings,
    RedisSettings,
    ServerSettings,
    Settings,
    UpstreamSettings,
)

__all__ = [
    "CAPABILITIES",
    "AuthSettings",
    "CacheSettings",
    "DeploymentSettings",
    "KeySettings",
    "ModelSettings",
    "PrefixSettings",
    "RedisSettings",
    "ServerSettings",
    "Settings",
    "UpstreamKind",
    "UpstreamSettings",
]
