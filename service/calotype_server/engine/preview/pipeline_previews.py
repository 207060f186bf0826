"""Assembles the previews of one pipeline: the head, the other decoders, the renderer, and learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server.engine.capabilities import decoder as pipeline_decoder
from calotype_server.engine.memory import is_device_failure
from calotype_server.engine.preview.calibrate import calibrate
from calotype_server.engine.preview.decoders import Decoder, HeadDecoder, VaeDecoder
from calotype_server.engine.preview.device_stream import device_stream
from calotype_server.engine.preview.drawing import draw, to_bytes
from calotype_server.engine.preview.head import PreviewHead
from calotype_server.engine.preview.head_cache import head_path, load_head, save_head
from calotype_server.engine.preview.renderer import PreviewRenderer
from calotype_server.engine.preview.safety_gate import safety_gate
from calotype_server.observability.events import Observe, ignore
from calotype_server.types import PreviewMethod

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from calotype_server.engine.preview.budget import PreviewBudget
    from calotype_server.engine.preview.device_stream import Lap
    from calotype_server.engine.preview.queue import PreviewQueue
    from calotype_server.engine.tap import Step
    from calotype_server.types import Event, Job, ModelInfo

__all__ = ["PipelinePreviews"]

_log = structlog.get_logger(__name__)

_IMAGES_BETWEEN_SAVES = 8


class PipelinePreviews:
    """Renders the previews of all generations of a pipeline, and learns from their final images.

    Args:
        pipeline: A pipeline that is safe to use while requests run; not changed.
        model: Its description.
        cache_dir: Folder of all caches; the fitted head is in `heads` below it.
        allowed: Methods that the operator allows.
        budget: Chooses among the methods.
        tiny_vae: A small VAE that fits the pipeline, or None.
        observe: Receives observations of steps and previews.
        learns: Whether the head learns from final images. Otherwise previews do not depend on earlier generations.
    """

    def __init__(
        self,
        pipeline: Any,
        model: ModelInfo,
        *,
        cache_dir: Path,
        allowed: Collection[PreviewMethod],
        budget: PreviewBudget,
        tiny_vae: Any = None,
        observe: Observe = ignore,
        learns: bool = True,
    ) -> None:
        self._budget = budget
        self._model = model
        self._path = head_path(cache_dir, pipeline)
        self._learned_images = 0
        self._learns = learns
        full = VaeDecoder(pipeline, pipeline_decoder(pipeline))
        head = _fitted_head(self._path, pipeline, model) if PreviewMethod.HEAD in allowed else None
        self._head = None if head is None else HeadDecoder(head)
        small = None if tiny_vae is None else VaeDecoder(pipeline, tiny_vae)
        candidates: dict[PreviewMethod, Decoder | None] = {
            PreviewMethod.HEAD: self._head,
            PreviewMethod.TINY_VAE: small,
            PreviewMethod.FULL_VAE: full,
        }
        self._stream = device_stream(torch.device(model.device))
        decoders = self._measured(
            {method: decoder for method, decoder in candidates.items() if decoder is not None and method in allowed},
            full,
        )
        self.methods = tuple(decoders)
        """The available methods."""
        self._renderer = PreviewRenderer(decoders, budget, self._stream, safety_gate(pipeline, full), observe)

    def open_queue(self, job: Job, report: Callable[[Event], None]) -> PreviewQueue:
        """Opens a queue for one generation; `report` receives its progress and previews."""
        return self._renderer.open_queue(job, report)

    def start_decoding(self) -> Lap:
        """Starts to measure how long the calling thread's final image takes to decode."""
        return self._stream.lap()

    def learn(self, step: Step, images: torch.Tensor) -> None:
        """Updates the head from a final image, when the preview thread is idle.

        Args:
            step: A generation's last step.
            images: The pipeline's result, (1, 3, height, width), 0 to 1.
        """
        decoder, launched = self._head, self._stream.record()
        if decoder is None or not self._learns:
            return

        def update() -> None:
            with torch.no_grad(), self._stream.after([launched]):
                x0 = step.x0()
                if x0 is None:
                    return
                decoder.replace(decoder.head.updated(PreviewHead.observe(decoder.head.scale, x0, images)))
            self._learned_images += 1
            if self._learned_images % _IMAGES_BETWEEN_SAVES == 0:
                save_head(self._path, decoder.head)

        self._renderer.when_idle(update)

    def close(self) -> None:
        """Ends the preview thread, and saves the head."""
        self._renderer.close()
        if self._head is not None and self._learned_images % _IMAGES_BETWEEN_SAVES:
            save_head(self._path, self._head.head)

    def _measured(self, decoders: dict[PreviewMethod, Decoder], full: VaeDecoder) -> dict[PreviewMethod, Decoder]:
        """Returns the decoders that work, and gives the budget a first estimate of their cost.

        On a CPU the full VAE is not tried, because it may take half a minute: the end of the first generation measures
        it. It is offered even if it fails here, because every generation needs it at its end.
        """
        before = torch.get_num_threads()
        # As on the preview thread.
        torch.set_num_threads(1)
        try:
            return {
                method: decoder
                for method, decoder in decoders.items()
                if (decoder is full and not self._stream.fast)
                or self._measure(method, decoder, full)
                or decoder is full
            }
        finally:
            torch.set_num_threads(before)

    @torch.no_grad()
    def _measure(self, method: PreviewMethod, decoder: Decoder, full: VaeDecoder) -> bool:
        width, height = self._model.width, self._model.height
        try:
            latents = torch.zeros(full.shape(width, height), device=self._model.device)
            seconds = self._stream.cost(lambda: to_bytes(draw(decoder, latents, width, height).images))
        except Exception as error:
            if is_device_failure(error):
                raise
            _log.exception("this decoder cannot render previews of this pipeline", method=method)
            return False
        self._budget.observe_decode(method, seconds, width * height)
        return True


def _fitted_head(path: Path, pipeline: Any, model: ModelInfo) -> PreviewHead | None:
    """Loads or calibrates the head. If a pipeline cannot be calibrated, it works with other methods or no previews."""
    head = load_head(path)
    if head is None:
        _log.info("calibrating previews", model=model.name)
        try:
            head = calibrate(pipeline, model)
        except Exception as error:
            if is_device_failure(error):
                raise
            _log.exception("the preview head cannot be calibrated for this pipeline")
            return None
        save_head(path, head)
    return head
