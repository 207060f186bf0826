"""Servers for the tests of the client."""

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server


class Scripted(GenerationServiceServicer):
    """Sends the messages of a test, including those that a real server never sends."""

    def __init__(self, messages=(), *, end=None):
        self.messages, self.end = messages, end

    def Generate(self, request, context):  # noqa: N802
        """Sends the messages, then ends the call."""
        yield from self.messages
        if self.end is not None:
            self.end(context)

    def Cancel(self, request, context):  # noqa: N802
        """Ends the call."""
        self.end(context)

    def GetModel(self, request, context):  # noqa: N802
        """Ends the call."""
        self.end(context)


@contextlib.contextmanager
def _serve(servicer, credentials=None):
    server = grpc.server(ThreadPoolExecutor(4))
    add_GenerationServiceServicer_to_server(servicer, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("localhost:0", credentials)
    server.start()
    try:
        yield f"{'127.0.0.1' if credentials is None else 'localhost'}:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture
def serve():
    """Returns a context manager that serves a servicer and yields its address."""
    return _serve


@pytest.fixture
def scripted():
    """Returns the class of a servicer that sends given messages and ends calls with a given function."""
    return Scripted


@pytest.fixture
def without_waits():
    """Returns a function that lets a client reconnect without waiting, and sets other parts of its retry policy."""

    def change(client, **policy):
        client._calls.policy = dataclasses.replace(client._calls.policy, **{"random": lambda: 0.0, **policy})
        return client

    return change
