"""The gateway's metrics. The only package that imports prometheus_client."""

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import Counter

from app.metrics.buffered import BufferedCounter, BufferedGauge, BufferedHistogram
from app.metrics.processes import PROCESS_NAME, forget_process, multiprocess
from app.metrics.registry import ConfigMetrics, Metrics

__all__ = [
    "CONTENT_TYPE",
    "PROCESS_NAME",
    "BufferedCounter",
    "BufferedGauge",
    "BufferedHistogram",
    "ConfigMetrics",
    "Counter",
    "Metrics",
    "forget_process",
    "multiprocess",
]
