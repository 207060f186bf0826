"""Streams that previews are computed in. The tests of CUDA need a device, and expect the same images as on the CPU."""

import dataclasses

import pytest
import torch

from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.preview import pipeline_tail
from calotype_server.engine.preview.device_stream import (
    CpuStream,
    CudaStream,
    SharedStream,
    call_in_order,
    device_stream,
)
from calotype_server.engine.preview.pipeline_tail import PipelineTail
from calotype_server.types import PreviewMethod, PreviewOptions, PreviewReady
from support.engine import tiny
from support.engine.fake_cuda import FakeCuda
from support.runs import JOB, STEPS, Run

DEVICE = torch.device("cuda", 1)
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


class TestOrder:
    """The order of the work on the streams of a GPU, with a stand-in for the device."""

    @pytest.fixture
    def cuda(self, monkeypatch):
        """The stand-in."""
        return FakeCuda(monkeypatch)

    def test_a_block_ends_when_its_work_is_done(self, cuda):
        """The side stream waits for the step, and the thread waits for the side stream."""
        stream = device_stream(DEVICE)
        launched = stream.record()
        with stream.after([launched, None]) as elapsed:
            cuda.log.append("draw")
        assert cuda.log == [
            ("record", "default", "event 1"),
            ("wait", "side", "event 1"),
            ("record", "side", "event 2"),
            "draw",
            ("record", "side", "event 3"),
            ("synchronize", "event 3"),
        ]
        assert elapsed.seconds == 1.0

    def test_a_block_that_fails_ends_when_its_work_is_done(self, cuda):
        """After an exception too, the thread waits until the side stream no longer reads the step's tensors."""
        with pytest.raises(ValueError, match="decoding failed"), device_stream(DEVICE).after([None]):
            raise ValueError("decoding failed")
        assert cuda.log[-2:] == [("record", "side", "event 2"), ("synchronize", "event 2")]

    def test_a_cost_is_measured_without_gaps(self, cuda):
        """The device spins before the measured run, so that all its kernels are launched before the first starts."""
        assert CudaStream(DEVICE).cost(lambda: cuda.log.append("draw")) == 1.0
        measured = cuda.log[cuda.log.index(("spin", "side")) :]
        assert [each if each == "draw" else each[0] for each in measured] == [
            "spin",
            "record",
            "draw",
            "record",
            "synchronize",
        ]
        assert cuda.log.count("draw") == 3

    def test_a_cost_without_torchs_internal_function(self, cuda, monkeypatch):
        """A torch that cannot spin measures all the same: otherwise the decoder would not be offered."""
        monkeypatch.delattr(torch.cuda, "_sleep")
        assert CudaStream(DEVICE).cost(lambda: cuda.log.append("draw")) == 1.0
        assert cuda.log.count("draw") == 3

    def test_a_lap_is_measured_on_the_device(self, cuda):
        """The lap of a thread lasts from event to event on its own stream, whatever the number of CPU threads."""
        lap = device_stream(DEVICE).lap()
        lap.stop()
        assert lap.device_seconds() == lap.computing_seconds(16) == 1.0
        assert [each[:2] for each in cuda.log] == [("record", "default")] * 2

    def test_another_threads_work_is_in_order(self, cuda):
        """Arguments are computed before the device thread reads them, and the side stream waits for the answer."""
        with torch.cuda.stream(CudaStream(DEVICE)._stream):
            answer = call_in_order(DEVICE, lambda: cuda.log.append("denoise") or 5)
        assert answer == 5
        assert cuda.log == [("synchronize", "side"), "denoise", ("wait", "side", "default")]

    def test_the_own_stream_needs_no_order(self, cuda):
        """On the default stream, and on a CPU, nothing waits."""
        assert [call_in_order(each, lambda: 5) for each in (DEVICE, torch.device("cpu"))] == [5, 5]
        assert cuda.log == []

    def test_tails_call_the_denoiser_in_order(self, cuda, monkeypatch):
        """A decoder on the side stream that asks the device thread for a shape is in order with it."""
        pipeline = tiny.build("sd15")
        tail = PipelineTail(pipeline)
        monkeypatch.setattr(pipeline_tail, "device_of", lambda _: DEVICE)
        with torch.cuda.stream(CudaStream(DEVICE)._stream):
            tail.shape(32, 32)
        # Once for the text encoder, and once for the denoiser.
        assert cuda.log == [("synchronize", "side"), ("wait", "side", "default")] * 2


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_other_gpus_share_the_denoisers_stream(kind, monkeypatch):
    """On XPU and MPS, a block ends when the device has computed everything, also after an exception."""
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    stream = device_stream(torch.device(kind))
    assert isinstance(stream, SharedStream)
    with pytest.raises(ValueError, match="decoding failed"), stream.after([stream.record()]):
        raise ValueError("decoding failed")
    assert waited == [torch.device(kind)]
    assert stream.cost(lambda: None) >= 0
    assert len(waited) == 3
    lap = stream.lap()
    lap.stop()
    assert len(waited) == 4
    assert lap.computing_seconds(16) == lap.computing_seconds(1) > 0


