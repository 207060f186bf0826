"""The parts of `make bench-gpu` that use a CUDA device, with stand-ins that record their calls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import kernels
from benchmarks.gpu.host import Host

CUDA = torch.device("cuda:1")


class Recorded:
    """Stands in for the functions of `torch.cuda` that the benchmark uses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        note = self.calls.append

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                note("record")

            def synchronize(self) -> None:
                note("wait for event")

            def elapsed_time(self, end: Event) -> float:
                return 30.0

        class Device:
            def __init__(self, device: torch.device) -> None:
                note(f"on {device}")

            def __enter__(self) -> None: ...

            def __exit__(self, *_: object) -> None: ...

        stands_in = {
            "Event": Event,
            "device": Device,
            "_sleep": lambda cycles: note("sleep" if isinstance(cycles, int) and cycles >= 0 else "bad"),
            "synchronize": lambda device: note(f"synchronize {device}"),
            "empty_cache": lambda: note("empty cache"),
            "mem_get_info": lambda _: (10 * 2**30, 80 * 2**30),
        }
        for name, each in stands_in.items():
            monkeypatch.setattr(torch.cuda, name, each)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The stand-ins."""
    return Recorded(monkeypatch)


def test_device_time_excludes_the_time_to_launch(recorded: Recorded) -> None:
    """The device sleeps while Python launches the timed call, on the model's own device."""
    found = kernels._launch_once(lambda: recorded.calls.append("call"), CUDA)
    assert recorded.calls == [
        "synchronize cuda:1",
        "call",
        "synchronize cuda:1",
        "on cuda:1",
        "sleep",
        "record",
        "call",
        "record",
        "wait for event",
    ]
    assert found["device_ms"] == 0.03  # In seconds until `launch` converts all of them.
    assert 0 <= found["launch_ms"] <= found["call_ms"]


def test_memory_is_occupied_and_released(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """All memory but the wanted rest is occupied, in one block, and `release` frees it."""
    blocks: list[int] = []
    monkeypatch.setattr(torch, "empty", lambda size, **_: blocks.append(size) or object())
    host = Host.__new__(Host)
    host._device, host._ballast, host._hook = CUDA, None, None
    host.occupy(None, 2.0)
    assert blocks == [8 * 2**30]
    assert host._ballast is not None
    host.release()
    assert host._ballast is None
    assert recorded.calls == ["empty cache", "empty cache"]


def test_poisoned_weights_are_restored() -> None:
    """The denoiser answers NaN between `poison` and `cure`, and afterwards exactly as before."""
    module = torch.nn.Linear(2, 2)
    host = Host.__new__(Host)
    host._device, host._cured = torch.device("cpu"), None
    host.pipeline = SimpleNamespace(unet=module, components={"unet": module})
    before = module(torch.ones(2))
    host.poison()
    assert module(torch.ones(2)).isnan().all()
    host.cure()
    host.cure()
    assert torch.equal(module(torch.ones(2)), before)
