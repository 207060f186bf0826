"""Memory: the limit of this process, and how much a generation needs."""

import ctypes
import os
import platform
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calotype_server.engine import loading, memory, memory_need
from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.memory import free_memory, peak_memory
from calotype_server.engine.memory_need import extrapolation, memory_model
from calotype_server.types import MemoryModel
from support.engine import tiny

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Returns a function that sets the control groups of this process: the content of its list, and files."""

    def set_up(lines, files):
        for name, text in files.items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(text)
        (tmp_path / "own").write_text(lines)
        (tmp_path / "statm").write_text(f"9999999 {100 * MIB // os.sysconf('SC_PAGE_SIZE')} 0 0 0 0 0")
        monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "fs")
        monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
        monkeypatch.setattr(memory, "_STATM", tmp_path / "statm")

    return set_up


@pytest.mark.parametrize(
    ("lines", "files"),
    [
        ("0::/\n", {"memory.max": f"{300 * MIB}\n"}),
        ("0::/pod/app\n", {"pod/app/memory.max": "max\n", "pod/memory.max": f"{300 * MIB}\n"}),
        ("0::/pod/app\n", {"pod/app/memory.max": f"{300 * MIB}\n", "pod/memory.max": f"{400 * MIB}\n"}),
        ("4:memory:/docker/1\n3:cpu:/\n", {"memory/memory.limit_in_bytes": f"{300 * MIB}\n"}),
    ],
)
def test_the_smallest_limit_of_the_control_groups_counts(cgroups, lines, files):
    """In a container of 300 MiB, a process that uses 100 MiB has 200 MiB left, in both versions of control groups."""
    cgroups(lines, files)
    assert free_memory(CPU) == 200 * MIB


def test_without_a_limit_the_physical_memory_counts(cgroups):
    """No control group, or one without a limit, leaves the memory of the machine."""
    cgroups("0::/\n", {"memory.max": "max\n"})
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert free_memory(CPU) == physical - 100 * MIB


def test_the_memory_of_other_devices_is_unknown():
    """There is no limit for devices that do not say how much memory is free."""
    assert free_memory(torch.device("mps")) is None


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_cached_memory_of_a_gpu_is_free(kind, monkeypatch):
    """On CUDA and XPU, memory that torch has cached for the selected device is free in addition to the device's."""
    device = torch.device(kind, 1)
    for name, value in (("mem_get_info", (500, 900)), ("memory_reserved", 300), ("memory_allocated", 200)):
        monkeypatch.setattr(getattr(torch, kind), name, {device: value}.__getitem__)
    assert free_memory(device) == 600


