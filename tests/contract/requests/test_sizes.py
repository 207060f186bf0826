"""Sizes that the model does not draw well, over every transport."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import grpc
import httpx
import openai
import pytest
from PIL import Image

from calotype.v1 import calotype_pb2 as pb
from support.engine.fake_engine import FakeEngine
from support.service import running


def engine(*, scales: bool) -> FakeEngine:
    """Returns an engine that draws only 64x64 pixels well."""
    made = FakeEngine()
    made.model = replace(made.model, sizes=((64, 64),), min_pixels=0, scales_other_sizes=scales)
    made.preview_size = (64, 64)
    return made


async def test_another_size_is_scaled(transport: str) -> None:
    """Image and previews have the requested size or shape, and a warning says which size was drawn."""
    fake = engine(scales=True)
    async with running(fake, transport=transport) as service:
        request = pb.GenerateRequest(prompt="a red apple", width_px=120, height_px=90)
        messages = [message async for message in service.stub.Generate(request)]
        model = await service.stub.GetModel(pb.GetModelRequest())
    previews = [message for message in messages if message.image_kind == pb.IMAGE_KIND_PREDICTED]
    assert previews
    assert {(message.width_px, message.height_px) for message in previews} == {(64, 48)}
    final = messages[-1]
    image = Image.open(io.BytesIO(final.image))
    assert (final.width_px, final.height_px) == image.size == (120, 90)
    assert "Size: 64x64, Scaled to: 120x90" in image.info["parameters"]
    assert [(warning.reason, "draws 64x64" in warning.message) for warning in final.warnings] == [("SIZE_SCALED", True)]
    assert [(job.width, job.height) for job in fake.jobs[-1:]] == [(64, 64)]
    assert model.scales_other_sizes


async def test_another_size_is_rejected_by_default(transport: str) -> None:
    """The error names the supported sizes, which `GetModel` lists."""
    async with running(engine(scales=False), transport=transport) as service:
        model = await service.stub.GetModel(pb.GetModelRequest())
        assert [(size.width_px, size.height_px) for size in model.sizes] == [(64, 64)]
        assert (model.min_pixels, model.max_pixels) == (0, 64 * 64)
        with pytest.raises(grpc.aio.AioRpcError, match="the only supported size is 64x64"):
            await service.stub.Generate(pb.GenerateRequest(prompt="a", width_px=120)).read()


async def test_openai() -> None:
    """The default size of OpenAI's clients is rejected with the model's sizes, or scaled; `/v1/models` lists them."""
    for scales in (False, True):
        async with (
            running(engine(scales=scales), transport="sse") as service,
            openai.AsyncOpenAI(base_url=f"http://{service.address}/v1", api_key="any", max_retries=0) as sdk,
            httpx.AsyncClient(base_url=f"http://{service.address}") as http,
        ):
            [listed] = (await http.get("/v1/models")).json()["data"]
            assert listed["sizes"] == ["64x64"]
            described = (await http.get("/v1/model")).json()
            assert described["sizes"] == [{"width_px": 64, "height_px": 64}]
            if not scales:
                with pytest.raises(
                    openai.BadRequestError, match=r"size: 1024x1024 is not a size that .* size is 64x64"
                ):
                    await sdk.images.generate(prompt="a red apple", size="1024x1024")
                continue
            answer = await sdk.images.generate(prompt="a red apple", size="1024x1024")
            assert answer.size == "1024x1024"
            assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).size == (1024, 1024)
            stream = await sdk.images.generate(prompt="a red apple", size="1024x1024", stream=True)
            assert [event.size async for event in stream] == ["1024x1024"]
