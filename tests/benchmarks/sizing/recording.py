"""`calotype serve` that writes down every call of the denoiser: run as a process, with a file's name first.

A line for each call, in JSON: when it began and how long it took, in seconds, its rows, and the numbers of its streams.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calotype_server.engine.batching.batcher import BatchRecord


def main() -> None:
    """Serves."""
    path = Path(sys.argv.pop(1))
    # As the server does it, which imports torch later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from calotype.__main__ import main as calotype
    from calotype_server.engine import diffusers

    with path.open("a", buffering=1, encoding="utf-8") as lines:

        def write(batch: BatchRecord) -> None:
            print(json.dumps([batch.started, batch.seconds, batch.rows, batch.streams]), file=lines)

        diffusers.DiffusersEngine = functools.partial(diffusers.DiffusersEngine, on_batch=write)
        calotype()


if __name__ == "__main__":
    main()
