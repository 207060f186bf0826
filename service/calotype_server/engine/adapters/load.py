"""Loads LoRAs with diffusers, which knows the formats of trainers, and takes the weights out of the pipeline again.

diffusers and peft would keep one choice of LoRAs for the whole pipeline. Afterwards the pipeline is as it was before,
and `Loras` applies the weights to the requests that ask for them.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server.engine.adapters.header import read_header
from calotype_server.engine.adapters.layers import LayerDelta
from calotype_server.engine.adapters.loras import Loras
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.loading.explain import first_line
from calotype_server.engine.loading.quiet import quiet
from calotype_server.engine.loading.weight_files import load_weight_files
from calotype_server.engine.memory import is_device_failure, is_out_of_memory
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from calotype_server.engine.adapters.header import LoraHeader

__all__ = ["load_loras"]

_log = structlog.get_logger(__name__)

_ADAPTER = "calotype"
"""Name inside peft, where each LoRA stays only while it is loaded."""


def load_loras(pipeline: Any, sources: Mapping[str, str], *, download: bool = True) -> Loras | None:
    """Loads LoRAs, from safetensors only. Call it before anything else uses the pipeline.

    Args:
        pipeline: The loaded pipeline. Its text encoders get hooks, which do nothing for requests without LoRAs.
        sources: Maps the name of each LoRA to `PATH_OR_HUB_ID[:FILE]`.
        download: Whether a hub id may be downloaded; otherwise it must be in the local cache.

    Returns:
        The LoRAs; None if there are no sources.

    Raises:
        ModelUnavailable: At least one cannot be used with this model. The message names each of them and the reason.
    """
    if not sources:
        return None
    kind = type(pipeline).__name__
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelUnavailable(f"The model is a {kind}, for which diffusers has no LoRAs. Start without --lora.")
    loras = Loras()
    load_weight_files(
        "--lora", sources, lambda name, file: _load(pipeline, name, file, loras), kind=kind, download=download
    )
    return loras


def _load(pipeline: Any, name: str, path: Path, loras: Loras) -> None:
    header = read_header(path)
    before = _shapes(pipeline)
    try:
        with quiet(), warnings.catch_warnings(action="ignore"):
            pipeline.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=_ADAPTER, local_files_only=True
            )
        found = list(_deltas(pipeline, header.factor))
    except ModelUnavailable:
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_device_failure(error):
            raise
        _log.debug("the LoRA cannot be loaded", lora=name, exc_info=error)
        raise ModelUnavailable(f"{_reason(error)}{_origin(header)}") from error
    finally:
        pipeline.unload_lora_weights()
    if not found:
        raise ModelUnavailable(f"None of its tensors fits a layer of the model.{_origin(header)}")
    if _shapes(pipeline) != before or getattr(_denoiser(pipeline), "_transformer_norm_layers", None):
        raise ModelUnavailable("It replaces layers of the model, such as a control LoRA does.")
    used = sum(delta.tensor_count for *_, delta in found)
    if used < header.tensor_count:
        _log.warning(
            "some tensors of the LoRA fit no layer of the model",
            lora=name,
            unused=header.tensor_count - used,
            used=used,
        )
    loras.add_name(name)
    for component, layer_path, layer, delta in found:
        if component == denoiser_name(pipeline):
            loras.add_to_denoiser(layer_path, layer, name, delta)
        else:
            loras.add_to_encoder(component, layer_path, layer, name, delta)
    _log.info("LoRA loaded", lora=name, layers=len(found), made_for=header.made_for or None)


def _deltas(pipeline: Any, factor: float) -> Iterator[tuple[str, str, torch.nn.Module, LayerDelta]]:
    """Yields component, path, layer and change of each layer that the LoRA in the pipeline changes.

    Raises:
        ModelUnavailable: The LoRA changes something else, or lacks weights.
    """
    # Imported here, because it takes a second.
    from peft.tuners.tuners_utils import BaseTunerLayer

    for component, module in pipeline.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        layers: list[tuple[str, Any]] = [
            (path, each) for path, each in module.named_modules() if isinstance(each, BaseTunerLayer)
        ]
        for path, layer in layers:
            down, up = (getattr(layer, part, {}) for part in ("lora_A", "lora_B"))
            kind = type(layer.get_base_layer()).__name__
            plain = _ADAPTER in down and _ADAPTER in up and not layer.lora_variant
            if not plain or isinstance(layer.get_base_layer(), torch.nn.MultiheadAttention):
                raise ModelUnavailable(f"It changes a layer of the kind {kind} in a way that is not supported.")
            delta = LayerDelta(down[_ADAPTER], up[_ADAPTER], factor * layer.scaling[_ADAPTER])
            if any(parameter.is_meta for part in (down, up) for parameter in part[_ADAPTER].parameters()):
                raise ModelUnavailable(f"The file is incomplete: weights for {path!r} are missing.")
            if component != denoiser_name(pipeline) and not component.startswith("text_encoder"):
                raise ModelUnavailable(f"It changes the {component}, which is not supported.")
            yield component, path, layer.get_base_layer(), delta


def _denoiser(pipeline: Any) -> Any:
    return getattr(pipeline, denoiser_name(pipeline))


def _shapes(pipeline: Any) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in _denoiser(pipeline).named_parameters()}


def _reason(error: Exception) -> str:
    text = str(error)
    if "size mismatch" in text:
        return "Its tensors have other shapes than the layers of the model."
    return f"diffusers cannot read it ({first_line(error)})."


def _origin(header: LoraHeader) -> str:
    return f" The file says that it was made for {header.made_for!r}." if header.made_for else ""
