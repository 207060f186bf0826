"""Keeps fitted preview heads on disk: one file for each decoder, written atomically."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import structlog
import torch
from safetensors import safe_open
from safetensors.torch import save

from calotype_server.engine.capabilities import decoder, denoiser_name
from calotype_server.engine.disk_cache import config_of, weights_fingerprint, write_atomically
from calotype_server.engine.preview.head import HeadStatistics, PreviewHead

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["head_path", "load_head", "save_head"]

_log = structlog.get_logger(__name__)

_FORMAT = 4
"""Part of the key: increase it when heads of an older version no longer fit."""


def head_path(folder: Path, pipeline: Any) -> Path:
    """Returns the file for a pipeline's decoder. The key covers its class, config and weights, and the native size."""
    vae = decoder(pipeline)
    size = getattr(pipeline, denoiser_name(pipeline)).config.get("sample_size")
    # `__class__`, not `type`: a component that is shared by requests is wrapped in an object of another type.
    facts = [
        _FORMAT,
        type(pipeline).__name__,
        size,
        vae.__class__.__name__,
        config_of(vae),
        weights_fingerprint(vae),
    ]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    return folder.expanduser() / "heads" / f"{key.hexdigest()[:32]}.safetensors"


def load_head(path: Path) -> PreviewHead | None:
    """Returns the head, or None without a usable file. Damage is logged; the next `save_head` repairs it."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            checksum = (file.metadata() or {}).get("checksum")
        if checksum != _checksum(stored):
            raise ValueError("its checksum does not match")
        if not all(torch.isfinite(values).all() for values in stored.values()):
            raise ValueError("it holds invalid numbers")
        learned = _unpack("learned", stored) if "learned.inputs" in stored else None
        return PreviewHead(int(stored["scale"]), _unpack("calibration", stored), learned)
    except Exception as error:
        _log.warning("cannot use the cached preview head, calibrating again", path=str(path), error=repr(error))
        return None


def save_head(path: Path, head: PreviewHead) -> None:
    """Writes the head. If the folder is not writable, that is logged, and the next start calibrates again."""
    calibration, learned = _pack("calibration", head.calibration), _pack("learned", head.learned)
    tensors = {"scale": torch.tensor(head.scale), **calibration, **learned}
    write_atomically(path, save(tensors, metadata={"checksum": _checksum(tensors)}), kind="preview head")


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Returns a checksum of names and numbers. The file format has none, and flipped bits would spoil the previews."""
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
