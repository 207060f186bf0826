"""The process that has the device: it holds a pipeline, calls it without the product, and serves it with the product.

The parent sends one command at a time (`process.HostProcess`). The event loop of the servers is in the main thread, as
in `calotype serve`; commands run in a second thread, which waits while the parent measures a server.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import resource
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import kernels, models
from benchmarks.gpu.serving import Servers
from calotype_server.engine import capabilities, loading, memory
from calotype_server.engine.requests.arguments import call_arguments
from calotype_server.images.encoder import encode_final
from calotype_server.types import Job, OutputOptions, Pixels

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

    from benchmarks.gpu.cases import Case

__all__ = ["main"]

_GIB = 2**30


def main(connection: Connection, family: str, toy: bool, device: str | None, dtype: str | None, folder: Path) -> None:
    """Builds the pipeline, and executes commands until the parent closes the connection.

    Args:
        connection: Receives (name, arguments, keyword arguments); sends (whether it succeeded, result or message).
        family: Model family, see `models.build`.
        toy: Whether its modules are tiny.
        device: Torch device; None for the one that the server would choose.
        dtype: Number format; None for the one that the server would choose.
        folder: For the servers' caches and the log, which replaces standard error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{family}.log", "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    memory.return_large_blocks()
    asyncio.run(_execute(connection, Host(family, toy, device, dtype, folder)))


async def _execute(connection: Connection, host: Host) -> None:
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as commands, ThreadPoolExecutor(1) as receiver:
        while True:
            try:
                name, arguments, options = await loop.run_in_executor(receiver, connection.recv)
            except EOFError:
                break
            function = getattr(host.servers if hasattr(host.servers, name) else host, name)
            try:
                if inspect.iscoroutinefunction(function):
                    answer = True, await function(*arguments, **options)
                else:
                    work = loop.run_in_executor(commands, lambda f, a, o: f(*a, **o), function, arguments, options)
                    answer = True, await work
            except BaseException as error:
                traceback.print_exc()
                answer = False, f"{type(error).__name__}: {error}"
            connection.send(answer)
        await host.servers.close()


