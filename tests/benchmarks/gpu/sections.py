"""The measurements of speed: one function for each section. Each returns its figures by name.

Names ending in `_ms`, `_seconds` and `_gib` have that unit, `_steps` means steps of the bare call, and `a_over_b` is a
ratio.
"""

from __future__ import annotations

import functools
import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import watching
from benchmarks.gpu.session import Bench, Skipped, interleaved, ratio
from calotype_server.types import FAST_MIN_STEPS

if TYPE_CHECKING:
    from benchmarks.gpu.watching import Seen

__all__ = [
    "bare",
    "cancel",
    "fast",
    "final_image",
    "first_preview",
    "host_timesteps",
    "launch",
    "plan",
    "priority",
    "rows",
    "streams",
    "users",
]

Figures = dict[str, Any]

_USERS = 8
_CANCELS = 3


def bare(bench: Bench) -> Figures:
    """The pipeline's own call, eager."""
    measured = bench.measure_step()
    return {
        "bare_seconds": measured["bare_seconds"],
        "step_ms": 1000 * measured["step_seconds"],
        **{name: value for name, value in bench.session.description.items() if name == "build_seconds"},
    }


def launch(bench: Bench) -> Figures:
    """The time in which Python launches a call of the denoiser, and the time in which the device computes it."""
    found = bench.session("launch", bench.case, max(3, 2 * bench.rounds))
    return found | {"launch_over_call": found["launch_ms"] / found["call_ms"]}


def rows(bench: Bench) -> Figures:
    """The time of a joined call by its rows, eager."""
    return {f"rows_{count}_ms": each for count, each in bench.session("rows", bench.case, _USERS).items()}


def plan(bench: Bench) -> Figures:
    """The plan that the server chose."""
    bench.shared()
    chosen = bench.session.server(bench.shared_name, bench.variant.settings)
    return {name: value for name, value in chosen.items() if name != "address"}


def streams(bench: Bench) -> Figures:
    """The bare call, the usual callback, and streams with each kind of preview, side by side.

    `alone` is a stream without previews from a server with one slot.
    """
    address, alone = bench.shared(), bench.fifo()

    bare_call = functools.partial(bench.session, "bare", bench.case)
    methods = {"silent": "none", "head": "head", "auto": "auto", "full_vae": "full_vae"}
    found = interleaved(
        {
            "bare": bare_call,
            "callback": functools.partial(bare_call, callback=True),
            "alone": functools.partial(bench.stream, alone),
        }
        | {name: functools.partial(bench.stream, address, method=method) for name, method in methods.items()},
        bench.rounds,
    )
    times = {
        name: [each if isinstance(each, float) else each.finished for each in runs] for name, runs in found.items()
    }
    figures: Figures = {f"{name}_over_bare": ratio(times[name], times["bare"]) for name in ("callback", "alone")}
    for name in methods:
        figures[f"{name}_over_bare"] = ratio(times[name], times["bare"])
        if name != "silent":
            figures[f"{name}_over_silent"] = ratio(times[name], times["silent"])
            figures[f"{name}_previews"] = statistics.median(each.previews for each in found[name])
    figures["preview_steps"] = found["head"][-1].steps
    return figures


def first_preview(bench: Bench) -> Figures:
    """The time from the request to the first preview at the client, with and without encoding the prompt."""
    address, steps = bench.shared(), max(3, bench.case.short_steps)
    runs = interleaved({"head": lambda: bench.stream(address, method="head", steps=steps)}, 2 * bench.rounds)["head"]
    encoding = [each.timings.encoding_prompt for each in runs]
    after = [each.first_preview - encoded for each, encoded in zip(runs, encoding, strict=True)]
    return {
        "first_preview_ms": 1000 * statistics.median(each.first_preview for each in runs),
        "first_preview_steps": statistics.median(after) / bench.step_seconds,
        "encoding_steps": statistics.median(encoding) / bench.step_seconds,
    }


