"""Restores the attention processors of a denoiser."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["restored_processors"]


@contextlib.contextmanager
def restored_processors(module: Any) -> Iterator[None]:
    """Restores the attention processors of a module that no other request uses when the block ends.

    A pipeline with perturbed attention guidance replaces them, and does not restore them if it is stopped.
    """
    before = dict(getattr(module, "attn_processors", {}))
    try:
        yield
    finally:
        now = getattr(module, "attn_processors", {})
        if any(now.get(name) is not processor for name, processor in before.items()):
            module.set_attn_processor(dict(before))
