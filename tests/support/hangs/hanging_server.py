"""Runs `calotype` with a part that hangs once the file HANG_WHEN exists.

The part is the failpoint HANG_POINT; without it, the denoiser, which also logs a warning at each call of a generation.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading

import structlog

from calotype.__main__ import main
from calotype_server.engine.libraries import prepare_libraries
from calotype_server.failpoints import injected

prepare_libraries()  # As the server does before it imports the library.
from diffusers import UNet2DConditionModel  # noqa: E402

_point = os.environ.get("HANG_POINT")
_forward = UNet2DConditionModel.forward


def _hang() -> None:
    if os.path.exists(os.environ["HANG_WHEN"]):
        if _point is not None:
            sys.stderr.write("this thread hangs\n")
        threading.Event().wait()


@functools.wraps(_forward)
def _hanging_forward(*args, **kwargs):
    if _point is None:
        # Not while the server loads: it writes only a few repeated lines of a library.
        if structlog.contextvars.get_contextvars():
            logging.getLogger("a.library").warning("a slow kernel")
        _hang()
    return _forward(*args, **kwargs)


UNet2DConditionModel.forward = _hanging_forward

if __name__ == "__main__":
    with contextlib.nullcontext() if _point is None else injected(_point, _hang):
        main()
