"""Measures the cost of many readers of one generation: denoising time, processor time and the server's memory.

This process reads all previews as bytes, without decoding them, on the same cores as the server. So the wall time also
contains the cost of any busy neighbour. The processor time of the denoising thread is less affected, and shows whether
the thread itself does more work.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from typing import TYPE_CHECKING, Any

import grpc
import psutil

from benchmarks.runs import GUIDANCE
from calotype.v1 import calotype_pb2 as pb
from support.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable

READERS = 200
READERS_PER_CONNECTION = 100
STEPS = 150
"""Enough that the time until all readers have connected does not matter."""

_SERVICE = "/calotype.v1.GenerationService/"


def measure(rounds: int, threads: int) -> dict[str, float]:
    """Returns the cost of 200 readers relative to one reader, in turns on the same server.

    Args:
        rounds: Number of measurements; the median counts.
        threads: Number of torch threads.
    """
    with ServerProcess("--log-level", "warning", "--threads", str(threads)) as server:
        process = psutil.Process(server.process.pid)
        asyncio.run(watched_by(READERS, server.address, process))  # fills pools and caches
        before = process.memory_full_info().uss
        runs = []
        for _ in range(rounds):
            one = asyncio.run(watched_by(1, server.address, process))
            many = asyncio.run(watched_by(READERS, server.address, process))
            runs.append((one, many))
        grown = process.memory_full_info().uss - before
    return {
        "readers200_denoise_over_1": statistics.median(many[0] / one[0] for one, many in runs),
        "readers200_device_cpu_over_1": statistics.median(many[1] / one[1] for one, many in runs),
        "readers200_messages_each": statistics.median(many[2] for _, many in runs),
        "readers200_grown_mb": grown / 1e6,
    }


async def watched_by(readers: int, address: str, process: psutil.Process) -> tuple[float, float, float]:
    """Returns the seconds of denoising, processor seconds of the denoising thread, and messages per reader."""
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            # Without this option, channels to one address share a connection.
            await stack.enter_async_context(
                grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1), ("n", number)])
            )
            for number in range(1 + readers // READERS_PER_CONNECTION)
        ]
        busy = thread_times(process)
        request = pb.GenerateRequest(
            prompt="a red apple",
            seed=1,
            step_count=STEPS,
            guidance_scale=GUIDANCE,
            on_disconnect=pb.DISCONNECT_POLICY_KEEP,
        )
        call = _method(channels[0], "Generate", pb.GenerateRequest.SerializeToString)(request)
        generation_id = pb.Progress.FromString(await call.read()).generation_id
        watch = pb.WatchRequest(generation_id=generation_id)
        watches = [
            _method(channels[number % len(channels)], "Watch", pb.WatchRequest.SerializeToString)(watch)
            for number in range(readers - 1)
        ]
        read = await asyncio.gather(*(_read(each) for each in (call, *watches)))
        end = pb.Progress.FromString(read[0][1])
        assert all(pb.Progress.FromString(last).phase == pb.PHASE_SUCCEEDED for _, last in read)
        spent = {thread: seconds - busy.get(thread, 0.0) for thread, seconds in thread_times(process).items()}
        # The main thread runs the event loop. Of the others, the denoising thread works by far the most.
        device = max(seconds for thread, seconds in spent.items() if thread != process.pid)
        return end.timings.denoising.ToNanoseconds() / 1e9, device, statistics.mean(count for count, _ in read)


def thread_times(process: psutil.Process) -> dict[int, float]:
    """Returns the processor seconds that each thread has used so far."""
    return {thread.id: thread.user_time + thread.system_time for thread in process.threads()}


def _method(channel: grpc.aio.Channel, name: str, serialize: Callable) -> Callable:
    return channel.unary_stream(_SERVICE + name, serialize)


async def _read(call: Any) -> tuple[int, bytes]:
    count, last = 0, b""
    while (message := await call.read()) is not grpc.aio.EOF:
        count, last = count + 1, message
    return count, last