class Host:
    """The commands; those of `servers` are commands too. `build` comes first.

    Args:
        family: Model family.
        toy: Whether its modules are tiny.
        device: Torch device, or None for the server's choice.
        dtype: Number format, or None for the server's choice.
        folder: For the servers' caches.
    """

    pipeline: Any

    def __init__(self, family: str, toy: bool, device: str | None, dtype: str | None, folder: Path) -> None:
        self._family = family
        self._toy = toy
        self._device = loading.pick_device(device)
        self._dtype = loading.pick_dtype(dtype, self._device)
        self._ballast: torch.Tensor | None = None
        self._hook: Any = None
        self._cured: torch.Tensor | None = None
        self.servers = Servers(self._device, folder / "cache")

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    def build(self) -> dict[str, Any]:
        """Builds the pipeline, and describes it and the machine.

        Raises:
            RuntimeError: It cannot be built.
        """
        started = time.perf_counter()
        self.pipeline = models.build(self._family, toy=self._toy, device=str(self._device), dtype=self._dtype)
        self.pipeline.set_progress_bar_config(disable=True)
        self.synchronize()
        self.servers.pipeline = self.pipeline
        modules = {name: each for name, each in self.pipeline.components.items() if isinstance(each, torch.nn.Module)}
        return {
            "build_seconds": time.perf_counter() - started,
            "parameters": {name: sum(p.numel() for p in each.parameters()) for name, each in modules.items()},
            "device": torch.cuda.get_device_name(self._device) if self._on_cuda else "CPU",
            "dtype": str(self._dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "none",
        }

    def free_gib(self) -> float | None:
        """Returns the free memory of the device, or None if that is not known."""
        return torch.cuda.mem_get_info(self._device)[0] / _GIB if self._on_cuda else None

    def synchronize(self) -> None:
        """Waits until the device has computed everything."""
        if self._on_cuda:
            torch.cuda.synchronize(self._device)

    # The pipeline without the product

    def bare(self, case: Case, *, steps: int | None = None, seed: int = 1, callback: bool = False) -> float:
        """Calls the pipeline as a script would, and returns the seconds until the device is done.

        Args:
            case: Size, steps and guidance.
            steps: Other number of steps.
            seed: Of the noise.
            callback: Whether a `callback_on_step_end` decodes every step with the full VAE and writes a JPEG.
        """
        options = {"callback_on_step_end": self._usual_callback(case)} if callback else {}
        arguments = self._arguments(case, steps or case.steps, seed) | {"output_type": "pil"} | options
        with torch.no_grad():
            self.synchronize()
            started = time.perf_counter()
            self.pipeline(**arguments)
            self.synchronize()
        return time.perf_counter() - started

    def picture(self, case: Case, *, seed: int = 1) -> bytes:
        """Returns the RGB bytes of the pipeline's own image."""
        with torch.no_grad():
            return self.pipeline(**self._arguments(case, case.steps, seed) | {"output_type": "pil"})[0][0].tobytes()

    def decoding(self, case: Case) -> float:
        """Returns the seconds from the end of the last step to the image as a tensor: the VAE and post-processing."""
        ended: list[float] = []

        def note(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.synchronize()
            ended.append(time.perf_counter())
            return tensors

        arguments = self._arguments(case, case.short_steps, 1) | {"output_type": "pt", "callback_on_step_end": note}
        with torch.no_grad():
            self.pipeline(**arguments)
            self.synchronize()
        return time.perf_counter() - ended[-1]

    def encoding(self, case: Case) -> float:
        """Returns the seconds in which the product encodes the final image as PNG."""
        pixels = Pixels(case.size, case.size, self.picture(case))
        started = time.perf_counter()
        encode_final(pixels, OutputOptions(), "a red apple")
        return time.perf_counter() - started

    def launch(self, case: Case, repeats: int) -> dict[str, float]:
        """Returns `kernels.launch` of a default call of the denoiser."""
        return kernels.launch(self.pipeline, self._model(case), self._device, repeats)

    def rows(self, case: Case, requests: int) -> dict[int, float]:
        """Returns `kernels.rows` for 1, 2, 4, ... up to this many requests at once."""
        return kernels.rows(self.pipeline, self._model(case), self._device, requests)

    def priorities(self, case: Case, steps: int, rounds: int) -> dict[str, float]:
        """Returns `kernels.priorities`."""
        return kernels.priorities(self.pipeline, self._model(case), self._device, steps, rounds)

    def _model(self, case: Case) -> Any:
        return capabilities.describe(case.name, self.pipeline, capabilities.Defaults(case.steps, case.guidance))

    def _arguments(self, case: Case, steps: int, seed: int) -> dict[str, Any]:
        """Returns the arguments with which the product calls the pipeline."""
        scheduler = type(self.pipeline.scheduler).__name__
        job = Job("a red apple", None, case.size, case.size, steps, case.guidance, seed, scheduler)
        return call_arguments(self.pipeline, job)

    def _usual_callback(self, case: Case) -> Any:
        pipeline = self.pipeline

        def decode_and_encode(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            kernels.jpeg(kernels.decoded(pipeline, tensors["latents"], case.size))
            return tensors

        return decode_and_encode

    # Memory and faults

    def reset_peak(self) -> float:
        """Starts a new measurement of the peak, and returns the allocated memory in GiB."""
        if not self._on_cuda:
            return memory_of_process()
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device) / _GIB

    def peak_gib(self) -> float:
        """Returns the peak of the allocated memory; on a CPU that of the whole process since it started."""
        return torch.cuda.max_memory_allocated(self._device) / _GIB if self._on_cuda else memory_of_process()

    def occupy(self, case: Case, leave_gib: float) -> None:
        """Leaves only so much memory free until `release`.

        A CPU has no such limit; there, calls of the denoiser fail that are 32 times as large as a default request's.
        """
        if self._on_cuda:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self._device)[0]
            size = max(0, int(free - leave_gib * _GIB))
            self._ballast = torch.empty(size, dtype=torch.uint8, device=self._device)
            return
        limit = 32 * kernels.largest_input(self.pipeline, self._model(case))

        def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if kernels.largest(args, kwargs) >= limit:
                raise torch.OutOfMemoryError("simulated")

        self._hook = kernels.denoiser(self.pipeline).register_forward_pre_hook(refuse, with_kwargs=True)

    def release(self) -> None:
        """Ends `occupy`."""
        self._ballast = None
        if self._on_cuda:
            torch.cuda.empty_cache()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def poison(self) -> None:
        """Makes the denoiser answer NaN until `cure`: in its weights, because a replayed graph runs no hooks."""
        weights = self._last_weights()
        self._cured = weights.clone()
        weights.fill_(torch.nan)
        self.synchronize()

    def cure(self) -> None:
        """Ends `poison`."""
        if self._cured is not None:
            self._last_weights().copy_(self._cured)
            self._cured = None
            self.synchronize()

    def _last_weights(self) -> torch.Tensor:
        return list(kernels.denoiser(self.pipeline).parameters())[-1].data


def memory_of_process() -> float:
    """Returns the peak of this process's resident memory in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
