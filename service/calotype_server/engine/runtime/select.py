"""Selects the runtime that computes the denoiser: `--accelerate`.

An accelerator must give the model's answers. It is compared with plain calls when the model loads; if it differs or
fails, plain calls are used instead.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from calotype_server.engine.memory import is_device_failure
from calotype_server.engine.runtime.check import difference, is_deterministic, joinable
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.engine.runtime.fallback import FallbackRuntime
from calotype_server.errors import AcceleratorUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from calotype_server.engine.requests.sample_calls import Arguments
    from calotype_server.engine.runtime.base import DenoiserRuntime

__all__ = ["Selection", "check_available", "select_runtime"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """The runtime to use.

    Attributes:
        runtime: Computes the denoiser.
        fallback: Why it is not the requested one, in one sentence; empty if it is.
    """

    runtime: DenoiserRuntime
    fallback: str = ""


def check_available(accelerate: str, device: torch.device) -> None:
    """Checks that an accelerator can be used on this machine, without loading it.

    Args:
        accelerate: Value of `--accelerate`.
        device: Where the model runs.

    Raises:
        AcceleratorUnavailable: A device, a package or a compiler is missing. The message names the remedy.
    """
    if problem := _problem(accelerate, device):
        raise AcceleratorUnavailable(f"--accelerate {accelerate} {problem}, or start without it.")


def select_runtime(
    accelerate: str,
    module: Any,
    calls: Sequence[Arguments],
    *,
    exact_rows: int,
    max_rows: int,
    cache_dir: Path,
    on_fallback: Callable[[], None] = lambda: None,
) -> Selection:
    """Returns a runtime, started and compared with plain calls. Call it in the device thread.

    Args:
        accelerate: Name of the accelerator.
        module: The denoiser.
        calls: Arguments of real calls; see `sample_calls`.
        exact_rows: Rows of every batch of a deterministic server, or else 0.
        max_rows: Most rows that may be computed together.
        cache_dir: Folder of all caches.
        on_fallback: Called by the device thread when the accelerator fails later. It must not block.
    """
    eager = EagerRuntime(module, exact=bool(exact_rows))
    eager.start()
    try:
        runtime = _make(accelerate, module, exact=bool(exact_rows), max_rows=max_rows, cache_dir=cache_dir)
        runtime.start()
        reason = _reason_against(runtime, eager, calls, exact_rows)
        if reason is not None:
            runtime.clear()
    except Exception as error:
        if is_device_failure(error):
            raise
        _log.warning("the accelerator cannot be used", accelerator=accelerate, exc_info=error)
        return Selection(eager, f"The accelerator {accelerate} cannot compute this model.")
    if reason is not None:
        _log.warning("the accelerator is not used", accelerator=accelerate, reason=reason)
        return Selection(eager, reason)
    return Selection(FallbackRuntime(runtime, eager, on_fallback))


def _problem(accelerate: str, device: torch.device) -> str | None:
    """Returns what the accelerator needs and how to get it, as the end of a sentence; None if nothing is missing."""
    if accelerate == "graphs" and device.type != "cuda":
        return f"needs a CUDA device, and the model is on {device}. Choose a GPU with --device"
    if accelerate == "openvino":
        if device.type != "cpu":
            return f"computes on the CPU, and the model is on {device}. Choose --device cpu"
        if importlib.util.find_spec("openvino") is None:
            return "needs a package: pip install 'calotype[openvino]'. Install it"
    if accelerate == "compile":
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            return "needs a package: pip install triton. Install it"
        names = (
            [os.environ.get("CXX"), "g++", "clang++"] if device.type == "cpu" else [os.environ.get("CC"), "gcc", "cc"]
        )
        if not any(name and shutil.which(name) for name in names):
            language = "C++" if device.type == "cpu" else "C"
            return f"needs a {language} compiler, such as {names[1]}. Install one"
    return None


def _make(accelerate: str, module: Any, *, exact: bool, max_rows: int, cache_dir: Path) -> DenoiserRuntime:
    """Creates a runtime. Its libraries are imported here, because they take seconds or are not installed."""
    if accelerate == "graphs":
        from calotype_server.engine.runtime.graphs import GraphsRuntime

        return GraphsRuntime(module, exact=exact, max_rows=max_rows)
    if accelerate == "compile":
        from calotype_server.engine.runtime.compiled import CompiledRuntime

        return CompiledRuntime(module, exact=exact, cache_dir=cache_dir)
    if accelerate == "openvino":
        from calotype_server.engine.runtime.openvino import OpenVinoRuntime

        return OpenVinoRuntime(module, exact=exact, cache_dir=cache_dir)
    raise ValueError(f"no accelerator {accelerate!r}")


def _reason_against(
    runtime: DenoiserRuntime, eager: DenoiserRuntime, calls: Sequence[Arguments], exact_rows: int
) -> str | None:
    reason = difference(runtime, eager, calls)
    if reason is None and exact_rows:
        group = joinable(runtime, calls)
        # A model that cannot be joined is deterministic: its calls always run alone.
        if len(group) > 1 and is_deterministic(eager, group, exact_rows) > is_deterministic(runtime, group, exact_rows):
            return "The last bits of its answers depend on the other rows in the batch."
    return reason
