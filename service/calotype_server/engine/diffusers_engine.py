"""DiffusersEngine: a diffusers pipeline behind the engine protocol. `assembly.build_engine` makes one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
import torch

from calotype_server import errors
from calotype_server.engine.generation_run import EngineParts, GenerationRun
from calotype_server.engine.memory import is_device_failure, is_out_of_memory, release_cached_memory
from calotype_server.engine.requests.tiled_vae import when_tiled
from calotype_server.engine.runtime.fallback import FallbackRuntime
from calotype_server.engine.stepping.step_reports import StepReports
from calotype_server.types import Notice, Noticed

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.engine.protocol import Stop
    from calotype_server.types import Event, Job, ModelInfo, Pixels

__all__ = ["DiffusersEngine"]

_log = structlog.get_logger(__name__)

_TILED = Notice(
    "DECODED_IN_TILES",
    "Memory ran out, so the image was decoded in overlapping tiles. Its pixels differ slightly from the usual ones.",
)


class DiffusersEngine:
    """Runs jobs on one pipeline; see `engine.protocol.Engine`.

    Args:
        parts: The pipeline and everything that its generations share. The engine owns them and closes them.
    """

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts

    @property
    def model(self) -> ModelInfo:
        """Capabilities and defaults of the model."""
        model, runtime = self._parts.model, self._parts.runtime
        if isinstance(runtime, FallbackRuntime) and runtime.failure:
            return replace(model, accelerator=runtime.name, accelerator_fallback=runtime.failure)
        return model

    def run(self, job: Job, report: Callable[[Event], None], stop: Stop) -> Pixels:
        """Generates one image; see the protocol."""
        # Torch keeps the number per thread, and a new thread starts with the number that any thread set last.
        torch.set_num_threads(self._parts.threads)
        reports = StepReports(report)
        queue = self._parts.previews.open_queue(job, reports)
        try:
            with when_tiled(lambda: reports(Noticed((_TILED,)))):
                return GenerationRun(self._parts, job, reports, stop, queue).run()
        except errors.ServiceError:
            raise
        except BaseException as error:
            # Includes exceptions that would end the process, such as SystemExit: only this generation fails.
            if is_out_of_memory(error):
                if self._parts.batcher is not None:
                    self._parts.batcher.free_memory()
                release_cached_memory(torch.device(self.model.device))
                raise errors.OutOfMemory("The server ran out of memory; a smaller image may fit.") from None
            if is_device_failure(error):
                _log.exception("the device failed")
                raise errors.EngineDead("The device failed.") from error
            _log.exception("the pipeline failed")
            raise errors.GenerationFailed("The model failed to generate this image.") from error
        finally:
            queue.close()
            reports.flush()

    def note_preview_encoding(self, seconds: float) -> None:
        """Charges the preview budget; see the protocol."""
        self._parts.budget.observe_encode(seconds)

    def close(self) -> None:
        """Ends the preview thread and the device thread."""
        self._parts.previews.close()
        if self._parts.batcher is not None:
            self._parts.batcher.close()
