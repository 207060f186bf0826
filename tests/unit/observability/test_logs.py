"""The format of the log, and what must not appear in it."""

from __future__ import annotations

import json
import logging
import warnings
from typing import Literal

import pytest
import structlog

from calotype_server.observability.logs import configure_logging


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_tracebacks_are_logged_without_the_values_of_variables(
    log_format: Literal["console", "json"], capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback has the error and its location, but not a prompt in a local variable."""
    configure_logging("info", log_format)
    prompt = "".join(["unmistak", "able"])
    try:
        raise ValueError(len(prompt))
    except ValueError:
        structlog.get_logger("calotype_server.test").exception("it failed")
    logged = capsys.readouterr().err
    assert "it failed" in logged
    assert "ValueError" in logged
    assert "unmistakable" not in logged


def test_python_warnings_have_the_same_format(capsys: pytest.CaptureFixture[str]) -> None:
    """Warnings of libraries are JSON too, with the context variables of the call."""
    configure_logging("info", "json")
    structlog.contextvars.bind_contextvars(request="r1")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("this kernel is slow", stacklevel=1)
    [line] = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert "this kernel is slow" in line["event"]
    assert line["request"] == "r1"


def test_json_lines_have_the_bound_variables(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is one JSON object, including those of libraries, with the context variables of the call."""
    configure_logging("info", "json")
    structlog.contextvars.bind_contextvars(request="r1")
    structlog.get_logger("calotype_server.test").info("ours", size=3)
    logging.getLogger("some.library").warning("theirs")
    ours, theirs = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["request"], ours["size"], ours["level"]) == ("ours", "r1", 3, "info")
    assert (theirs["event"], theirs["request"]) == ("theirs", "r1")