def test_a_cpu_counts_all_its_threads():
    """On a CPU a lap lasts until it is stopped, and costs the time of all threads."""
    lap = CpuStream().lap()
    lap.stop()
    assert lap.computing_seconds(4) == 4 * lap.computing_seconds(1) > 0
    assert lap.device_seconds() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_failed_block_leaves_nothing_on_the_device():
    """When a block ends with an exception, the side stream has computed all that the block launched."""
    stream = CudaStream(torch.device("cuda", 0))
    with pytest.raises(ValueError, match="decoding failed"), stream.after([]):
        torch.cuda._sleep(100_000_000)
        raise ValueError("decoding failed")
    assert stream._stream.query()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_thread_reads_arguments_of_the_side_stream():
    """Arguments that the side stream computes slowly are right on the default stream, and so is the answer."""
    device = torch.device("cuda", 0)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        torch.cuda._sleep(100_000_000)
        argument = torch.ones(1 << 20, device=device)

        def call():
            with torch.cuda.stream(torch.cuda.default_stream(device)):
                torch.cuda._sleep(100_000_000)
                return 2 * argument

        answer = call_in_order(device, call)
        assert float(answer.sum()) == 2 << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cost_has_no_gaps_between_kernels():
    """A hundred tiny kernels cost less in a row than when Python launches them one by one."""
    device = torch.device("cuda", 0)
    stream, values = CudaStream(device), torch.zeros(16, device=device)

    def work():
        for _ in range(100):
            values.add_(1)

    cost = stream.cost(work)
    with stream.after([]) as elapsed:
        work()
    assert 0 < cost <= elapsed.seconds


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


def previews_on(device, method, cache_dir):
    """Returns the pixels of all previews of a run, by step."""
    job = dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod(method)))
    pipeline = tiny.build("sd15").to(device)
    # The head that the second engine loads must be the calibrated one that the first engine used. An engine that is not
    # deterministic would improve it with its final image.
    engine = build_engine(
        "tiny", pipeline, defaults=Defaults(), cache_dir=cache_dir, threads=1, max_active=1, deterministic=True
    )
    run = Run(engine)
    with run.with_every_preview():
        run(job)
    engine.close()
    return {event.step: event.pixels for event in run.events if isinstance(event, PreviewReady)}


@pytest.mark.parametrize(
    ("device", "method"),
    [("cpu", "head"), *(pytest.param("cuda", method, marks=cuda) for method in ("head", "full_vae"))],
)
def test_previews_equal_those_of_the_cpu(device, method, tmp_path):
    """Each preview is the same on every device, up to rounding, and in every run with the same head."""
    expected, shown = (previews_on(each, method, tmp_path) for each in ("cpu", device))
    assert STEPS in shown
    for step in expected.keys() & shown.keys():
        first, second = (torch.frombuffer(bytearray(each[step].data), dtype=torch.uint8) for each in (expected, shown))
        assert float((first.float() - second.float()).abs().max()) <= 2
