"""The choice of the device and of its number format."""

import pytest
import torch

from calotype_server.engine.loading import pick_device, pick_dtype
from calotype_server.errors import ModelUnavailable

CPU = torch.device("cpu")


class TestDevice:
    """The device and the number format."""

    def test_default_without_cuda(self, monkeypatch):
        """Without CUDA the default is the CPU, in float32."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert pick_device(None) == CPU
        assert pick_dtype(None, CPU) is torch.float32

    def test_default_with_cuda(self, monkeypatch):
        """With CUDA the default is the first device, in bfloat16 if supported, else in float16."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        device = pick_device(None)
        assert device == torch.device("cuda", 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        assert pick_dtype(None, device) is torch.bfloat16
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
        assert pick_dtype(None, device) is torch.float16

    @pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
    def test_given_dtype(self, name):
        """The operator's number format is used on every device."""
        assert pick_dtype(name, CPU) is getattr(torch, name)

    def test_given_device(self):
        """The operator's device is used."""
        assert pick_device("cpu") == CPU

    @pytest.mark.parametrize("name", ["toaster", "cuda:99", "cpu:x", ""])
    def test_a_missing_device_is_rejected(self, name):
        """A missing or invalid device is rejected with advice to use the CPU."""
        with pytest.raises(ModelUnavailable, match="--device cpu"):
            pick_device(name)
