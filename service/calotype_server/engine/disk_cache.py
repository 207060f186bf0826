"""Shared parts of the caches on disk: a fingerprint of weights, and atomic writes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from typing import TYPE_CHECKING, Any

import structlog
import torch

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["config_of", "weights_fingerprint", "write_atomically"]

_log = structlog.get_logger(__name__)

_SAMPLED_WEIGHTS = 64
"""Weights at each end of a tensor that enter the fingerprint. Reading all of them takes seconds for a large VAE."""


def weights_fingerprint(module: Any) -> str:
    """Returns a hash of a module's weights: of each tensor its name, its shape, and the numbers at both ends."""
    fingerprint = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        ends = torch.cat([flat[:_SAMPLED_WEIGHTS], flat[-_SAMPLED_WEIGHTS:]]).double().cpu()
        fingerprint.update(f"{name}{tuple(tensor.shape)}".encode() + ends.numpy().tobytes())
    return fingerprint.hexdigest()


def config_of(module: Any) -> dict[str, Any]:
    """Returns a module's config without the entries that diffusers keeps for itself, such as the path of the file."""
    return {name: value for name, value in module.config.items() if not name.startswith("_")}


def write_atomically(path: Path, content: bytes, *, kind: str) -> None:
    """Writes a file completely or not at all. A failure is logged and is no error: the next start does the work again.

    Args:
        path: The file; its folder is created.
        content: All of the file.
        kind: Names the content in the log, such as "preview head".
    """
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
        _log.warning("cannot write to the cache", kind=kind, path=str(path), error=str(error))
