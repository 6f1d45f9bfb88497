"""Logging: one line per request and the program's own messages, as text or JSON, on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import orjson
import structlog

Format = Literal["text", "json"]


def request_log(form: Format, level: int = logging.INFO) -> structlog.typing.FilteringBoundLogger:
    """The logger of request lines. An instance, not structlog's global configuration: gateways do not meet."""
    renderer: structlog.typing.Processor
    if form == "json":
        renderer = structlog.processors.JSONRenderer(serializer=lambda data, **_: orjson.dumps(data).decode())
    else:
        renderer = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])
    logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
    ).bind()
    return logger


def configure(form: Format, level: str) -> None:
    """The program's own messages through the standard library's root logger, in the same form.

    For the command line only: a process has one root logger.
    """
    chain: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    renderer: structlog.typing.Processor
    if form == "json":
        renderer = structlog.processors.JSONRenderer(serializer=lambda data, **_: orjson.dumps(data).decode())
    else:
        renderer = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=chain,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # It tells of its own start and stop, which the lines before and after tell better.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
