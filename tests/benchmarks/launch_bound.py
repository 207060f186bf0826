"""Measures a stream over the bare call where launching limits the denoiser, as it does on a GPU with small models.

An SD 1.5 step on a GPU takes as long as its thousands of kernel launches from Python. Each launch releases Python's
lock and takes it back, so everything that other threads of the server do in Python can lengthen the step. Two
denoisers imitate this without a GPU: "spinning" makes thousands of tiny torch calls for about 34 ms, and "sleeping"
waits for 34 ms without the lock, as for a device that is the limit. Run as a process, the module is the server.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Same as in the server. Torch reads it on import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import calotype
from calotype_server.apps.server import serve
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.preview.budget import PreviewBudget
from calotype_server.settings import Settings
from support.engine import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from calotype_server.apps.server import Ready
    from calotype_server.engine.protocol import Engine
    from calotype_server.observability.events import Observe

KINDS = ("spinning", "sleeping")
STEPS = 20
STEP_SECONDS = 0.034
"""Time to launch a step of SD 1.5."""

_PROBE_SECONDS = 0.2
_OFFSET = 0.01


class LaunchBound(torch.nn.Module):
    """Looks like a UNet, answers a fraction of its input, and takes `STEP_SECONDS` for it.

    Args:
        unet: A small UNet, for its attributes.
        launches: Number of tiny torch calls; None to sleep instead.
    """

    def __init__(self, unet: Any, launches: int | None) -> None:
        super().__init__()
        self.unet = unet
        self.launches = launches
        self._layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.SiLU()])
        self._tiny = torch.zeros(1, 8)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = True,
        **_: Any,
    ) -> tuple[torch.Tensor]:
        """Returns an answer that depends on sample and timestep."""
        if self.launches is None:
            time.sleep(STEP_SECONDS)
        else:
            spin(self._layers, self._tiny, self.launches)
        return (sample * 0.1 + _OFFSET,)

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of this module, or else of the small UNet."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["unet"], name)


def spin(layers: Iterable[Any], tiny_tensor: torch.Tensor, launches: int) -> None:
    """Makes tiny torch calls through modules, which take a few microseconds of Python each, as in a real denoiser."""
    first, second = layers
    for _ in range(launches // 2):
        second(first(tiny_tensor))


def launches_per_step() -> int:
    """Returns how many launches take `STEP_SECONDS` of processor time on this machine."""
    layers, small, count, seconds = [torch.nn.Linear(8, 8), torch.nn.SiLU()], torch.zeros(1, 8), 0, 0.0
    with torch.no_grad():
        started = time.thread_time()
        while seconds < _PROBE_SECONDS:
            spin(layers, small, 200)
            count, seconds = count + 200, time.thread_time() - started
    return round(count / seconds * STEP_SECONDS)


def pipeline(launches: int | None) -> Any:
    """Returns the tiny SD 1.5 with a launch-bound denoiser."""
    made = tiny.build("sd15")
    made.unet = LaunchBound(made.unet, launches).eval()
    return made


def measure(rounds: int) -> dict[str, float]:
    """Returns the wall time of a stream over the bare call, for both denoisers, with and without previews.

    Args:
        rounds: Number of measurements of each; the median of the ratios counts.
    """
    launches = launches_per_step()
    results: dict[str, float] = {}
    for kind, count in zip(KINDS, (launches, None), strict=True):
        with _Server(count) as address, calotype.Client(address) as client:
            results |= {f"launch_bound_{kind}_{name}": value for name, value in _compare(client, count, rounds).items()}
    return results


def _compare(client: calotype.Client, launches: int | None, rounds: int) -> dict[str, float]:
    made = pipeline(launches)

    def bare() -> None:
        made("a red apple", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1))

    def stream(method: calotype.PreviewMethod) -> Callable[[], None]:
        def run() -> None:
            generation = client.generate("a red apple", seed=1, steps=STEPS, previews=calotype.Previews(method=method))
            generation.result()
            denoising.append(generation.progress.timings.denoising)

        return run

    denoising: list[float] = []
    functions = {
        "bare": bare,
        "silent": stream(calotype.PreviewMethod.NONE),
        "stream": stream(calotype.PreviewMethod.HEAD),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    ratios = {
        f"{name}_over_bare": statistics.median(a / b for a, b in zip(times[name][1:], times["bare"][1:], strict=True))
        for name in ("silent", "stream")
    }
    return {**ratios, "bare_step_ms": 1000 * min(times["bare"]) / STEPS, "step_ms": 1000 * min(denoising) / STEPS}


class _Server:
    """A context manager that runs this module as a process.

    Args:
        launches: For `pipeline`.
    """

    def __init__(self, launches: int | None) -> None:
        self._launches = launches

    def __enter__(self) -> str:
        self._folder = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "benchmarks.launch_bound", str(self._launches or 0), self._folder.name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self._process.stdout.readline().strip()

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._folder.cleanup()


async def main(launches: int | None, folder: Path) -> None:
    """Serves until SIGTERM; prints the address."""
    settings = Settings(
        grpc_address="127.0.0.1:0", web_address="127.0.0.1:0", log_level="warning", cache_dir=folder, drain_seconds=0
    )

    async def load(settings: Settings, observe: Observe) -> Engine:
        return await asyncio.to_thread(
            build_engine,
            "launch-bound",
            pipeline(launches),
            defaults=Defaults(STEPS, 7.5),
            cache_dir=folder,
            threads=1,
            budget=PreviewBudget(settings.preview_budget),
            max_active=2,
            max_rows=4,
            observe=observe,
        )

    def announce(ready: Ready) -> None:
        print(ready.address, flush=True)

    await serve(settings, announce, load)


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(main(int(sys.argv[1]) or None, Path(sys.argv[2])))
