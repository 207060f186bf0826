"""Runs the tail of a pipeline's call, from latents to images, on given latents.

It calls the pipeline with as few steps as the scheduler allows, and replaces the scheduler's result by the given
latents. Unpacking, unscaling, VAE and post-processing are then the pipeline's own, so this module needs no knowledge of
their layout. Everything before the tail is computed once and then repeated. The third call with latents of one shape,
and every later one, repeats the operations of the first without the pipeline's Python code; see `tape`.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine.capabilities import decoder_name, denoiser_name
from calotype_server.engine.machine import device_of
from calotype_server.engine.preview.device_stream import call_in_order
from calotype_server.engine.preview.tape import Tape, TapedVae
from calotype_server.engine.requests.denoiser_proxy import DenoiserProxy
from calotype_server.engine.requests.sample_calls import plain_arguments
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.schedulers.make import make_scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PipelineTail"]

_SIZES_KEPT = 64
"""With more image sizes at once, each preview would cost a call of the denoiser."""


class PipelineTail:
    """Decodes latents as the pipeline decodes its own. Not thread-safe.

    Args:
        pipeline: Not changed.
        replaced: Components to use instead of the pipeline's, such as `vae=`.
    """

    def __init__(self, pipeline: Any, **replaced: Any) -> None:
        self._pipeline = pipeline
        self._replaced = dict(replaced)
        for name, component in pipeline.components.items():
            if name.startswith("text_encoder") and component is not None:
                self._replaced[name] = _repeating(component)
        if "safety_checker" in pipeline.components:
            self._replaced["safety_checker"] = None
        self._denoiser = denoiser_name(pipeline)
        self._decoder = decoder_name(pipeline)
        self._denoisers: OrderedDict[tuple[int, int], DenoiserProxy] = OrderedDict()
        self._tapes: OrderedDict[tuple[Any, ...], Tape | None] = OrderedDict()
        """None where the pipeline does something that cannot be repeated."""

    def shape(self, width: int, height: int) -> tuple[int, ...]:
        """Returns the shape of the scheduler's sample for an image of that size in pixels."""
        shapes: list[tuple[int, ...]] = []

        def record(sample: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(sample.shape))
            return sample

        self._call(record, width, height)
        return shapes[-1]

    def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """Returns the images, (batch, 3, height, width), 0 to 1.

        Args:
            latents: In the scheduler's sample space, batch first.
            width: Of the images, in pixels.
            height: Of the images, in pixels.
        """
        # One after another: a VAE needs memory for each image, and previews of all generations may be due together.
        # FLUX.2 unpacks tokens by their positions, and the pipeline's call computed the positions of one image only.
        return torch.cat([self._decode(one, width, height) for one in torch.split(latents, 1)])

    def _decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """Decodes one image, with the tape of an earlier call if there is one that agrees with the pipeline."""
        key = (width, height, latents.shape, latents.dtype, latents.device)
        tape = self._tapes.get(key)
        if tape is not None and tape.verified:
            self._tapes.move_to_end(key)
            return tape.play(latents)
        if key in self._tapes:
            images = self._call(latents.to, width, height)
            if tape is not None and not tape.agrees(latents, images):
                self._tapes[key] = None
            return images
        tape = Tape()
        vae = TapedVae(self._replaced.get(self._decoder, getattr(self._pipeline, self._decoder)), tape)
        with contextlib.ExitStack() as recording:

            def replace(sample: torch.Tensor) -> torch.Tensor:
                if not tape.started:
                    # Not earlier: a compiled denoiser cannot run while a dispatch mode is active.
                    recording.enter_context(tape)
                tape.start(latents)
                return latents.to(sample)

            images = self._call(replace, width, height, **{self._decoder: vae})
        self._tapes[key] = tape if tape.end(images) else None
        while len(self._tapes) > _SIZES_KEPT:
            self._tapes.popitem(last=False)
        return images

    def _call(
        self, replace: Callable[[torch.Tensor], torch.Tensor], width: int, height: int, **replaced: Any
    ) -> torch.Tensor:
        """Calls the pipeline; `replace` maps the scheduler's sample to the latents to use instead."""
        scheduler = make_scheduler(self._pipeline, type(self._pipeline.scheduler).__name__)
        step = scheduler.step

        @functools.wraps(step)
        def replaced_step(
            model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            return_dict = kwargs.pop("return_dict", True)
            output = step(model_output, timestep, sample, *args, **kwargs, return_dict=True)
            # Pipelines of consistency models decode `denoised`, not `prev_sample`.
            for name in ("prev_sample", "denoised", "pred_original_sample"):
                if getattr(output, name, None) is not None:
                    output[name] = replace(sample)
            return output if return_dict else output.to_tuple()

        scheduler.step = replaced_step
        view = request_view(
            self._pipeline,
            scheduler,
            **{**self._replaced, **replaced, self._denoiser: self._repeating_denoiser(width, height)},
        )
        arguments = plain_arguments(self._pipeline, width, height, guidance_scale=1.0)
        # Second-order schedulers need two steps, and some distilled models require two or four.
        attempts = [1, 2, 4] if getattr(scheduler, "order", 1) == 1 else [2, 4]
        for steps in attempts:
            try:
                return view(**arguments, num_inference_steps=steps, output_type="pt")[0].float()
            except (ValueError, IndexError):  # PixArt-alpha's single step needs a scheduler that reports its x0.
                if steps == attempts[-1]:
                    raise
        raise AssertionError("unreachable")

    def _repeating_denoiser(self, width: int, height: int) -> DenoiserProxy:
        """The denoiser's answer is discarded, so it is computed once for each size."""
        size = (width, height)
        proxy = self._denoisers.pop(size, None) or _repeating(getattr(self._pipeline, self._denoiser))
        self._denoisers[size] = proxy
        while len(self._denoisers) > _SIZES_KEPT:
            self._denoisers.popitem(last=False)
        return proxy


def _repeating(module: Any) -> DenoiserProxy:
    """Returns a module that computes its first answer and then repeats it."""
    answers: list[Any] = []

    def answer(*args: Any, **kwargs: Any) -> Any:
        if not answers:
            answers.append(call_in_order(device_of(module), lambda: module(*args, **kwargs)))
        return answers[0]

    # Another thread may use the module right now, and its answers do not matter here.
    return DenoiserProxy(module, answer, ignore_changes=True)
