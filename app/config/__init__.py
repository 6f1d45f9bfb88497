"""The configuration: its schema (`settings`), and how it is read and validated (`load`)."""

from app.config.kind import UpstreamKind, VendorVariable
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
    "VendorVariable",
]
