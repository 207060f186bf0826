"""Reads the headers of safetensors files: names, shapes and formats of the weights, without the weights."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Tensor", "read_header"]

_MAX_HEADER = 100 * 2**20
"""Bytes; the limit of the safetensors library."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor: its name, its shape, its format such as "BF16", and its size in bytes."""

    name: str
    shape: tuple[int, ...]
    format: str
    stored_bytes: int

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def read_header(file: Path) -> list[Tensor]:
    """Returns the tensors of a file.

    The file begins with the length of the header, 8 bytes with the lowest first, and the header in JSON:
    https://github.com/huggingface/safetensors#format

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a safetensors file.
    """
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER:
            raise ValueError(f"{file.name} is not a safetensors file")
        try:
            header = json.loads(stream.read(length))
            return [
                Tensor(name, tuple(entry["shape"]), entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0])
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{file.name} is not a safetensors file") from error
