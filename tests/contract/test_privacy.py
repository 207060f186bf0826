"""Prompts stay out of the log, on every path, unless the operator wants them there."""

from __future__ import annotations

from typing import Literal

import grpc
import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server import errors
from calotype_server.api import service as api
from calotype_server.observability.logs import configure_logging
from support.engine.fake_engine import FakeEngine
from support.service import running

PROMPT, NEGATIVE = 'a "secret"\nübercat', "hidden dogs"
WORDS = ("secret", "bercat", "hidden", "dogs")


def make_request(**fields) -> pb.GenerateRequest:
    """Returns a request with recognisable prompts."""
    return pb.GenerateRequest(prompt=PROMPT, negative_prompt=NEGATIVE, **fields)


def quoting(kind: type[Exception]) -> Exception:
    """Returns an error, with a cause, that quotes the prompts in several ways, as pipelines do."""
    try:
        raise ValueError(f"bad tokens in {PROMPT!r}")
    except ValueError as cause:
        error = kind(f"cannot draw {PROMPT} without {NEGATIVE}")
        error.__cause__ = cause
        return error


async def outcome(service, request) -> grpc.StatusCode:
    """Returns the status of a call."""
    try:
        async for _ in service.stub.Generate(request):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def every_path(monkeypatch, transport: str) -> set[grpc.StatusCode]:
    """Runs requests that end in every way that is logged, and returns their statuses."""
    engine, codes = FakeEngine(), set()
    async with running(engine, transport=transport, max_queue=0) as service:
        codes.add(await outcome(service, make_request()))
        codes.add(await outcome(service, make_request(width_px=7, request_id="x" * 999)))
        codes.add(await outcome(service, make_request(scheduler=PROMPT)))
        for failure in (quoting(RuntimeError), quoting(KeyError), errors.EngineDead("It is dead.")):
            engine.failure = failure
            codes.add(await outcome(service, make_request()))
        engine.failure = None
        monkeypatch.setattr(service.generations, "start", lambda *_: _raise(quoting(RuntimeError)))
        codes.add(await outcome(service, make_request()))
        monkeypatch.undo()
        monkeypatch.setattr(api, "validate", lambda request, *_: _raise(TypeError(f"what is {request}")))
        codes.add(await outcome(service, make_request()))
        monkeypatch.undo()
    return codes


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("log_format", ["console", "json"])
async def test_no_path_logs_a_prompt(
    log_format: Literal["console", "json"], transport: str, monkeypatch, capsys
) -> None:
    """Prompts are not logged on success, on rejection, or when the pipeline or the server fails and quotes them."""
    configure_logging("debug", log_format)
    codes = await every_path(monkeypatch, transport)
    logged = capsys.readouterr().err
    assert codes == {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL}
    assert logged.count("generation accepted") >= 4
    assert logged.count("cannot draw [redacted] without [redacted]") >= 2
    assert "generation failed" in logged
    assert "call failed" in logged or "request failed" in logged
    assert not [word for word in WORDS if word in logged]


async def test_prompts_are_logged_with_log_prompts(monkeypatch, capsys) -> None:
    """With --log-prompts, each generation logs its prompt, and nothing is redacted."""
    configure_logging("info", "json", prompts=True)
    await every_path(monkeypatch, "native")
    logged = capsys.readouterr().err
    assert '"prompt": "a \\"secret\\"\\n\\u00fcbercat"' in logged
    assert "without hidden dogs" in logged
