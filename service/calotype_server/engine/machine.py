"""Identifies this machine: the facts that decide how fast a model runs on it."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

__all__ = ["device_of", "machine_facts", "on_device", "select_device"]

_CPU_INFO = Path("/proc/cpuinfo")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Limit that a container runtime sets on CPU time, in cgroup v2."""


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Returns what identifies the hardware that a process may use, as plain values for JSON.

    Args:
        device: Where the model runs. A GPU is included if the model runs on it.
    """
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "cpu_quota": _first_line(_CPU_QUOTA),
        "torch_threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = [properties.name, properties.total_memory, properties.multi_processor_count]
    elif device.type == "xpu":
        card = torch.xpu.get_device_properties(device)
        facts["gpu"] = [card.name, card.total_memory, card.gpu_eu_count]
    elif device.type == "mps":
        facts["gpu"] = ["mps", torch.mps.recommended_max_memory()]
    return facts


def device_of(module: Any) -> torch.device:
    """Returns the device that a module computes on: that of its weights; the CPU if it has none.

    Offloaded weights are on the CPU, and hooks move them to the device for each call; see `loading.offload`.
    """
    if not isinstance(module, torch.nn.Module):
        return torch.device("cpu")
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        group = getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).get("group_offloading")
        if device is None and group is not None:
            device = group.config.onload_device
        if device is not None:
            return torch.device(device)
    parameter = next(iter(module.parameters()), None)
    return torch.device("cpu") if parameter is None else parameter.device


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Returns a block in which a device is the current one; the block of a CPU or of Metal does nothing."""
    if device.type not in ("cuda", "xpu"):
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = getattr(torch, device.type).device(device)
    return context


def select_device(device: torch.device) -> None:
    """Selects a device for the calling thread; a new thread uses the first one. Does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _cpu_model() -> str:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    """Number of cores that this process may run on; None where the system cannot restrict that."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
