"""The measurements of correctness, memory and faults: one function for each section."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.gpu import watching
from benchmarks.gpu.session import Bench, Session

__all__ = ["devices", "memory", "nan", "out_of_memory", "same_image"]

Figures = dict[str, Any]

_SEED = 100


def same_image(bench: Bench) -> Figures:
    """The same seed: without the product, without and with previews, alone and among four."""
    address = bench.shared()
    silent = bench.stream(address, seed=_SEED).pixels()
    figures: Figures = {}

    def compare(name: str, pixels: bytes) -> None:
        decibels, levels = watching.psnr_and_levels(pixels, silent)
        figures[f"same_{name}_levels"], figures[f"same_{name}_psnr"] = levels, decibels

    compare("bare", bench.session("picture", bench.case, seed=_SEED))
    compare("again", bench.stream(address, seed=_SEED).pixels())
    for method in ("head", "full_vae"):
        compare(method, bench.stream(address, seed=_SEED, method=method).pixels())
    four = watching.together(address, bench.case, [{"seed": _SEED}, *({"seed": each} for each in (1, 2, 3))])
    _raise_for(four)
    compare("among_four", four[0].pixels())
    return figures


def devices(bench: Bench) -> Figures:
    """The bundled model in float32: the server's device compared with the CPU."""
    pictures = []
    for device in ("cpu", bench.device):
        with Session("bundled", bench.folder, toy=False, device=device, dtype="float32") as session:
            session.start(bench.case)
            pictures.append([session("picture", bench.case, seed=seed) for seed in (1, 2)])
    compared = [watching.psnr_and_levels(ours, theirs) for theirs, ours in zip(*pictures, strict=True)]
    return {
        "device_over_cpu_levels": max(levels for _, levels in compared),
        "device_over_cpu_psnr": min(decibels for decibels, _ in compared),
    }


def memory(bench: Bench) -> Figures:
    """The peak of the allocated memory, with one user and with eight. On a CPU it is that of the process."""
    address = bench.shared()
    figures: Figures = {"weights_gib": bench.session("reset_peak")}
    for users in (1, 8):
        bench.session("reset_peak")
        _raise_for(watching.together(address, bench.case, [{"seed": each, "method": "auto"} for each in range(users)]))
        figures[f"peak_{users}_gib"] = bench.session("peak_gib")
    return figures


def nan(bench: Bench) -> Figures:
    """The denoiser answers NaN for a while: that request fails with its reason, and the next one succeeds."""
    address = bench.shared()
    bench.session("poison")
    try:
        [failed] = watching.together(address, bench.case, [{"method": "head"}])
    finally:
        bench.session("cure")
    [following] = watching.together(address, bench.case, [{"method": "head"}])
    return {
        "nan_reason": failed.reason or "no error",
        "nan_fails_after_steps": failed.finished / bench.step_seconds,
        "nan_next_succeeds": int(not following.reason),
    }


def out_of_memory(bench: Bench) -> Figures:
    """A request for a huge image in little memory fails with its reason, while another user continues."""
    session, case = bench.session, bench.case
    huge = min(2048, 16 * case.size)
    # Without admission by memory, so that the request reaches the device.
    with bench.opened("unlimited", memory_limit=0) as server:
        address = server["address"]
        before = session("reset_peak")
        alone = statistics.median(bench.stream(address, seed=each).finished for each in range(max(2, bench.rounds)))
        session("occupy", case, leave_gib=1.3 * (session("peak_gib") - before) + 0.5)
        try:
            failed, other = watching.together(
                address, case, [{"width": huge, "height": huge, "steps": 3, "method": "auto"}, {"seed": 2}]
            )
        finally:
            session("release")
        [following] = watching.together(address, case, [{"seed": 3}])
    return {
        "oom_reason": failed.reason or "no error",
        "oom_other_succeeds": int(not other.reason),
        "oom_other_over_alone": other.finished / alone,
        "oom_next_succeeds": int(not following.reason),
    }


def _raise_for(seen: list[watching.Seen]) -> None:
    for each in seen:
        if each.reason:
            raise RuntimeError(f"a generation failed: {each.reason}")
