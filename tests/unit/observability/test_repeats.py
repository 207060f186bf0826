"""Clients cannot flood the log."""

from __future__ import annotations

import io
import logging

import pytest
import structlog

from calotype_server.observability import repeats
from calotype_server.observability.logs import configure_logging
from calotype_server.observability.repeats import RepeatLimitingHandler


class Log:
    """A handler with a clock that the test sets."""

    def __init__(self) -> None:
        self.time = 0.0
        self._stream = io.StringIO()
        self.handler = RepeatLimitingHandler(self._stream, lambda: self.time)

    def write(self, text: str, name: str = "uvicorn.error", *arguments: object) -> None:
        """Logs a warning."""
        self.handler.handle(logging.LogRecord(name, logging.WARNING, "", 0, text, arguments, None))

    @property
    def lines(self) -> list[str]:
        """All lines so far."""
        return self._stream.getvalue().splitlines()


@pytest.fixture
def log() -> Log:
    """An empty log."""
    return Log()


def test_repeated_lines_are_counted_instead_of_written(log: Log) -> None:
    """Ten lines of a kind appear in a minute; the first line after that is preceded by the number of the others."""
    for _ in range(322):
        log.write("Invalid HTTP request received.")
    assert log.lines == ["Invalid HTTP request received."] * 10
    log.time = 60.0
    log.write("something else")
    assert log.lines[10:] == ["Invalid HTTP request received. (312 similar messages suppressed)", "something else"]
    log.write("Invalid HTTP request received.")
    assert log.lines[12:] == ["Invalid HTTP request received."]


def test_arguments_do_not_make_a_new_kind(log: Log) -> None:
    """Lines with the same text and other arguments, which the client may choose, count together."""
    for number in range(100):
        log.write("from %s", "uvicorn.error", number)
    assert len(log.lines) == 10


def test_the_number_of_kinds_is_bounded(log: Log) -> None:
    """Even if a client could choose the text of a line, the log grows by a bounded number of lines per minute."""
    for number in range(10_000):
        log.write(f"text {number}")
    assert len(log.lines) == 256 + 10
    log.handler.close()
    assert log.lines[-1].endswith(f"({10_000 - 256 - 10} similar messages suppressed)")


def test_lines_about_generations_are_never_suppressed(log: Log) -> None:
    """Only lines of libraries and of the ports are limited."""
    for _ in range(100):
        log.write("generation ended", "calotype_server.generations.lifecycle")
        log.write("call rejected", "calotype_server.transport.grpc.status")
    assert log.lines.count("generation ended") == 100
    assert log.lines.count("call rejected") == 10


def test_the_log_of_the_server_limits_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    """Structured lines with different reasons count separately, and other values do not matter."""
    configure_logging("info", "json")
    rejections = structlog.get_logger(f"{repeats.__package__.partition('.')[0]}.transport.grpc.status")
    for number in range(50):
        rejections.info("call rejected", reason="KEY_REQUIRED", request=str(number))
    rejections.info("call rejected", reason="TOO_MANY_CALLS")
    assert len(capsys.readouterr().err.splitlines()) == 11
