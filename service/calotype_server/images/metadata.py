"""Text with the parameters of a generation, to embed in its final image.

The format is the "infotext" of the Stable Diffusion WebUI, which most tools for diffusion images read: the prompt, then
a line `Negative prompt: ...`, then one line of `Name: value` pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype_server import __version__
from calotype_server.types import PromptSyntax, Speed

if TYPE_CHECKING:
    from calotype_server.types import Job, ModelInfo

__all__ = ["describe"]


def describe(job: Job, model: ModelInfo, finished_at: int | None = None) -> str:
    """Returns the parameters that reproduce the image.

    Args:
        job: The job of the generation.
        model: The model that ran it.
        finished_at: The step after which it was finished early, or None.
    """
    parameters: dict[str, object] = {
        "Steps": job.step_count,
        "Finished at step": finished_at,
        "Prompt syntax": "weighted" if job.prompt_syntax is PromptSyntax.WEIGHTED else None,
        "Speed": "fast" if job.speed is Speed.FAST else None,
        "Sampler": job.scheduler,
        "Schedule type": None if job.sigmas is None else job.sigmas.name.capitalize(),
        "Timestep spacing": None if job.spacing is None else job.spacing.name.lower(),
        "CFG scale": None if job.guidance_scale is None else f"{job.guidance_scale:g}",
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        "Scaled to": None if job.output.size is None else "{}x{}".format(*job.output.size),
        "Model": _quoted(model.name),
        "Version": f"Calotype {__version__}",
    }
    # The web UI reads LoRAs from tags in the prompt.
    lines = [job.prompt + "".join(f" <lora:{lora.name}:{lora.scale:g}>" for lora in job.loras)]
    if job.negative_prompt:
        lines.append(f"Negative prompt: {job.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in parameters.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """Returns a value as the format requires: as a JSON string if it contains separators."""
    if not set(value) & set(',:\n"'):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
