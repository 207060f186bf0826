"""Serves scripted messages instead of a model on both ports, so that `make bench` can compare the transports.

A request is the script: `step_count` messages of 20 KB, sent every `preview.min_interval` or as fast as they are read.
The number of each message is its creation time (nanoseconds of the monotonic clock). Without steps, the server sends
one message and then nothing. Run as a process; it prints its two addresses.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer
from calotype_server.auth.access import Access
from calotype_server.limits import PortLimits
from calotype_server.transport.grpc.server import NativeServer
from calotype_server.transport.grpc.services import Services
from calotype_server.transport.net.call_limits import CallLimiter
from calotype_server.transport.web.server import WebServer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

MESSAGE_BYTES = 20_000
"""Slightly less than the size of a message."""

_MOST_CALLS = 1000
"""For this machine, which stands for many peers."""

_IMAGE = bytes(MESSAGE_BYTES)


class ScriptedServicer(GenerationServiceServicer):
    """Streams the messages that a request describes."""

    def __init__(self) -> None:
        self._left = pb.ListGenerationsResponse()

    async def Generate(self, request: pb.GenerateRequest, context: object) -> AsyncGenerator[pb.Progress, None]:  # noqa: N802
        """Streams the scripted messages."""
        if not request.step_count:
            yield pb.Progress(phase=pb.PHASE_QUEUED)
            await asyncio.Event().wait()
        interval = request.preview.min_interval.ToNanoseconds() / 1e9
        try:
            for _ in range(request.step_count):
                if interval:
                    await asyncio.sleep(interval)
                yield pb.Progress(phase=pb.PHASE_DENOISING, image=_IMAGE, sequence=time.monotonic_ns())
        except (asyncio.CancelledError, GeneratorExit):
            left = self._left.generations.add(request_id=request.request_id)
            left.create_time.FromNanoseconds(time.monotonic_ns())
            raise

    async def ListGenerations(self, request: object, context: object) -> pb.ListGenerationsResponse:  # noqa: N802
        """Returns the time at which each caller left, on the monotonic clock."""
        return self._left


async def main() -> None:
    """Serves until standard input is closed."""
    services = Services(ScriptedServicer())
    call_limiter = CallLimiter(_MOST_CALLS)
    native = NativeServer(services, Access(), call_limiter=call_limiter)
    web = WebServer(
        "127.0.0.1:0",
        services.add_to,
        Access(),
        is_ready=services.is_serving,
        call_limiter=call_limiter,
        limits=PortLimits(max_connections_per_peer=_MOST_CALLS),
    )
    print(await native.start("127.0.0.1:0"), await web.start(), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.gather(native.stop(0), web.stop(0))


if __name__ == "__main__":
    asyncio.run(main())
