"""The part of `calotype doctor` that says how much memory a model needs, and which settings fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype_server.cli.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calotype_server.engine.sizing import Estimate
    from calotype_server.settings import Settings

__all__ = ["memory_findings"]

_SUBJECT = "memory"


def memory_findings(settings: Settings, device: Any, dtype: Any) -> Iterator[Finding]:
    """Yields a table of estimates for the model; none of its lines fails, because estimates can be wrong.

    Args:
        settings: The operator's settings.
        device: The device that the model would use.
        dtype: The number format that it would use.
    """
    from calotype_server.engine import memory, sizing

    try:
        source = sizing.find_source(settings.model, settings.revision)
        components = [] if source is None else sizing.find_components(source, settings.variant)
    except (OSError, ValueError) as error:
        yield Finding(True, _SUBJECT, f"cannot be estimated: {error}")
        return
    if not components:
        yield Finding(True, _SUBJECT, "cannot be estimated: there are no safetensors files on this machine")
        return
    free = memory.free_memory(device)
    name = str(dtype).removeprefix("torch.")
    known = "unknown" if free is None else _size(free)
    for number, each in enumerate(sizing.estimates(components, device, dtype)):
        if not number:
            yield Finding(
                True, _SUBJECT, f"estimates for one image of {each.edge}x{each.edge}, {known} free on {device}:"
            )
        yield Finding(True, _SUBJECT, _row(each, name, free, settings))
    yield Finding(
        True,
        _SUBJECT,
        "weights are read from the files' headers; denoising and decoding are estimated from the configurations",
    )


def _row(estimate: Estimate, dtype: str, free: int | None, settings: Settings) -> str:
    options = [dtype]
    options += [f"--quantize {estimate.quantize}"] if estimate.quantize else []
    options += [f"--offload {estimate.offload}"] if estimate.offload else []
    chosen = (estimate.quantize, estimate.offload) == (settings.quantize or "", settings.offload or "")
    working = "?" if estimate.working is None else _size(estimate.working)
    fits = "" if free is None else "fits" if estimate.total <= free else "does not fit"
    host = f", {_size(estimate.host)} in ordinary memory" if estimate.host else ""
    mark = "*" if chosen else " "
    return (
        f"{mark} {' '.join(options):42} {_size(estimate.total):>9}  {fits:12}  "
        f"(weights {_size(estimate.weights)}, working {working}{host})"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
