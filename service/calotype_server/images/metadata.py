"""What a final image tells about how it was made, in the text form that most tools for diffusion images read.

The first line is the prompt, then `Negative prompt: ...`, then one line of `Name: value` pairs: the "infotext" that the
Stable Diffusion WebUI introduced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype_server import __version__

if TYPE_CHECKING:
    from calotype_server.types import Job, ModelInfo

__all__ = ["describe"]


def describe(job: Job, model: ModelInfo, finished_at: int | None = None) -> str:
    """Returns everything that is needed to make the picture again.

    Args:
        job: What was asked for.
        model: What made it.
        finished_at: The step after which it was finished early, or None.
    """
    facts: dict[str, object] = {
        "Steps": job.step_count,
        "Finished at step": finished_at,
        "Sampler": job.scheduler,
        "CFG scale": None if job.guidance_scale is None else f"{job.guidance_scale:g}",
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        "Model": _quoted(model.name),
        "Version": f"Calotype {__version__}",
    }
    lines = [job.prompt]
    if job.negative_prompt:
        lines.append(f"Negative prompt: {job.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """As the format has it: values with separators in them are JSON strings."""
    if not set(value) & set(',:\n"'):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
