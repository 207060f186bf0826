"""Refuses files that can run code when they are read."""

from __future__ import annotations

from pathlib import PurePath

from calotype_server.errors import ModelUnavailable

__all__ = ["PICKLES", "refuse_pickle"]

PICKLES = frozenset({".bin", ".ckpt", ".pkl", ".pt", ".pth"})
"""Suffixes of files that torch reads with pickle."""


def refuse_pickle(name: str) -> None:
    """Rejects a file by its suffix, without opening it.

    Raises:
        ModelUnavailable: The file is a pickle.
    """
    suffix = PurePath(name).suffix.lower()
    if suffix in PICKLES:
        raise ModelUnavailable(
            f"{name!r} is refused: {suffix} files are pickles, which can run code when they are read. Use a "
            ".safetensors file, or convert it on a machine that may run such code."
        )
