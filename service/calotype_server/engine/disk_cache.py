"""Shared parts of the caches on disk: a fingerprint of weights, and atomic writes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = [
    "config_of",
    "facts_hash",
    "facts_path",
    "load_checked",
    "save_checked",
    "weights_fingerprint",
    "write_atomically",
]

T = TypeVar("T")

_log = structlog.get_logger(__name__)

_SAMPLED_WEIGHTS = 64
"""Weights at each end of a tensor that enter the fingerprint. Reading all of them takes seconds for a large VAE."""


def weights_fingerprint(module: Any) -> str:
    """Returns a hash of a module's weights: of each tensor its name, its shape, and the numbers at both ends."""
    fingerprint = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        for part in _plain_parts(tensor.detach()):
            flat = part.flatten()
            ends = torch.cat([flat[:_SAMPLED_WEIGHTS], flat[-_SAMPLED_WEIGHTS:]]).double().cpu()
            fingerprint.update(f"{name}{tuple(part.shape)}".encode() + ends.numpy().tobytes())
    return fingerprint.hexdigest()


def _plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the tensors that a quantized one consists of, such as integers and scales; a plain tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain_parts(getattr(tensor, name))


def config_of(module: Any) -> dict[str, Any]:
    """Returns a module's config without the entries that diffusers keeps for itself, such as the path of the file."""
    return {name: value for name, value in module.config.items() if not name.startswith("_")}


def facts_hash(value: Any) -> str:
    """Returns a hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def facts_path(cache_dir: Path, folder: str, facts: dict[str, Any]) -> Path:
    """Returns the file in a folder of the cache for a value that depends on these facts."""
    return cache_dir.expanduser() / folder / f"{facts_hash(facts)[:32]}.json"


def load_checked(path: Path, facts: dict[str, Any], decode: Callable[[Any], T], *, key: str, kind: str) -> T | None:
    """Returns a value that `save_checked` wrote, or None if there is none. A file that cannot be used is logged.

    Args:
        path: The file.
        facts: Everything that the value depends on, as plain values.
        decode: Checks and converts the plain value; it may raise any exception.
        key: Name of the value in the file.
        kind: Names the value in the log.
    """
    try:
        stored = json.loads(path.read_bytes())
        if stored["checksum"] != facts_hash([stored["facts"], stored[key]]):
            raise ValueError("its checksum does not match")
        if stored["facts"] != facts:
            raise ValueError("it was measured for something else")
        return decode(stored[key])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        _log.warning(f"cannot use the cached {kind}, measuring again", path=str(path), error=repr(error))
        return None


def save_checked(path: Path, facts: dict[str, Any], value: Any, *, key: str, kind: str) -> None:
    """Writes a plain value with its facts and a checksum. If the folder is not writable, that is logged."""
    content = {key: value, "facts": facts, "checksum": facts_hash([facts, value])}
    write_atomically(path, json.dumps(content, indent=1).encode(), kind=kind)


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
