"""Options for previews and final images, over a real socket."""

from __future__ import annotations

import io
import random
import re
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from grpc_status import rpc_status
from PIL import Image

from calotype.v1 import calotype_pb2 as pb
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.limits import Limits
from calotype_server.types import Pixels, PreviewMethod
from support.checker import guarded
from support.engine import tiny
from support.engine.fake_engine import FakeEngine
from support.engine.schedulers import schedulers_examined_once
from support.service import LIMITS, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.service import Service

STEPS = 9


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder, so that the tiny SD1.5 is calibrated only once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
async def tiny_service(heads: Path) -> AsyncIterator[Service]:
    """A server with a real engine and tiny weights."""
    with schedulers_examined_once():
        engine = build_engine("tiny", tiny.build("sd15"), defaults=Defaults(), cache_dir=heads, threads=1)
    async with running(engine) as service:
        yield service


def request(output: pb.OutputOptions | None = None, **preview: Any) -> pb.GenerateRequest:
    """Returns a request for a small image with these preview options."""
    return pb.GenerateRequest(
        prompt="a red äpple", seed=7, step_count=STEPS, preview=pb.PreviewOptions(**preview), output=output
    )


async def messages(service: Service, wanted: pb.GenerateRequest) -> list[pb.Progress]:
    """Returns all messages of a call."""
    return [message async for message in service.stub.Generate(wanted)]


def previews(stream: list[pb.Progress]) -> list[pb.Progress]:
    """Returns the messages that have a preview."""
    return [message for message in stream if message.image_kind == pb.IMAGE_KIND_PREDICTED]


@pytest.mark.parametrize("method", [pb.PREVIEW_METHOD_HEAD, pb.PREVIEW_METHOD_FULL_VAE])
async def test_all_preview_options_apply_together(tiny_service: Service, method: pb.PreviewMethod.ValueType) -> None:
    """At most every fourth step and the last, 40 pixels wide, by the requested method; dropped previews are counted."""
    stream = await messages(tiny_service, request(every_steps=4, max_edge_px=40, quality=30, method=method))
    shown = previews(stream)
    steps = [message.image_step for message in shown]
    assert set(steps) <= {4, 8, 9}
    assert steps == sorted(steps)
    assert len(shown) + stream[-1].previews_dropped == 3
    for message in shown:
        assert message.preview_method == method
        assert (message.image_format, message.width_px, message.height_px) == (pb.IMAGE_FORMAT_JPEG, 40, 40)
        assert Image.open(io.BytesIO(message.image)).size == (40, 40)
    assert stream[-1].phase == pb.PHASE_SUCCEEDED
    assert stream[-1].preview_method == pb.PREVIEW_METHOD_UNSPECIFIED


async def test_a_long_interval_allows_the_first_and_last_preview(tiny_service: Service) -> None:
    """With a minute between previews, a generation of one second has only the first and the last."""
    stream = await messages(tiny_service, request(min_interval=Duration(seconds=60), method=pb.PREVIEW_METHOD_HEAD))
    assert {message.image_step for message in previews(stream)} <= {1, STEPS}
    assert len(previews(stream)) + stream[-1].previews_dropped == 2


async def test_method_none_streams_progress_without_previews(tiny_service: Service) -> None:
    """The final image still arrives, and no preview counts as dropped."""
    stream = await messages(tiny_service, request(method=pb.PREVIEW_METHOD_NONE))
    assert previews(stream) == []
    assert (stream[-1].phase, stream[-1].previews_dropped) == (pb.PHASE_SUCCEEDED, 0)
    assert stream[-1].image


async def test_previews_do_not_change_the_final_image(tiny_service: Service) -> None:
    """The file is the same, byte for byte, with every preview method."""
    methods = (pb.PREVIEW_METHOD_NONE, pb.PREVIEW_METHOD_HEAD, pb.PREVIEW_METHOD_FULL_VAE, pb.PREVIEW_METHOD_AUTO)
    finals = {(await messages(tiny_service, request(method=method)))[-1].image for method in methods}
    assert len(finals) == 1


@pytest.mark.parametrize(
    ("format", "name"),
    [(pb.IMAGE_FORMAT_JPEG, "JPEG"), (pb.IMAGE_FORMAT_PNG, "PNG"), (pb.IMAGE_FORMAT_WEBP, "WEBP")],
)
async def test_the_final_image_has_the_requested_format_and_metadata(
    tiny_service: Service,
    format: pb.ImageFormat.ValueType,  # noqa: A002
    name: str,
) -> None:
    """With metadata, the file contains the parameters of the generation; without it, the field is empty."""
    found = []
    for metadata in (True, False):
        options = pb.OutputOptions(format=format, metadata=metadata)
        last = (await messages(tiny_service, request(options, method=pb.PREVIEW_METHOD_NONE)))[-1]
        image: Any = Image.open(io.BytesIO(last.image))
        image.load()
        assert (last.image_format, image.format) == (format, name)
        if name == "PNG":
            found.append(image.text.get("parameters", ""))
        else:
            found.append(image.getexif().get_ifd(0x8769).get(0x9286, b"")[8:].decode("utf-16-be"))
    assert found[0].startswith("a red äpple\n")
    assert re.search(r"Steps: 9, Sampler: DDIMScheduler, .*Seed: 7, Size: 64x64, Model: tiny, Version: ", found[0])
    assert found[1] == ""


