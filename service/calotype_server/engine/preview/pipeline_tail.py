"""The tail of a pipeline's call, from latents to pictures, run on latents of one's own choice: "planted" latents.

A call of as few steps as the scheduler allows is made, and the latents are put in the place of the scheduler's result.
Unpacking, unscaling, VAE and post-processing are then the pipeline's own, so nothing about its layout has to be known
here. What comes before the tail is computed once and repeated.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine.batching.proxy import DenoiserProxy
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.request_view import make_scheduler, request_view
from calotype_server.engine.sample_calls import plain_arguments

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PipelineTail"]

_SIZES_KEPT = 64
"""Beyond it, generations of as many sizes at once would each cost the denoiser a call for every preview."""


class PipelineTail:
    """Decodes latents as the pipeline decodes its own. Not thread-safe.

    Args:
        pipeline: Not changed.
        replaced: Components to put in place of the pipeline's, such as `vae=`.
    """

    def __init__(self, pipeline: Any, **replaced: Any) -> None:
        self._pipeline = pipeline
        self._replaced = dict(replaced)
        for name, component in pipeline.components.items():
            if name.startswith("text_encoder") and component is not None:
                self._replaced[name] = _first_answer(component)
        if "safety_checker" in pipeline.components:
            self._replaced["safety_checker"] = None
        self._denoiser = denoiser_name(pipeline)
        self._denoisers: OrderedDict[tuple[int, int], DenoiserProxy] = OrderedDict()

    def shape(self, width: int, height: int) -> tuple[int, ...]:
        """Returns the shape of the scheduler's sample for a picture of that size in pixels."""
        shapes: list[tuple[int, ...]] = []

        def note(sample: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(sample.shape))
            return sample

        self._call(note, width, height)
        return shapes[-1]

    def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """Returns the pictures, (batch, 3, height, width) from 0 to 1.

        Args:
            latents: As the scheduler would return them, batch first.
            width: Of the pictures, in pixels.
            height: Of the pictures, in pixels.
        """
        pictures = self._call(latents.to, width, height)
        if len(pictures) == len(latents):
            return pictures
        # FLUX.2 unpacks by positions, and those of one picture were asked for.
        return torch.cat([self._call(one.to, width, height) for one in torch.split(latents, 1)])

    def _call(self, plant: Callable[[torch.Tensor], torch.Tensor], width: int, height: int) -> torch.Tensor:
        scheduler = make_scheduler(self._pipeline, type(self._pipeline.scheduler).__name__)
        step = scheduler.step

        @functools.wraps(step)
        def planted(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return_dict = kwargs.pop("return_dict", True)
            # The second of two steps gets the planted latents back, and the answer that was computed for one picture.
            output = step(model_output, timestep, sample[: len(model_output)], *args, **kwargs, return_dict=True)
            # Consistency models decode `denoised`, not `prev_sample`.
            for name in ("prev_sample", "denoised", "pred_original_sample"):
                if getattr(output, name, None) is not None:
                    output[name] = plant(sample)
            return output if return_dict else output.to_tuple()

        scheduler.step = planted
        view = request_view(
            self._pipeline, scheduler, **self._replaced, **{self._denoiser: self._repeating_denoiser(width, height)}
        )
        arguments = plain_arguments(self._pipeline, width, height, guidance_scale=1.0)
        # Second-order schedulers need two steps, and distilled models insist on two or four.
        attempts = [1, 2, 4] if getattr(scheduler, "order", 1) == 1 else [2, 4]
        for steps in attempts:
            try:
                return view(**arguments, num_inference_steps=steps, output_type="pt")[0].float()
            except ValueError:
                if steps == attempts[-1]:
                    raise
        raise AssertionError("unreachable")

    def _repeating_denoiser(self, width: int, height: int) -> DenoiserProxy:
        """What the denoiser says is thrown away, so once for each size is enough."""
        size = (width, height)
        proxy = self._denoisers.pop(size, None) or _first_answer(getattr(self._pipeline, self._denoiser))
        self._denoisers[size] = proxy
        while len(self._denoisers) > _SIZES_KEPT:
            self._denoisers.popitem(last=False)
        return proxy


def _first_answer(module: Any) -> DenoiserProxy:
    """A module that computes its first answer and repeats it."""
    answers: list[Any] = []

    def answer(*args: Any, **kwargs: Any) -> Any:
        if not answers:
            answers.append(module(*args, **kwargs))
        return answers[0]

    return DenoiserProxy(module, answer)
