"""Silences the output of libraries while they load models."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING

import diffusers
import transformers

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences progress bars and advice of the libraries, which would break the server's log.

    During the block, diffusers does not log errors either: it raises each of them too, and the operator gets one
    message.
    """
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    # The hub's library prints its warnings, and also passes them on to the server's log.
    logging.getLogger("huggingface_hub").handlers.clear()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    # diffusers passes an argument to the hub's library that this no longer uses.
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument", UserWarning)
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity_error()
