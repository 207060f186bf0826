"""Loads a pipeline by name: `bundled`, a local diffusers folder or a hub id, all with `from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import structlog

from calotype_server.engine.loading.explain import explain
from calotype_server.engine.loading.quiet import quiet
from calotype_server.engine.loading.sources import locate
from calotype_server.engine.loading.supported import check_pipeline
from calotype_server.engine.memory import is_out_of_memory
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    import torch

__all__ = ["load_pipeline"]

_log = structlog.get_logger(__name__)


def load_pipeline(
    model: str,
    *,
    revision: str | None,
    variant: str | None,
    device: torch.device,
    dtype: torch.dtype,
    download: bool = True,
) -> Any:
    """Loads a text-to-image pipeline from safetensors only; it never runs code that comes with the weights.

    Args:
        model: "bundled", a path, or a hub id.
        revision: Branch, tag or commit of a hub id.
        variant: Weight variant, such as "fp16".
        device: Where the model runs.
        dtype: Number format of the weights.
        download: Whether a hub id may be downloaded; otherwise it must be in the local cache.

    Raises:
        ModelUnavailable: The model is missing, unreachable, incomplete, or not text-to-image.
    """
    source = locate(model)
    local = isinstance(source, Path)
    try:
        with quiet():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                source,
                revision=None if local else revision,
                variant=variant,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=local or not download,
            )
            pipeline.to(device)
    except Exception as error:
        if is_out_of_memory(error):
            raise ModelUnavailable(f"The model {model!r} does not fit into the memory of {device}.") from None
        _log.debug("the model cannot be loaded", model=model, exc_info=error)
        raise ModelUnavailable(explain(model, local, error)) from error
    check_pipeline(model, pipeline)
    return pipeline
