"""Runs `calotype` with a denoiser that logs a warning at each call, and hangs once the file HANG_WHEN exists."""

from __future__ import annotations

import functools
import logging
import os
import threading

from diffusers import UNet2DConditionModel

from calotype.__main__ import main

_forward = UNet2DConditionModel.forward


@functools.wraps(_forward)
def _hanging_forward(*args, **kwargs):
    logging.getLogger("a.library").warning("a slow kernel")
    if os.path.exists(os.environ["HANG_WHEN"]):
        threading.Event().wait()
    return _forward(*args, **kwargs)


UNet2DConditionModel.forward = _hanging_forward

if __name__ == "__main__":
    main()
