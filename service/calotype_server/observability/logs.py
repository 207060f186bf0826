"""Logging, set up in one place. Every line carries what was bound: the call's and the generation's id."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog
from structlog.tracebacks import ExceptionDictTransformer

from calotype_server.observability.redaction import RedactPrompts

__all__ = ["configure_logging"]


def configure_logging(
    level: str,
    format: Literal["console", "json"],  # noqa: A002 - as the setting
    *,
    prompts: bool = False,
) -> None:
    """Logs to standard error: lines for people, or one JSON object a line.

    Args:
        level: Least severe level that is kept, as in the standard library, in lower case.
        format: "console" or "json".
        prompts: Whether what people ask for is logged.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks without local variables, which hold prompts and megabytes.
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
    renderers: list[structlog.typing.Processor] = [exceptions, RedactPrompts(wanted=prompts), renderer]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    # The libraries log through the standard library; they come out in the same shape.
    handler = logging.StreamHandler(sys.stderr)
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[remove, *renderers]))
    # Warnings of Python too: with the ids of whoever they are about.
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("calotype_server").setLevel(level.upper())
