"""Prepares torch, diffusers and transformers before they are imported. Importing this module does not import them."""

from __future__ import annotations

import logging
import os
import warnings

__all__ = ["prepare_libraries"]

_TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers that warn during each import of torchao about kernels for other machines, and about its own classes."""


def prepare_libraries() -> None:
    """Sets environment variables and log levels that libraries read when they are imported.

    Their advice for developers, which operators can do nothing about, would fill the log of each start. Errors stay
    visible, and levels that the operator's environment sets stay as they are.
    """
    # OpenMP's threads spin while they wait for each other. A server shares its cores, at least with its own event loop,
    # and spinning was measured to make a step up to twenty times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    # A record of torchao's missing Triton has no other logger than the root.
    logging.getLogger().addFilter(_is_useful)
    # A scheduler's times differ in the last bit from those of its noise.
    warnings.filterwarnings("ignore", r"Should have t[ab][<>]=", UserWarning)


def _is_useful(record: logging.LogRecord) -> bool:
    return "Detected no triton" not in str(record.msg)
