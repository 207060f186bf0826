"""Finds the components of a model and their weights on disk: in a folder, a single file, or the cache of the hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from calotype_server.engine.loading.quantize import quantizable
from calotype_server.engine.loading.sources import locate
from calotype_server.engine.sizing.headers import Tensor, read_header

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Component", "find_components", "find_source"]

_FILE = re.compile(r"\w+?(?:\.(?P<early>\w+))?(?:-\d+-of-\d+)?(?:\.(?P<late>\w+))?\.safetensors")
"""Weights of a component: a name, a variant such as fp16, and a number if there are several files."""

_PREFIXES = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.", "text_encoders."),
}
"""Beginnings of names in a single file; all other weights belong to the denoiser."""

_EMBEDDINGS = {
    *("embed_tokens", "lm_head", "relative_attention_bias", "shared", "token_embedding", "word_embeddings", "wte"),
    *("position_embedding", "position_embeddings"),
}
"""Layers of language models that are not quantized although their weights are matrices."""

_BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5}
_NF4_SCALE = 4 / 64
"""Bytes for each weight: a float32 for a block of 64."""


@dataclass(frozen=True, slots=True)
class Component:
    """The weights of one model in a pipeline.

    Attributes:
        name: Its name in the pipeline, such as "transformer".
        tensors: Its weights.
        config: Its configuration; empty in a single file.
        quantizable: Whether `--quantize` applies to it.
    """

    name: str
    tensors: tuple[Tensor, ...]
    config: dict[str, Any] = field(default_factory=dict)
    quantizable: bool = False

    @property
    def is_denoiser(self) -> bool:
        """Whether it is a transformer or a UNet."""
        return self.name.startswith(("transformer", "unet"))

    def bytes(self, value_bytes: int, quantize: str = "") -> int:
        """Returns the size of the loaded weights.

        Args:
            value_bytes: Bytes of a value in the chosen format.
            quantize: Format for linear layers; empty for none.
        """
        return sum(self.tensor_bytes(each, value_bytes, quantize) for each in self.tensors)

    def tensor_bytes(self, tensor: Tensor, value_bytes: int, quantize: str = "") -> int:
        """Returns the size of one loaded tensor; see `bytes`."""
        if "quantization_config" in self.config:
            return tensor.stored_bytes
        if quantize and self.quantizable and self._is_linear(tensor):
            scales = tensor.count * _NF4_SCALE if quantize == "nf4" else tensor.shape[0] * value_bytes
            return round(tensor.count * _BYTES[quantize] + scales)
        return tensor.count * value_bytes

    def _is_linear(self, tensor: Tensor) -> bool:
        path = tensor.name.split(".")
        return len(tensor.shape) == 2 and path[-1] == "weight" and not _EMBEDDINGS & set(path[-2:-1])


def find_source(model: str, revision: str | None = None) -> Path | None:
    """Returns the folder or the file of a model on this machine; None for a hub id that is not in the local cache.

    Args:
        model: "bundled", a path, or a hub id.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ModelUnavailable: There is no such path.
    """
    file = Path(model).expanduser()
    if file.is_file():
        return file
    source = locate(model)
    if isinstance(source, Path):
        return source
    try:
        return Path(huggingface_hub.snapshot_download(source, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def find_components(source: Path, variant: str | None = None) -> list[Component]:
    """Returns the components with weights.

    Args:
        source: A diffusers folder, or a single safetensors file.
        variant: Variant of the weights, such as "fp16".

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: A file is damaged.
    """
    if source.is_file():
        return _in_file(read_header(source))
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    large = quantizable(index)
    found = []
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None or not (source / name / "config.json").is_file():
            continue
        config = json.loads((source / name / "config.json").read_text(encoding="utf-8"))
        tensors = [tensor for file in _weights(source / name, variant) for tensor in read_header(file)]
        if tensors:
            found.append(Component(name, tuple(tensors), config, name in large))
    return found


def _weights(folder: Path, variant: str | None) -> Iterable[Path]:
    """Returns the files of a variant; those without one if there is none, as loading does."""
    groups: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if match := _FILE.fullmatch(file.name):
            groups.setdefault(match["early"] or match["late"], []).append(file)
    return groups.get(variant) or groups.get(None, [])


def _in_file(tensors: list[Tensor]) -> list[Component]:
    parts: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        names = (name for name, prefixes in _PREFIXES.items() if tensor.name.startswith(prefixes))
        parts.setdefault(next(names, "transformer"), []).append(tensor)
    # `--quantize` needs a folder.
    return [Component(name, tuple(part)) for name, part in parts.items()]
