"""Keeps the libraries from writing into the server's log."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import diffusers
import transformers

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet() -> Any:
    """Silences progress bars and advice of the libraries, which would break the server's log."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    yield
