"""Configures logging. Every line has the context variables bound by its caller, such as the id of the generation."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog
from structlog.tracebacks import ExceptionDictTransformer

from calotype_server.observability.redaction import RedactPrompts
from calotype_server.observability.repeats import RepeatLimitingHandler

__all__ = ["configure_logging"]


def configure_logging(
    level: str,
    format: Literal["console", "json"],  # noqa: A002 - the name of the setting
    *,
    prompts: bool = False,
) -> None:
    """Sends all logs to standard error, as text for people or as one JSON object per line.

    Lines that clients can cause are limited, see `RepeatLimitingHandler`.

    Args:
        level: Lowest level to log: "debug", "info", "warning" or "error".
        format: "console" or "json".
        prompts: Whether prompts may appear in the log.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Without local variables, which can contain prompts and megabytes of data.
    traceback = ExceptionDictTransformer(show_locals=False)
    exceptions, renderer = (
        (structlog.processors.ExceptionRenderer(traceback), structlog.processors.JSONRenderer())
        if format == "json"
        else (
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        )
    )
    renderers: list[structlog.typing.Processor] = [exceptions, RedactPrompts(log_prompts=prompts), renderer]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    # Libraries log through the standard library; their lines get the same format.
    handler = RepeatLimitingHandler(sys.stderr)
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[remove, *renderers]))
    # Python warnings too, so that they have the context variables of the call.
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("calotype_server").setLevel(level.upper())
