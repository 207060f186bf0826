"""A real grpc.aio server on a free port, around any engine."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from calotype_server.admission import Admission
from calotype_server.encode import Encoder
from calotype_server.estimates import Pace
from calotype_server.generations import Generations
from calotype_server.transport.native import NativeServer
from calotype_server.transport.servicer import GenerationServicer
from calotype_server.types import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from calotype_server.engine.protocol import Engine

LIMITS = Limits(max_pixels=256 * 256, max_step_count=50, max_prompt_chars=200)


@dataclass
class Service:
    """What a test may look at or pull."""

    address: str
    stub: GenerationServiceStub
    generations: Generations
    server: NativeServer
    dead: list[bool]


@contextlib.asynccontextmanager
async def running(
    engine: Engine, *, max_queue: int = 4, max_active: int = 1, opened: bool = True, limits: Limits = LIMITS
) -> AsyncIterator[Service]:
    """Serves `engine` while the block runs."""
    pace, dead = Pace(), []
    admission = Admission(pace, max_active=max_active, max_queue=max_queue)
    encoder = Encoder()
    generations = Generations(
        engine, admission, pace, encoder, max_active=max_active, on_dead=lambda: dead.append(True)
    )
    servicer = GenerationServicer(limits)
    if opened:
        servicer.open(generations)
    server = NativeServer(servicer)
    address = await server.start("127.0.0.1:0")
    await server.set_serving(opened)
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield Service(address, GenerationServiceStub(channel), generations, server, dead)
    finally:
        engine.close()
        await generations.end_all()
        await server.stop(None)
        generations.close()
        encoder.close()


async def read_until(call, phase: pb.Phase.ValueType) -> pb.Progress:
    """Reads messages up to the first in `phase`."""
    while (message := await call.read()) is not grpc.aio.EOF:
        if message.phase == phase:
            return message
    raise AssertionError(f"the stream ended before {pb.Phase.Name(phase)}")
