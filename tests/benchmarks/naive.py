"""Serves the bundled model as threads without a batcher would: what `make bench` compares batching with.

Every generation has a thread and a view of its own and calls the shared denoiser itself, as diffusers' own example of
an asynchronous server does; everything else is the product. Run as a process: it prints its address.
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
