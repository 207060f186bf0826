"""Absent, dying, stalled and broken servers: every failure is a CalotypeError, never gRPC's own exception."""

import contextlib
import math
import socket
import threading

import grpc
import pytest

from calotype import (
    AsyncClient,
    CalotypeError,
    Client,
    DeadlineExceeded,
    InternalError,
    StreamIncomplete,
    Unavailable,
    Unimplemented,
)
from calotype.testing import FakeServer
from calotype.v1 import calotype_pb2 as v1


@pytest.fixture
def free_address():
    """An address without a server."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def garbage_address():
    """An address of a server that does not speak gRPC."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("where", ["free_address", "garbage_address"])
async def test_no_grpc_server(where, request):
    """Every call of both clients raises Unavailable when no gRPC server answers."""
    address = request.getfixturevalue(where)
    with Client(address) as client:
        for use in (
            client.model,
            lambda: client.cancel("x"),
            client.generate("x").result,
            lambda: list(client.generate("x")),
        ):
            with pytest.raises(Unavailable) as caught:
                use()
            assert caught.value.__cause__ is None
            assert caught.value.__suppress_context__ or caught.value.__context__ is None
    async with AsyncClient(address) as client:
        for use in (client.model, lambda: client.cancel("x"), lambda: client.generate("x").result()):
            with pytest.raises(Unavailable):
                await use()


async def test_waiting_for_a_server_ends_with_the_timeout(free_address):
    """With wait_for_server, a call waits for a server until its timeout."""
    with (
        Client(free_address, wait_for_server=math.inf) as client,
        pytest.raises(DeadlineExceeded, match="timeout passed"),
    ):
        client.generate("a red apple", timeout=0.1).result()
    async with AsyncClient(free_address, wait_for_server=math.inf, timeout=0.1) as client:
        with pytest.raises(DeadlineExceeded):
            await client.generate("a red apple").result()


async def test_deadline_passes_while_denoising():
    """The timeout ends a held generation in the client and on the server."""
    with FakeServer(hold_at=1) as server:
        with Client(server.address, timeout=0.3) as client, pytest.raises(DeadlineExceeded):
            list(client.generate("a red apple"))
        assert server.wait_cancelled()
        async with AsyncClient(server.address) as client:
            with pytest.raises(DeadlineExceeded):
                await client.generate("a red apple", timeout=0.3).result()
        assert server.wait_cancelled(count=2)


async def test_server_dies_during_a_generation():
    """Without retries, a lost connection raises a typed error."""

    def follow(generation, server):
        for progress in generation:
            if progress.step == 2:
                server.stop()

    async def afollow(generation, server):
        async for progress in generation:
            if progress.step == 2:
                server.stop()

    with FakeServer(hold_at=2) as server, Client(server.address, retries=0) as client, pytest.raises(Unavailable):
        follow(client.generate("a red apple"), server)
    with FakeServer(hold_at=2) as server:
        async with AsyncClient(server.address, retries=0) as client:
            with pytest.raises(Unavailable):
                await afollow(client.generate("a red apple"), server)


@pytest.mark.parametrize(
    "messages", [[], [v1.Progress(phase=v1.PHASE_DENOISING, step=3)]], ids=["nothing", "progress only"]
)
async def test_ok_without_an_end_is_incomplete(serve, scripted, messages):
    """A stream that ends with OK before the end of its generation raises StreamIncomplete."""
    with serve(scripted(messages)) as address:
        with Client(address, retries=0) as client, pytest.raises(StreamIncomplete):
            list(client.generate("a red apple"))
        async with AsyncClient(address, retries=0) as client:
            with pytest.raises(StreamIncomplete):
                await client.generate("a red apple").result()


async def test_success_takes_precedence_over_the_status(serve, scripted):
    """A status that fails after the final image does not affect the result."""
    success = v1.Progress(phase=v1.PHASE_SUCCEEDED, image=b"image", image_format=v1.IMAGE_FORMAT_PNG, chunk_count=1)
    servicer = scripted([success], end=lambda context: context.abort(grpc.StatusCode.UNAVAILABLE, "too late"))
    with serve(servicer) as address:
        with Client(address) as client:
            assert client.generate("a red apple").result().data == b"image"
        async with AsyncClient(address) as client:
            assert (await client.generate("a red apple").result()).data == b"image"


async def test_partial_image_and_then_an_error(serve, scripted):
    """A partial image followed by an error is an error."""
    part = v1.Progress(phase=v1.PHASE_SUCCEEDED, image=b"image", chunk_count=2)
    servicer = scripted([part], end=lambda context: context.abort(grpc.StatusCode.INTERNAL, "broken"))
    with serve(servicer) as address, Client(address) as client, pytest.raises(InternalError, match="broken"):
        client.generate("a red apple").result()


def test_other_service_is_unimplemented():
    """A gRPC server that is not Calotype raises Unimplemented."""
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}") as client, pytest.raises(Unimplemented):
        client.model()
    server.stop(None).wait()


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_control_calls_raise_typed_errors(serve, scripted, code):
    """The methods model and cancel convert every status code, in both clients."""
    with serve(scripted(end=lambda context: context.abort(code, "because"))) as address:
        with Client(address) as client:
            for use in (client.model, lambda: client.cancel("x")):
                with pytest.raises(CalotypeError) as caught:
                    use()
                assert (caught.value.code, caught.value.message) == (code.name, "because")
        async with AsyncClient(address) as client:
            for use in (client.model, lambda: client.cancel("x")):
                with pytest.raises(CalotypeError) as caught:
                    await use()
                assert (caught.value.code, caught.value.message) == (code.name, "because")