def test_a_driver_may_not_know_the_free_memory(monkeypatch):
    """If a driver of XPU cannot report the free memory, it is unknown; an error of CUDA is raised."""

    def fail(device):
        raise RuntimeError("The device doesn't support querying the available free memory.")

    monkeypatch.setattr(torch.xpu, "mem_get_info", fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert free_memory(torch.device("xpu", 0)) is None
    with pytest.raises(RuntimeError):
        free_memory(torch.device("cuda", 0))


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_peak_of_a_gpu_is_what_torch_counts(kind, monkeypatch):
    """On CUDA and XPU, the peak is that of the selected device, after all its work is done."""
    device, calls = torch.device(kind, 1), list[Any]()
    for name, value in (("memory_allocated", 200), ("max_memory_allocated", 700)):
        monkeypatch.setattr(getattr(torch, kind), name, {device: value}.__getitem__)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(getattr(torch, kind), name, lambda at, name=name: calls.append((name, at)))
    assert peak_memory(lambda: calls.append("call"), device) == 500
    waited = ("synchronize", device)
    assert calls == [waited, ("reset_peak_memory_stats", device), "call", waited]


def test_the_peak_counts_tensors_that_exist_at_the_same_time():
    """A freed tensor does not count, nor do views, results in place, and tensors that existed before."""
    weight = torch.zeros(1000)

    def call():
        first = torch.zeros(1000)
        second = first + weight.view(10, 100).flatten()
        del first
        second.mul_(2)
        return second.view(10, 100) + 1

    assert peak_memory(call, CPU) == 8000


def test_a_quadratic_part_is_extrapolated():
    """Measurements of 10 x + 0.5 x² give that need with a margin of a half; a constant part does not make it shrink."""
    linear, square = extrapolation([(4, 48), (16, 288)])
    assert (linear, square) == pytest.approx((15.0, 0.75))
    assert extrapolation([(4, 1000), (16, 1600)]) == pytest.approx((150.0, 0.0))
    assert extrapolation([(16, 160)]) == pytest.approx((15.0, 0.0))


def test_the_largest_image_just_fits():
    """The largest image needs at most the available memory, and one pixel more needs more."""
    for model in (MemoryModel(10_000, (2.0, 0.0), (3.0, 0.0)), MemoryModel(10_000, (2.0, 0.01), (3.0, 0.002))):
        assert model.need([model.max_pixels]) <= 10_000 < model.need([model.max_pixels + 1])


def test_generations_decode_one_after_the_other():
    """Only the largest image counts with the memory for decoding."""
    assert MemoryModel(0, (1.0, 0.0), (10.0, 0.0)).need([100, 50]) == 150 + 1000


class TestOfAPipeline:
    """The need of a small pipeline."""

    @pytest.fixture
    def pipeline(self):
        return tiny.shared("sd15")

    @pytest.fixture
    def model(self, pipeline):
        return describe("tiny", pipeline, Defaults())

    def test_a_measurement_is_cached(self, pipeline, model, tmp_path, monkeypatch):
        """The second start with a model reads the file instead of measuring."""
        first = memory_model(pipeline, model, cache_dir=tmp_path, limit=MIB)
        monkeypatch.setattr(memory_need, "_measure", lambda *_: pytest.fail("it measured again"))
        assert memory_model(pipeline, model, cache_dir=tmp_path, limit=MIB) == first
        assert min(first.denoising[0], first.decoding[0]) > 0

    def test_the_need_covers_the_measured_peak_of_a_larger_image(self, pipeline, model, tmp_path):
        """An image with four times the pixels of the default needs no more than the extrapolation."""
        found = memory_model(pipeline, model, cache_dir=tmp_path, limit=MIB)
        large = replace(model, width=2 * model.width, height=2 * model.height)
        peak = peak_memory(memory_need._generation(pipeline, large), CPU)
        assert peak < found.need([large.width * large.height])

    def test_the_free_memory_is_the_default_limit(self, pipeline, model, tmp_path, monkeypatch):
        """The headroom and the bytes that are reserved for other purposes are left free. 0 turns the limit off."""
        monkeypatch.setattr(memory_need, "free_memory", lambda _: 1000 * MIB)
        found = memory_model(pipeline, model, cache_dir=tmp_path, reserved=44 * MIB)
        assert found.available == 700 * MIB
        assert memory_model(pipeline, model, cache_dir=tmp_path, limit=0) is None

    def test_a_pipeline_that_cannot_be_measured_has_no_limit(self, pipeline, model, tmp_path, monkeypatch):
        """The error is logged, and the server starts."""
        monkeypatch.setattr(memory_need, "_measure", lambda *_: 1 / 0)
        assert memory_model(pipeline, model, cache_dir=tmp_path, limit=MIB) is None


@pytest.mark.slow
def test_the_documented_need_of_the_bundled_model_is_the_measured_one(tmp_path):
    """The figures in service/SIZING.md, which the manifests rely on, are within 5 % of a new measurement."""
    pipeline = loading.load_pipeline(loading.LoadOptions(model="bundled"))
    model = describe("bundled", pipeline, Defaults())
    found = memory_model(pipeline, model, cache_dir=tmp_path, limit=MIB)
    assert (found.denoising[0], found.decoding[0]) == pytest.approx((168, 883), rel=0.05)
    assert (found.denoising[1], found.decoding[1]) == (0.0, 0.0)


def test_large_blocks_are_returned_unless_the_operator_decides(monkeypatch):
    """The threshold of glibc is set once, and not if the environment sets it."""
    calls = []
    libc = SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    memory.return_large_blocks()
    assert calls == []
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    memory.return_large_blocks()
    assert calls == [(-3, 4 * MIB)]
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    memory.return_large_blocks()
    assert len(calls) == 1
