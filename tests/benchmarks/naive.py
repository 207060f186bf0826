"""Serves the bundled model with threads but without batching, as a baseline for `make bench`.

Each generation has its own thread and request view and calls the shared denoiser itself, like the example of an
asynchronous server in diffusers. Everything else is the product. Run as a process; it prints its address.
"""

from __future__ import annotations

import asyncio
import sys

from benchmarks.runs import bundled_engine
from support.service import running

ACTIVE = 8


async def main() -> None:
    """Serves until standard input is closed."""
    async with running(bundled_engine(max_active=1), max_active=ACTIVE, max_queue=32) as service:
        print(service.address, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
