"""The choice of the device and of its number format."""

import contextlib

import pytest
import torch

from calotype_server.engine.loading import pick_device, pick_dtype
from calotype_server.errors import ModelUnavailable

CPU = torch.device("cpu")


class TestDevice:
    """The device and the number format."""

    @pytest.mark.parametrize(
        ("available", "expected"),
        [
            (("cuda", "xpu", "mps"), "cuda:0"),
            (("xpu", "mps"), "xpu:0"),
            (("mps",), "mps"),
            ((), "cpu"),
        ],
    )
    def test_default(self, available, expected, monkeypatch):
        """The default is the first device of CUDA, XPU or MPS, in this order, or else the CPU."""
        for backend, name in ((torch.cuda, "cuda"), (torch.xpu, "xpu"), (torch.backends.mps, "mps")):
            monkeypatch.setattr(backend, "is_available", lambda name=name: name in available)
        assert pick_device(None) == torch.device(expected)

    @pytest.mark.parametrize("kind", ["cuda", "xpu"])
    @pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
    def test_default_dtype(self, kind, native, expected, monkeypatch):
        """The default on CUDA and XPU is bfloat16 if the selected device computes it itself, or else float16."""
        current = []

        @contextlib.contextmanager
        def select(device):
            current.append(device)
            yield
            current.pop()

        def is_bf16_supported(including_emulation=True):
            assert current == [torch.device(kind, 1)]
            return native or including_emulation

        backend = getattr(torch, kind)
        monkeypatch.setattr(backend, "device", select)
        monkeypatch.setattr(backend, "is_bf16_supported", is_bf16_supported)
        assert pick_dtype(None, torch.device(kind, 1)) is expected

    @pytest.mark.parametrize("device", ["cpu", "mps"])
    def test_default_dtype_of_shared_memory(self, device):
        """The default on a CPU and on MPS is float32."""
        assert pick_dtype(None, torch.device(device)) is torch.float32

    @pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
    def test_given_dtype(self, name):
        """The operator's number format is used on every device."""
        assert pick_dtype(name, CPU) is getattr(torch, name)

    def test_given_device(self):
        """The operator's device is used."""
        assert pick_device("cpu") == CPU

    @pytest.mark.parametrize("name", ["toaster", "cuda:99", "xpu:99", "cpu:x", ""])
    def test_a_missing_device_is_rejected(self, name):
        """A missing or invalid device is rejected with advice to use the CPU."""
        with pytest.raises(ModelUnavailable, match="--device cpu"):
            pick_device(name)
