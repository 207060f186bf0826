"""Memory: larger images than fit are rejected, and images that do not fit beside the running ones wait."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server.types import MemoryModel
from support.engine.fake_engine import FakeEngine
from support.service import read_until, running


def with_memory(pixels: int) -> FakeEngine:
    """Returns an engine with memory for that many pixels."""
    engine = FakeEngine()
    engine.model = replace(engine.model, memory=MemoryModel(pixels, denoising=(1.0, 0.0), decoding=(0.0, 0.0)))
    return engine


def image(width: int) -> pb.GenerateRequest:
    """Returns a request for an image of 64 rows."""
    return pb.GenerateRequest(prompt="a red apple", width_px=width, height_px=64)


async def test_the_reported_maximum_fits_into_memory() -> None:
    """`GetModel` reports the largest image that fits, and a larger one is an invalid request."""
    async with running(with_memory(64 * 128)) as service:
        assert (await service.stub.GetModel(pb.GetModelRequest())).max_pixels == 64 * 128
        with pytest.raises(grpc.aio.AioRpcError, match="the maximum is 8192") as caught:
            await service.stub.Generate(image(192)).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await read_until(service.stub.Generate(image(128)), pb.PHASE_SUCCEEDED)


async def test_an_image_of_the_default_size_is_always_allowed() -> None:
    """The server made one when it started, whatever the measurement says."""
    engine = with_memory(10)
    async with running(engine) as service:
        found = await service.stub.GetModel(pb.GetModelRequest())
        assert found.max_pixels == engine.model.width * engine.model.height
        await read_until(service.stub.Generate(pb.GenerateRequest(prompt="a red apple")), pb.PHASE_SUCCEEDED)


async def test_images_that_do_not_fit_together_run_one_after_the_other() -> None:
    """A second slot is free, but the second large image waits until the first has ended."""
    engine = with_memory(64 * 192)
    engine.hold()
    async with running(engine, max_active=2) as service:
        first = service.stub.Generate(image(128))
        await read_until(first, pb.PHASE_DENOISING)
        second = service.stub.Generate(image(128))
        assert (await second.read()).queue_position == 1
        engine.allow()
        await read_until(first, pb.PHASE_SUCCEEDED)
        await read_until(second, pb.PHASE_SUCCEEDED)
    assert engine.most_active == 1
