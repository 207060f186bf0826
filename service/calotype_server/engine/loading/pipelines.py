"""Loads a pipeline by name: `bundled`, a local diffusers folder, a hub id, or a single file."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import structlog

from calotype_server.engine.loading.adapt import adapted
from calotype_server.engine.loading.checks.damage import damage, files_of
from calotype_server.engine.loading.checks.supported import check_class, check_pipeline
from calotype_server.engine.loading.explain import explain, is_unreachable
from calotype_server.engine.loading.index import PipelineIndex
from calotype_server.engine.loading.offload import place
from calotype_server.engine.loading.overrides import replaced_components
from calotype_server.engine.loading.quantize import quantization_config
from calotype_server.engine.loading.quiet import quiet
from calotype_server.engine.loading.single_file import load_single_file
from calotype_server.engine.loading.sources import locate
from calotype_server.engine.machine import on_device
from calotype_server.engine.memory import is_out_of_memory
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from calotype_server.engine.loading.options import LoadOptions

__all__ = ["load_pipeline"]

_log = structlog.get_logger(__name__)


def load_pipeline(options: LoadOptions) -> Any:
    """Loads a text-to-image pipeline from safetensors or GGUF only; it never runs code that comes with the weights.

    Raises:
        ModelUnavailable: The model is missing, unreachable, incomplete, or not text-to-image, or its weights cannot be
            quantized or offloaded here.
    """
    options.check()
    model = options.model
    source = locate(model)
    try:
        # bitsandbytes quantizes on the current device.
        with quiet(), on_device(options.device):
            if isinstance(source, Path) and source.is_file():
                pipeline = load_single_file(source, options)
            else:
                pipeline = _load_whole(source, options)
            place(pipeline, options.offload, options.device)
    except ModelUnavailable:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise ModelUnavailable(f"The model {model!r} does not fit into the memory of {options.device}.") from None
        _log.debug("the model cannot be loaded", model=model, exc_info=error)
        # Listing the files would only wait for the network again.
        problem = None if is_unreachable(error) else _problem(source, options)
        raise ModelUnavailable(explain(model, source, error, problem)) from error
    check_pipeline(model, pipeline)
    return adapted(pipeline)


def _load_whole(source: Path | str, options: LoadOptions) -> Any:
    index = PipelineIndex.read(source, options)
    kind = index.pipeline_class()
    check_class(options.model, kind)
    index.check_components(kind)
    replaced = replaced_components(index, options)
    if not options.safety_checker and "safety_checker" in inspect.signature(kind.__init__).parameters:
        replaced |= {"safety_checker": None, "requires_safety_checker": False}
    arguments = options.pretrained_arguments(source)
    hub = {name: arguments[name] for name in ("revision", "local_files_only")}
    quantization = quantization_config(options.quantize, options.dtype, source, **hub)
    return diffusers.DiffusionPipeline.from_pretrained(
        source, **arguments, quantization_config=quantization, **replaced
    )


def _problem(source: Path | str, options: LoadOptions) -> str | None:
    """Returns the problem that the names of the model's files show, or None."""
    if isinstance(source, Path) and source.is_file():
        return None
    with contextlib.suppress(Exception), quiet():  # Without an index, its absence is the problem.
        files = files_of(source, options)
        if files is not None:
            return damage(PipelineIndex.read(source, options), files, options.variant)
    return None
