"""Keeps calibrated heads on disk: one file for each decoder, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from typing import TYPE_CHECKING, Any

import structlog
import torch
from safetensors import safe_open
from safetensors.torch import save

from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.preview.head import HeadStatistics, PreviewHead

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["cache_path", "load_head", "save_head"]

_log = structlog.get_logger(__name__)

_FORMAT = 3
"""Part of the key: raise it when heads of an older version no longer fit."""

_SAMPLED = 64
"""Weights of each tensor that enter the checksum, from both ends: reading all would cost seconds on a large VAE."""


def cache_path(folder: Path, pipeline: Any) -> Path:
    """Returns the file for a pipeline's decoder: the key covers its class, config and weights, and the native size."""
    vae = pipeline.vae
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    key = hashlib.sha256()
    size = getattr(pipeline, denoiser_name(pipeline)).config.get("sample_size")
    # Its class as it says itself: what is shared among requests stands in for another.
    facts = [_FORMAT, type(pipeline).__name__, size, vae.__class__.__name__, config]
    key.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        flat = tensor.detach().flatten()
        ends = torch.cat([flat[:_SAMPLED], flat[-_SAMPLED:]]).double().cpu()
        key.update(f"{name}{tuple(tensor.shape)}".encode() + ends.numpy().tobytes())
    return folder.expanduser() / "heads" / f"{key.hexdigest()[:32]}.safetensors"


def load_head(path: Path) -> PreviewHead | None:
    """Returns the head, or None when there is none or the file is damaged; that is logged, and heals by itself."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            told = (file.metadata() or {}).get("checksum")
        if told != _checksum(stored):
            raise ValueError("its numbers are not those that were written")
        if not all(torch.isfinite(values).all() for values in stored.values()):
            raise ValueError("it holds invalid numbers")
        seen = _unpack("seen", stored) if "seen.inputs" in stored else None
        return PreviewHead(int(stored["scale"]), _unpack("planted", stored), seen)
    except Exception as error:
        _log.warning("preview head in the cache is damaged, calibrating anew", path=str(path), error=repr(error))
        return None


def save_head(path: Path, head: PreviewHead) -> None:
    """Writes the head; a folder that cannot be written costs the next start a calibration, and a line in the log."""
    tensors = {"scale": torch.tensor(head.scale), **_pack("planted", head.planted), **_pack("seen", head.seen)}
    content = save(tensors, metadata={"checksum": _checksum(tensors)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        _log.warning("preview head cannot be cached", path=str(path), error=str(error))


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Of the names and numbers: the format has none, and a head of flipped bits would draw in silence."""
    checksum = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        checksum.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return checksum.hexdigest()


def _pack(name: str, statistics: HeadStatistics | None) -> dict[str, torch.Tensor]:
    if statistics is None:
        return {}
    count = torch.tensor(statistics.count, dtype=torch.float64)
    return {f"{name}.inputs": statistics.inputs, f"{name}.products": statistics.products, f"{name}.count": count}


def _unpack(name: str, stored: dict[str, torch.Tensor]) -> HeadStatistics:
    return HeadStatistics(stored[f"{name}.inputs"], stored[f"{name}.products"], float(stored[f"{name}.count"]))
