"""The model's prediction of the final image, at every step of a run."""

import evaluate
import torch
from diffusers import DiffusionPipeline
from torch import Tensor


@torch.no_grad()
def predicted_latents(pipeline: DiffusionPipeline, prompts: list[str], seed: int) -> Tensor:
    """Return the predicted x0 (steps x prompts x channels x 16 x 16); the last ones are the final latents."""
    predicted: list[Tensor] = []
    step = pipeline.scheduler.step

    def recording_step(*arguments: object, **options: object) -> tuple:
        previous, original = step(*arguments, **options)  # the pipeline expects a tuple
        predicted.append(original)
        return previous, original

    pipeline.scheduler.step = recording_step
    try:
        pipeline(
            prompts,
            num_inference_steps=evaluate.STEPS,
            guidance_scale=evaluate.GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
    finally:
        pipeline.scheduler.step = step
    return torch.stack(predicted).float()
