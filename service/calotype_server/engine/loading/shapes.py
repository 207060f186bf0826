"""Reads the names and shapes of the weights in a single file, without the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from calotype_server.engine.loading.checks.packages import needs_packages
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_shapes"]


def read_shapes(file: Path) -> dict[str, torch.Tensor]:
    """Returns tensors without memory, by name.

    Raises:
        ModelUnavailable: The file is damaged, or the package that reads it is not installed.
    """
    try:
        shapes = _read_gguf(file) if file.suffix == ".gguf" else _read_safetensors(file)
    except ImportError:
        raise ModelUnavailable(needs_packages(f"The GGUF file {str(file)!r}", ["gguf"])) from None
    except Exception as error:
        raise ModelUnavailable(f"The file {str(file)!r} is damaged, or not a {file.suffix} file.") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _read_safetensors(file: Path) -> dict[str, list[int]]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - it is no dict


def _read_gguf(file: Path) -> dict[str, list[int]]:
    from gguf import GGUFReader

    # The file lists the innermost dimension first.
    return {tensor.name: [int(size) for size in reversed(tensor.shape)] for tensor in GGUFReader(file).tensors}
