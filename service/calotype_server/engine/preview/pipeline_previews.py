"""Everything about the previews of one pipeline, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server.engine.preview.cache import cache_path, load_head, save_head
from calotype_server.engine.preview.calibrate import calibrate
from calotype_server.engine.preview.decoders import Decoder, HeadDecoder, VaeDecoder
from calotype_server.engine.preview.device_stream import lane_for
from calotype_server.engine.preview.head import PreviewHead
from calotype_server.engine.preview.renderer import PreviewRenderer
from calotype_server.engine.preview.safety_gate import SafetyGate
from calotype_server.observability.events import Observe, ignore
from calotype_server.types import PreviewMethod

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from calotype_server.engine.preview.budget import PreviewBudget
    from calotype_server.engine.preview.queue import PreviewQueue
    from calotype_server.engine.tap import Step
    from calotype_server.types import Event, Job, ModelInfo

__all__ = ["PipelinePreviews"]

_log = structlog.get_logger(__name__)

_LESSONS_BETWEEN_SAVES = 8


class PipelinePreviews:
    """Draws the previews of all generations of a pipeline, and learns from the images they end with.

    Args:
        pipeline: One that may be used while requests run; not changed.
        model: Its description.
        cache_dir: Where the fitted head is kept.
        allowed: Methods that the operator allows.
        budget: Chooses among the methods.
        tiny_vae: A small VAE that fits the pipeline, or None.
        observe: Told of steps and previews.
        teachable: Whether finished images teach the head; otherwise its previews depend on nothing that went before.
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
        teachable: bool = True,
    ) -> None:
        self._budget = budget
        self._model = model
        self._path = cache_path(cache_dir, pipeline)
        self._lessons = 0
        self._teachable = teachable
        full = VaeDecoder(pipeline, pipeline.vae)
        decoders: dict[PreviewMethod, Decoder] = {}
        head = _fitted_head(self._path, pipeline, model) if PreviewMethod.HEAD in allowed else None
        self._head = None if head is None else HeadDecoder(head)
        if self._head is not None:
            decoders[PreviewMethod.HEAD] = self._head
        if PreviewMethod.TINY_VAE in allowed and tiny_vae is not None:
            decoders[PreviewMethod.TINY_VAE] = VaeDecoder(pipeline, tiny_vae)
        if PreviewMethod.FULL_VAE in allowed:
            decoders[PreviewMethod.FULL_VAE] = full
        self._lane = lane_for(torch.device(model.device))
        self._measure(decoders, full)
        self.methods = tuple(decoders)
        """What can draw."""
        gate = SafetyGate(pipeline, full) if SafetyGate.needed(pipeline) else None
        self._renderer = PreviewRenderer(decoders, budget, self._lane, gate, observe)

    def feed(self, job: Job, report: Callable[[Event], None]) -> PreviewQueue:
        """Opens a line for one generation; previews come out of `report`."""
        return self._renderer.feed(job, report)

    def learn(self, step: Step, images: torch.Tensor) -> None:
        """Teaches the head what the last step's x0 became, when the preview thread has nothing else to do.

        Args:
            step: A generation's last.
            images: What the pipeline returned, (1, 3, height, width) from 0 to 1.
        """
        decoder, mark = self._head, self._lane.mark()
        if decoder is None or not self._teachable:
            return

        def lesson() -> None:
            with torch.no_grad(), self._lane.after([mark]):
                x0 = step.x0()
                if x0 is None:
                    return
                decoder.head = decoder.head.taught(PreviewHead.observe(decoder.head.scale, x0, images))
            self._lessons += 1
            if self._lessons % _LESSONS_BETWEEN_SAVES == 0:
                save_head(self._path, decoder.head)

        self._renderer.when_idle(lesson)

    def close(self) -> None:
        """Ends the preview thread, and keeps what was learnt."""
        self._renderer.close()
        if self._head is not None and self._lessons % _LESSONS_BETWEEN_SAVES:
            save_head(self._path, self._head.head)

    def _measure(self, decoders: dict[PreviewMethod, Decoder], full: VaeDecoder) -> None:
        """Gives the budget a first idea of what each costs the preview thread; decoders that fail are taken out.

        The full VAE is not tried, it may take half a minute on a CPU: the end of the first picture tells.
        """
        width, height = self._model.width, self._model.height
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        for method, decoder in list(decoders.items()):
            if decoder is full:
                continue
            try:
                latents = torch.zeros(full.shape(width, height), device=self._model.device)
                for _ in range(2):
                    # The first call prepares what later ones find.
                    with torch.no_grad(), self._lane.after([self._lane.mark()]) as spent:
                        decoder.decode(latents, width, height)
            except Exception:
                _log.exception("this decoder cannot draw previews of this pipeline", method=method)
                del decoders[method]
            else:
                self._budget.observe_decode(method, spent.seconds, width * height)
        torch.set_num_threads(before)


def _fitted_head(path: Path, pipeline: Any, model: ModelInfo) -> PreviewHead | None:
    """Loads or calibrates the head. A pipeline that cannot be calibrated still works, by other methods or without."""
    head = load_head(path)
    if head is None:
        _log.info("calibrating previews", model=model.name)
        try:
            head = calibrate(pipeline, model)
        except Exception:
            _log.exception("the preview head cannot be calibrated for this pipeline")
            return None
        save_head(path, head)
    return head
