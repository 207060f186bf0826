"""Runs `calotype serve` and records each call of the denoiser. The first argument is the file to write.

Each line of the file is a call in JSON: its start and duration in seconds, its rows, and the numbers of its sessions.
With `PRETEND_STEP_MS=2:50,4:60` in the environment, the denoiser does not compute but sleeps for the time that a device
would take for the number of rows. Everything else is the product.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.sizing.fleet import Model, parse_step_ms

if TYPE_CHECKING:
    from calotype_server.engine.batching.batch_runner import BatchRecord


def main() -> None:
    """Runs the server."""
    path = Path(sys.argv.pop(1))
    # Same as in the server, before the import of torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from calotype.__main__ import main as calotype
    from calotype_server.engine import assembly

    with path.open("a", buffering=1, encoding="utf-8") as lines:

        def write(batch: BatchRecord) -> None:
            print(json.dumps([batch.started, batch.seconds, batch.rows, batch.sessions]), file=lines)

        make, table = assembly.build_engine, os.environ.get("PRETEND_STEP_MS")

        def engine(name: str, pipeline: Any, **options: Any) -> Any:
            if table:
                _pretend(pipeline.unet, Model(parse_step_ms(table)))
            return make(name, pipeline, on_batch=write, **options)

        assembly.build_engine = engine
        calotype()


def _pretend(unet: Any, model: Model) -> None:
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    @functools.wraps(unet.forward)  # the server reads from the signature which calls can be joined
    def forward(*args: Any, **kwargs: Any) -> Any:
        sample = kwargs["sample"] if "sample" in kwargs else args[0]
        time.sleep(model.seconds(len(sample)))
        answer = torch.zeros_like(sample)
        return UNet2DConditionOutput(answer) if kwargs.get("return_dict", True) else (answer,)

    unet.forward = forward


if __name__ == "__main__":
    main()
