"""Reads the capabilities and defaults of a pipeline from the pipeline itself."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from calotype_server.engine.predicted_x0 import noise_level
from calotype_server.engine.request_view import make_scheduler
from calotype_server.errors import ModelUnavailable
from calotype_server.types import ModelInfo

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Defaults", "denoiser_name", "describe", "read_defaults"]

_DENOISERS = ("transformer", "unet")


@dataclass(frozen=True, slots=True)
class Defaults:
    """Defaults that override the pipeline's own; each is None if not given."""

    step_count: int | None = None
    guidance_scale: float | None = None
    tiny_vae: str | None = None

    def or_else(self, other: Defaults) -> Defaults:
        """Returns these defaults, with the values of `other` where these are None."""
        return Defaults(
            other.step_count if self.step_count is None else self.step_count,
            other.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            other.tiny_vae if self.tiny_vae is None else self.tiny_vae,
        )


def read_defaults(source: Path | str) -> Defaults:
    """Reads `calotype.json` in a local model folder: defaults that suit its weights.

    Keys: `step_count`, `guidance_scale`, and `tiny_vae`, the path of an `AutoencoderTiny` for previews, relative to the
    folder. diffusers cannot store them: a pipeline class has one set of defaults for all weights.

    Args:
        source: The folder, or a hub id, for which there is no such file.

    Raises:
        ModelUnavailable: The file is invalid.
    """
    if isinstance(source, str):
        return Defaults()
    file = source / "calotype.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        step_count, guidance = values.get("step_count"), values.get("guidance_scale")
        tiny_vae = values.get("tiny_vae")
        if step_count is not None and not (type(step_count) is int and step_count >= 1):
            raise ValueError("step_count must be a whole number from 1")
        if guidance is not None and not (isinstance(guidance, (int, float)) and math.isfinite(guidance)):
            raise ValueError("guidance_scale must be a finite number")
        if tiny_vae is not None and not isinstance(tiny_vae, str):
            raise ValueError("tiny_vae must be the path of a folder")
    except FileNotFoundError:
        return Defaults()
    except (ValueError, AttributeError) as error:
        raise ModelUnavailable(f"{str(file)!r} is damaged ({error}); correct or delete it.") from error
    return Defaults(step_count, guidance, None if tiny_vae is None else str(source / tiny_vae))


def denoiser_name(pipeline: Any) -> str:
    """Returns the attribute that holds the denoiser, which a pipeline calls once or twice a step.

    Raises:
        ModelUnavailable: There is none.
    """
    for name in _DENOISERS:
        if getattr(pipeline, name, None) is not None:
            return name
    raise ModelUnavailable(f"A {type(pipeline).__name__} has neither a transformer nor a UNet.")


def describe(name: str, pipeline: Any, defaults: Defaults) -> ModelInfo:
    """Reads sizes, defaults, schedulers and accepted parameters from a loaded pipeline."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    multiple = _size_multiple(pipeline, denoiser)
    width, height = _native_size(pipeline, denoiser, multiple)
    guidance = None
    if "guidance_scale" in parameters:
        guidance = defaults.guidance_scale
        default = parameters["guidance_scale"].default
        # Qwen-Image's default is None: the parameter is only for guidance-distilled models.
        if guidance is None and default is not None:
            guidance = float(default)
    schedulers = _schedulers(pipeline)
    return ModelInfo(
        name=name,
        pipeline=type(pipeline).__name__,
        width=width,
        height=height,
        size_multiple=multiple,
        step_count=defaults.step_count or parameters["num_inference_steps"].default,
        guidance_scale=guidance,
        takes_negative_prompt="negative_prompt" in parameters,
        scheduler=type(pipeline.scheduler).__name__,
        schedulers=schedulers,
        max_step_counts=_max_step_counts(pipeline, schedulers),
        max_prompt_tokens=max((limit for _, limit in tokenizers(pipeline)), default=0),
        device=str(denoiser.device),
        dtype=str(denoiser.dtype).removeprefix("torch."),
    )


def tokenizers(pipeline: Any) -> list[tuple[Any, int]]:
    """Returns every tokenizer with the number of tokens that the pipeline reads, special tokens included."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    found = []
    for name, component in pipeline.components.items():
        if not name.startswith("tokenizer") or component is None:
            continue
        limit = component.model_max_length
        # The first of two is CLIP's, which has its own limit. The pipeline truncates for T5 and language models.
        if parameter is not None and (limit > 77 or name != "tokenizer"):
            limit = parameter.default
        if limit < 1_000_000:
            found.append((component, limit))
    return found


def _size_multiple(pipeline: Any, denoiser: Any) -> int:
    factor = getattr(pipeline, "vae_scale_factor", 8)
    patch = denoiser.config.get("patch_size", 1)
    patched = factor * (patch if isinstance(patch, int) else 1)
    processor = getattr(pipeline, "image_processor", None)
    # FLUX and similar models pack 2x2 latents outside the transformer; only their image processor shows it.
    processed = processor.config.get("vae_scale_factor", 1) if processor is not None else 1
    return max(patched, processed)


def _native_size(pipeline: Any, denoiser: Any, multiple: int) -> tuple[int, int]:
    size = getattr(pipeline, "default_sample_size", None) or denoiser.config.get("sample_size") or 128
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    factor = getattr(pipeline, "vae_scale_factor", 8)
    return tuple(max(multiple, side * factor // multiple * multiple) for side in (width, height))


def _schedulers(pipeline: Any) -> tuple[str, ...]:
    """Returns the compatible schedulers that can step with this model's config and expect the same kind of prediction.

    The list of diffusers is too long: some need a package that is not installed, some expect another prediction.
    """
    own = type(pipeline.scheduler).__name__
    kind = _prediction_kind(pipeline, own)
    names = {own}
    for compatible in getattr(pipeline.scheduler, "compatibles", []):
        name = compatible.__name__
        if hasattr(diffusers, name) and kind is not None and _prediction_kind(pipeline, name) == kind:
            names.add(name)
    return tuple(sorted(names))


def _max_step_counts(pipeline: Any, names: Iterable[str]) -> dict[str, int]:
    """Returns the most steps of schedulers that have a limit: the timesteps they were trained on, or fewer."""
    found = {}
    for name in names:
        scheduler = make_scheduler(pipeline, name)
        for key in ("num_train_timesteps", "original_inference_steps"):
            count = scheduler.config.get(key)
            # Some need more arguments than a number of steps, and accept any number.
            with contextlib.suppress(Exception):
                scheduler.set_timesteps(count)
                found[name] = count
                break
    return found


def _prediction_kind(pipeline: Any, name: str) -> str | None:
    """Returns the kind of prediction that a scheduler expects, or None if it cannot take a step."""
    try:
        scheduler = make_scheduler(pipeline, name)
        scheduler.set_timesteps(4)
        sample = torch.ones(1, 4, 8, 8)
        timestep = scheduler.timesteps[0]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, timestep)
        level = noise_level(scheduler, 0, timestep)
        stepped = scheduler.step(sample, timestep, sample, return_dict=False)[0]
    except Exception:  # For any reason: it is not offered.
        return None
    return level.kind if level is not None and torch.isfinite(stepped).all() else None
