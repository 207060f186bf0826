"""Streams that previews are computed in. The tests of CUDA need a device, and expect the same images as on the CPU."""

import dataclasses

import pytest
import torch

from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.preview.device_stream import CpuStream, device_stream
from calotype_server.types import PreviewMethod, PreviewOptions, PreviewReady
from support.engine import tiny
from support.runs import JOB, STEPS, Run

cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_cpu_has_nothing_to_wait_for():
    """A block measures CPU time, which is known when it has ended."""
    stream = device_stream(torch.device("cpu"))
    assert isinstance(stream, CpuStream)
    with stream.after([stream.record()]) as elapsed:
        assert elapsed.seconds == 0.0
        sum(range(200_000))
    assert elapsed.seconds > 0.0


def test_an_error_in_a_block_is_raised():
    """After an exception in a block the stream is still usable."""
    stream = CpuStream()
    with pytest.raises(ValueError, match="decoding failed"), stream.after([None]):
        raise ValueError("decoding failed")
    with stream.after([None]):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_side_stream_waits_for_recorded_work():
    """A block reads the results of all work that was launched before the recorded event."""
    device = torch.device("cuda", 0)
    stream = device_stream(device)
    values = torch.zeros(1 << 20, device=device)
    torch.cuda._sleep(100_000_000)
    values += 1
    event = stream.record()
    with stream.after([event]) as elapsed:
        total = values.sum()
    assert float(total) == 1 << 20
    assert elapsed.seconds >= 0


@pytest.mark.parametrize("method", [pytest.param(each, marks=cuda) for each in ("head", "full_vae")])
def test_previews_on_cuda_equal_those_of_the_cpu(method, tmp_path):
    """Each preview is the same on both devices, up to rounding."""
    job = dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod(method)))
    shown = {}
    for device in ("cpu", "cuda"):
        pipeline = tiny.build("sd15").to(device)
        engine = build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=tmp_path, threads=1)
        run = Run(engine)
        run.wait_before_each_evaluation(pipeline.unet)
        run(job)
        engine.close()
        shown[device] = {event.step: event.pixels for event in run.events if isinstance(event, PreviewReady)}
    assert STEPS in shown["cuda"]
    for step in shown["cpu"].keys() & shown["cuda"].keys():
        cpu, gpu = (torch.frombuffer(bytearray(shown[each][step].data), dtype=torch.uint8) for each in ("cpu", "cuda"))
        assert float((cpu.float() - gpu.float()).abs().max()) <= 2
