"""Keeps traced models of OpenVINO on disk: tracing takes seconds."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from typing import TYPE_CHECKING, Any

import diffusers
import structlog
import torch

from calotype_server.engine.disk_cache import config_of, facts_hash, weights_fingerprint

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["load_traced", "save_traced", "traced_path"]

_log = structlog.get_logger(__name__)

_FORMAT = 1
"""Part of the key: increase it when the trace changes its meaning."""

_UNUSED_SECONDS = 30 * 24 * 3600
"""A folder that no start used for this time is removed: it has the size of the weights, and a new version of a library
makes a new one."""


def traced_path(cache_dir: Path, module: Any, structure: str, openvino_version: str) -> Path:
    """Returns the folder for a traced denoiser: named by its weights, the libraries and the structure of its calls."""
    facts = {
        "format": _FORMAT,
        "versions": [torch.__version__, diffusers.__version__, openvino_version],
        "denoiser": type(module).__name__,
        "config": {name: str(value) for name, value in config_of(module).items()},
        "weights": weights_fingerprint(module),
        "structure": structure,
    }
    return cache_dir.expanduser() / "openvino" / facts_hash(facts)[:32]


def load_traced(core: Any, path: Path) -> Any:
    """Returns the traced model in a folder, or None if there is none that can be read."""
    if not path.is_dir():
        return None
    try:
        os.utime(path)
    except OSError:  # The cache is not writable.
        _log.debug("cannot mark the cached OpenVINO model as used", path=str(path))
    try:
        return core.read_model(path / "model.xml")
    except Exception as error:
        _log.warning("cannot read the cached OpenVINO model, tracing again", path=str(path), error=repr(error))
        return None


def save_traced(path: Path, traced: Any) -> None:
    """Writes a traced model, with its weights, completely or not at all. A failure is logged and is no error.

    Models that were not used for 30 days, and incomplete ones of processes that were killed, are removed.
    """
    import openvino

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unused(path.parent)
        folder = tempfile.mkdtemp(dir=path.parent)
        try:
            openvino.save_model(traced, os.path.join(folder, "model.xml"), compress_to_fp16=False)
            shutil.rmtree(path, ignore_errors=True)
            os.rename(folder, path)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except (OSError, RuntimeError) as error:
        _log.warning("cannot write to the cache", kind="OpenVINO model", path=str(path), error=str(error))


def _remove_unused(folder: Path) -> None:
    for each in folder.iterdir():
        if each.is_dir() and each.stat().st_mtime < time.time() - _UNUSED_SECONDS:
            shutil.rmtree(each, ignore_errors=True)