def users(bench: Bench) -> Figures:
    """Eight users at once, compared with one after another with the same runtime."""
    addresses = {"shared": bench.shared(), "fifo": bench.fifo()}
    requests = [{"prompt": watching.PROMPTS[each], "seed": each, "method": "auto"} for each in range(_USERS)]
    bench.session("take_batches", bench.shared_name)
    runs = interleaved(
        {
            name: functools.partial(watching.together, address, bench.case, requests)
            for name, address in addresses.items()
        },
        max(1, bench.rounds // 2),
    )
    batches = bench.session("take_batches", bench.shared_name)
    for seen in (each for crowds in runs.values() for crowd in crowds for each in crowd):
        if seen.reason:
            raise RuntimeError(f"a generation failed: {seen.reason}")

    def over_fifo(figure: Any) -> float:
        return ratio(*([figure(crowd) for crowd in runs[name]] for name in ("shared", "fifo")))

    figures = {
        "users8_throughput_over_fifo": 1 / over_fifo(lambda crowd: max(each.finished for each in crowd)),
        "users8_completion_over_fifo": over_fifo(lambda crowd: statistics.mean(each.finished for each in crowd)),
        "users8_first_preview_over_fifo": over_fifo(
            lambda crowd: statistics.mean(each.first_preview or each.finished for each in crowd)
        ),
        "users8_slowest_first_preview_over_fifo": over_fifo(
            lambda crowd: max(each.first_preview or each.finished for each in crowd)
        ),
    }
    if batches:
        figures["users8_mean_rows"] = statistics.mean(count for count, _ in batches)
        for count in sorted({count for count, _ in batches}):
            figures[f"users8_call_of_{count}_rows_ms"] = 1000 * statistics.median(s for n, s in batches if n == count)
    return figures


def cancel(bench: Bench) -> Figures:
    """The time from a cancel until the only slot works for the next caller, in steps of the bare call.

    `cancel_phase_steps` ends when the server reports work. `cancel_steps` also counts steps that the device still
    computes for the cancelled request: it is the delay of the next request's first preview, compared with a request
    that finds the slot idle.
    """
    address, case = bench.fifo(), bench.case
    steps = max(3, case.short_steps)
    count = iter(range(10**6))

    def after_cancel() -> Seen:
        number = next(count)
        return watching.cancelled(address, case, at=1 + number % max(1, case.steps // 2), seed=number, steps=steps)

    found = interleaved(
        {
            "idle": lambda: bench.stream(address, method="head", steps=steps),
            "cancelled": after_cancel,
        },
        max(_CANCELS, bench.rounds),
    )
    waits = [
        (after.first_preview - idle.first_preview) / bench.step_seconds
        for after, idle in zip(found["cancelled"], found["idle"], strict=True)
    ]
    phases = [each.first_work / bench.step_seconds for each in found["cancelled"]]
    return {
        "cancel_steps": max(statistics.median(waits), statistics.median(phases)),
        "cancel_phase_steps": statistics.median(phases),
    }


def final_image(bench: Bench) -> Figures:
    """The time after the last step: VAE, conversion to bytes (with the hand-over to the encoder), encoding as PNG.

    On CUDA the server reports the last step when it is launched, so `final_ms` and the conversion contain the part of
    that step that the device has not computed yet.
    """
    address = bench.shared()
    found = interleaved(
        {
            "vae": lambda: bench.session("decoding", bench.case),
            "encode": lambda: bench.session("encoding", bench.case),
            "stream": lambda: bench.stream(address),
        },
        bench.rounds,
    )
    vae, encode = statistics.median(found["vae"]), statistics.median(found["encode"])
    decoding = statistics.median(each.timings.decoding for each in found["stream"])
    return {
        "final_ms": 1000 * statistics.median(each.finished - each.last_step for each in found["stream"]),
        "final_vae_ms": 1000 * vae,
        "final_convert_ms": max(0.0, 1000 * (decoding - vae - encode)),
        "final_encode_ms": 1000 * encode,
    }


def host_timesteps(bench: Bench) -> Figures:
    """Streams without previews, with timesteps on the device and in ordinary memory.

    `host_timesteps_saved_over_bare` is the time that they save, relative to the bare call.
    """
    device = bench.shared()
    with bench.opened("host timesteps", host_timesteps=True) as host:
        found = interleaved(
            {
                "bare": functools.partial(bench.session, "bare", bench.case),
                "off": lambda: bench.stream(device).finished,
                "on": lambda: bench.stream(host["address"]).finished,
            },
            bench.rounds,
        )
    saved = [off - on for off, on in zip(found["off"], found["on"], strict=True)]
    return {
        "host_timesteps_off_over_bare": ratio(found["off"], found["bare"]),
        "host_timesteps_on_over_bare": ratio(found["on"], found["bare"]),
        "host_timesteps_saved_over_bare": ratio(saved, found["bare"]),
    }


def fast(bench: Bench) -> Figures:
    """Streams without previews, with all steps and with `speed="fast"`; random weights do not show its quality."""
    with bench.opened("step cache", step_cache=True) as server:
        if server["scheduler"] not in server["fast_schedulers"]:
            raise Skipped(f"the server does not offer the step cache with {server['scheduler']}")
        speeds, steps = ("exact", "fast"), max(FAST_MIN_STEPS, bench.case.steps)
        one = functools.partial(bench.stream, server["address"], steps=steps)
        found = interleaved({speed: functools.partial(one, speed=speed) for speed in speeds}, bench.rounds)
    exact, quick = ([each.finished for each in found[speed]] for speed in speeds)
    computed = found["fast"][-1].timings.computed_steps
    return {"fast_over_exact": ratio(quick, exact), "fast_computed_steps": computed, "fast_steps": steps}


def priority(bench: Bench) -> Figures:
    """The cost of previews by the priority of their stream relative to the denoiser's, which runs eagerly.

    On a CPU there are no priorities; the figures are then all alike.
    """
    case = bench.case
    found = bench.session("priorities", case, case.steps, bench.rounds)
    return {f"priority_{name}": value for name, value in found.items()}
