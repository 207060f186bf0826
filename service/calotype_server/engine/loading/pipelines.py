"""Loads a pipeline by name: `bundled`, a local diffusers folder or a hub id, all with `from_pretrained`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import structlog

from calotype_server.engine.loading.explain import explain
from calotype_server.engine.loading.offload import place
from calotype_server.engine.loading.quantize import quantization_config
from calotype_server.engine.loading.quiet import quiet
from calotype_server.engine.loading.sources import locate
from calotype_server.engine.machine import on_device
from calotype_server.engine.memory import is_out_of_memory
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from calotype_server.engine.loading.options import LoadOptions

__all__ = ["load_pipeline"]

_log = structlog.get_logger(__name__)


def load_pipeline(options: LoadOptions) -> Any:
    """Loads a text-to-image pipeline from safetensors only; it never runs code that comes with the weights.

    Raises:
        ModelUnavailable: The model is missing, unreachable, incomplete, or not text-to-image, or its weights cannot be
            quantized or offloaded here.
    """
    options.check()
    model = options.model
    source = locate(model)
    local = isinstance(source, Path)
    try:
        hub = {"revision": None if local else options.revision, "local_files_only": local or not options.download}
        # bitsandbytes quantizes on the current device.
        with quiet(), on_device(options.device):
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                source,
                variant=options.variant,
                dtype=options.dtype,
                use_safetensors=True,
                trust_remote_code=False,
                quantization_config=quantization_config(options.quantize, options.dtype, source, **hub),
                **hub,
            )
            place(pipeline, options.offload, options.device)
    except ModelUnavailable:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise ModelUnavailable(f"The model {model!r} does not fit into the memory of {options.device}.") from None
        _log.debug("the model cannot be loaded", model=model, exc_info=error)
        raise ModelUnavailable(explain(model, local, error)) from error
    parameters = inspect.signature(type(pipeline).__call__).parameters
    image = parameters.get("image")
    kind = type(pipeline).__name__
    needs_image = image is not None and (image.default is image.empty or "strength" in parameters)
    makes_video = not {"num_frames", "video_length"}.isdisjoint(parameters)
    if needs_image or makes_video or not {"prompt", "width", "height", "num_inference_steps"} <= parameters.keys():
        raise ModelUnavailable(f"{model!r} is a {kind}, which does not turn text into images.")
    if getattr(pipeline, "vae", None) is None or getattr(pipeline, "scheduler", None) is None:
        raise ModelUnavailable(f"{model!r} is a {kind}, which is not a latent diffusion pipeline.")
    return pipeline
