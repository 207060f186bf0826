"""What the log says, and what it must not."""

from __future__ import annotations

import json
import logging
import warnings

import pytest
import structlog

from calotype_server.observability.logs import configure_logging


@pytest.fixture(autouse=True)
def restore():
    """Leaves logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    logging.captureWarnings(False)
    root.handlers = handlers
    root.setLevel(level)
    logging.getLogger("calotype_server").setLevel(logging.NOTSET)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.mark.parametrize("shape", ["console", "json"])
def test_tracebacks_are_logged_without_the_values_of_variables(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The error and its place are there; a prompt in a local variable is not."""
    configure_logging("info", shape)
    prompt = "".join(["unmistak", "able"])
    try:
        raise ValueError(len(prompt))
    except ValueError:
        structlog.get_logger("calotype_server.test").exception("it failed")
    logged = capsys.readouterr().err
    assert "it failed" in logged
    assert "ValueError" in logged
    assert "unmistakable" not in logged


def test_warnings_of_python_come_in_the_same_shape(capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise a library's warning would break whoever parses the log, and say nothing of whose call it was."""
    configure_logging("info", "json")
    structlog.contextvars.bind_contextvars(request="r1")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("this kernel is slow", stacklevel=1)
    [line] = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert "this kernel is slow" in line["event"]
    assert line["request"] == "r1"


def test_json_lines_carry_what_was_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """One object a line, also for what libraries log, with the ids of the call."""
    configure_logging("info", "json")
    structlog.contextvars.bind_contextvars(request="r1")
    structlog.get_logger("calotype_server.test").info("ours", size=3)
    logging.getLogger("somebody.else").warning("theirs")
    ours, theirs = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["request"], ours["size"], ours["level"]) == ("ours", "r1", 3, "info")
    assert (theirs["event"], theirs["request"]) == ("theirs", "r1")
