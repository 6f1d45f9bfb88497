"""The gateway's metrics. The only package that imports prometheus_client."""

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE

from app.metrics.buffered import BufferedCounter, BufferedGauge
from app.metrics.processes import PROCESS_NAME, forget_process, multiprocess
from app.metrics.registry import ConfigMetrics, Metrics

__all__ = [
    "CONTENT_TYPE",
    "PROCESS_NAME",
    "BufferedCounter",
    "BufferedGauge",
    "ConfigMetrics",
    "Metrics",
    "forget_process",
    "multiprocess",
]