async def test_all_options_out_of_range_are_reported_together(tiny_service: Service) -> None:
    """One error lists the invalid preview options and output options."""
    wanted = request(pb.OutputOptions(format=pb.IMAGE_FORMAT_JPEG, quality=99), every_steps=0, quality=96)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await messages(tiny_service, wanted)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (packed,) = (each for each in rpc_status.from_call(caught.value).details if each.Is(BadRequest.DESCRIPTOR))
    fields = [violation.field for violation in BadRequest.FromString(packed.value).field_violations]
    assert fields == ["preview.every_steps", "preview.quality", "output.quality"]


@pytest.mark.parametrize(
    ("method", "allowed", "words"),
    [
        (pb.PREVIEW_METHOD_TINY_VAE, LIMITS.preview_methods, "calotype serve --tiny-vae"),
        (pb.PREVIEW_METHOD_FULL_VAE, frozenset({PreviewMethod.HEAD}), "does not allow"),
    ],
)
async def test_an_unavailable_preview_method_is_rejected(
    method: pb.PreviewMethod.ValueType, allowed: frozenset[PreviewMethod], words: str
) -> None:
    """FAILED_PRECONDITION has a machine-readable reason and an explanation; no generation starts."""
    limits = Limits(LIMITS.max_pixels, LIMITS.max_step_count, LIMITS.max_prompt_chars, preview_methods=allowed)
    engine = FakeEngine()
    async with running(engine, limits=limits) as service:
        with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
            await messages(service, request(method=method))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    (packed,) = rpc_status.from_call(caught.value).details
    info = ErrorInfo.FromString(packed.value)
    assert (info.reason, info.domain) == ("PREVIEW_METHOD_UNAVAILABLE", "calotype")
    assert dict(info.metadata) == {"method": pb.PreviewMethod.Name(method).removeprefix("PREVIEW_METHOD_")}
    assert engine.jobs == []


class NoiseEngine(FakeEngine):
    """Returns random pixels, which no format can compress."""

    pixels = b""

    def run(self, job, report, stop):
        """See `engine.protocol`."""
        super().run(job, report, stop)
        self.pixels = random.Random(0).randbytes(job.pixel_count * 3)
        return Pixels(job.width, job.height, self.pixels)


async def test_a_large_final_image_arrives_in_chunks() -> None:
    """More than 3 MiB reach a client with gRPC's default limit, and the chunks join to the exact image."""
    limits = Limits(max_pixels=2048 * 2048, max_step_count=50, max_prompt_chars=200)
    engine = NoiseEngine()
    async with running(engine, limits=limits) as service:
        wanted = pb.GenerateRequest(prompt="noise", seed=1, width_px=1536, height_px=1024)
        stream = await messages(service, wanted)
    chunks = [message for message in stream if message.image_kind == pb.IMAGE_KIND_FINAL]
    assert [(each.chunk_index, each.chunk_count) for each in chunks] == [(0, 2), (1, 2)]
    assert stream[-2:] == chunks
    assert len({each.sequence for each in chunks}) == 1
    image = Image.open(io.BytesIO(b"".join(each.image for each in chunks)))
    assert image.tobytes() == engine.pixels


@pytest.mark.parametrize(("verdicts", "withheld"), [((False, False), False), ((False, True), True)])
async def test_withdrawn_previews_are_reported(heads: Path, verdicts: tuple[bool, bool], withheld: bool) -> None:
    """After a final objection of the safety checker, the flag stays set, and the typed end and the status report it."""
    engine = build_engine("tiny", guarded(*verdicts), defaults=Defaults(), cache_dir=heads, threads=1)
    stream: list[pb.Progress] = []
    async with running(engine) as service:
        call = service.stub.Generate(request(method=pb.PREVIEW_METHOD_HEAD))
        try:
            async for message in call:
                stream.append(message)
        except grpc.aio.AioRpcError as error:
            assert withheld
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        else:
            assert not withheld
    assert stream[-1].previews_withdrawn == withheld
    assert stream[-1].phase == (pb.PHASE_FAILED if withheld else pb.PHASE_SUCCEEDED)
    assert stream[-1].error.reason == ("CONTENT_WITHHELD" if withheld else "")
    flags = [message.previews_withdrawn for message in stream]
    assert flags == sorted(flags)
    assert not any(message.image for message in stream if message.previews_withdrawn)
    edges = [message.width_px for message in previews(stream) if 2 * message.image_step < STEPS]
    assert all(edge == 24 for edge in edges)
