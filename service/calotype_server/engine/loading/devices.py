"""Picks the device and the number format of a model."""

from __future__ import annotations

import torch

from calotype_server.errors import ModelUnavailable

__all__ = ["pick_device", "pick_dtype"]


def pick_device(device: str | None) -> torch.device:
    """Returns the requested device, or by default the first device of CUDA, XPU or MPS, or else the CPU.

    Raises:
        ModelUnavailable: There is no such device.
    """
    if device is None:
        # Metal has one device, which has no number.
        for backend, first in ((torch.cuda, "cuda:0"), (torch.xpu, "xpu:0"), (torch.backends.mps, "mps")):
            if backend.is_available():
                return torch.device(first)
        return torch.device("cpu")
    try:
        picked = torch.device(device)
        torch.empty(1, device=picked)
    except (RuntimeError, AssertionError):
        raise ModelUnavailable(f"There is no device {device!r} here; try --device cpu.") from None
    return picked


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Returns the requested number format, or the best one for the device.

    On CUDA and XPU that is bfloat16 if the device computes it, or else float16: emulated bfloat16 is slow. On a CPU and
    on MPS it is float32: both have the same memory, and diffusers' guide for MPS uses no other format.
    """
    if dtype is not None:
        return getattr(torch, dtype)
    if device.type not in ("cuda", "xpu"):
        return torch.float32
    backend = getattr(torch, device.type)
    with backend.device(device):  # The question is about the current device.
        native = backend.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16
