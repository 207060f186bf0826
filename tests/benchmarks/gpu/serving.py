"""Runs `calotype serve` in the process of the pipeline, so that the bare call and several servers share its weights."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calotype_server import threads
from calotype_server.apps.server import Ready, serve
from calotype_server.engine import factory
from calotype_server.observability.events import BatchDone
from calotype_server.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from calotype_server.engine.protocol import Engine
    from calotype_server.observability.events import Observation, Observe

__all__ = ["Servers"]

_MAX_QUEUE = 64
"""Places in the queue. All generations come from one caller, so its share is the whole queue."""


@dataclass
class _Server:
    """A running server, and the batches (rows, seconds) since they were last taken."""

    task: asyncio.Task[int]
    batches: list[tuple[int, float]] = field(default_factory=list)

    def observe(self, event: Observation) -> None:
        if isinstance(event, BatchDone):
            self.batches.append((event.rows, event.seconds))


class Servers:
    """The servers of a process, by name. Lives in the event loop.

    Args:
        device: The pipeline's device.
        cache_dir: Folder of the servers' caches.

    Attributes:
        pipeline: Is served; set it before the first server opens.
    """

    pipeline: Any

    def __init__(self, device: torch.device, cache_dir: Path) -> None:
        self._device = device
        self._cache_dir = cache_dir
        self._servers: dict[str, _Server] = {}

    async def open_server(self, name: str, model: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Starts a server, and returns its address, the plan that it chose and the time until it was ready.

        Args:
            name: For `take_batches` and `close_server`.
            model: The model's name.
            settings: Fields of `Settings`. The plan is measured, not read from a cache.

        Raises:
            StartupError: The server did not start.
        """
        ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        chosen = Settings(
            **{
                "model": model,
                "device": str(self._device),
                "cache_dir": self._cache_dir,
                "grpc_address": "127.0.0.1:0",
                "web_address": "127.0.0.1:0",
                "log_level": "warning",
                "watchdog_seconds": 0,
                "drain_seconds": 0,
                "measure_again": True,
                "max_queue": _MAX_QUEUE,
                "max_queue_per_caller": _MAX_QUEUE,
                **settings,
            }
        )

        async def load(settings: Settings, observe: Observe) -> Engine:
            def observe_both(event: Observation) -> None:
                server.observe(event)
                observe(event)

            return await threads.run("load", factory.engine_around, settings, self.pipeline, observe_both)

        server = _Server(asyncio.create_task(serve(chosen, ready.set_result, load)))
        started: list[asyncio.Future[Any]] = [server.task, ready]
        await asyncio.wait(started, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            server.task.result()
            raise RuntimeError("the server ended before it was ready")
        self._servers[name] = server
        opened = ready.result()
        found = opened.model
        return {
            "address": opened.address,
            "load_seconds": opened.load_seconds,
            "max_active": found.max_active,
            "max_batch_rows": found.max_batch_rows,
            "unbatched_reason": found.unbatched_reason,
            "preview_methods": ", ".join(found.preview_methods),
            "accelerator": found.accelerator,
            "accelerator_fallback": found.accelerator_fallback,
            "scheduler": found.scheduler,
            "fast_schedulers": ", ".join(found.fast_schedulers),
        }

    async def close_server(self, name: str) -> None:
        """Stops a server, if it runs."""
        server = self._servers.pop(name, None)
        if server is not None:
            server.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await server.task

    async def close(self) -> None:
        """Stops all servers."""
        for name in list(self._servers):
            await self.close_server(name)

    async def take_batches(self, name: str) -> list[tuple[int, float]]:
        """Returns rows and seconds of each batch since the last call."""
        server = self._servers[name]
        batches = server.batches[:]
        del server.batches[: len(batches)]
        return batches
