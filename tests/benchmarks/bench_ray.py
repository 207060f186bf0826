"""Measures the overhead of Ray: `make bench-ray` prints a table and writes build/bench-ray.json.

It compares scripted messages of 20 KB from the plain server and from the same servicer on Ray, then images of the
bundled model from one replica and from two, in alternating rounds. Compare ratios, not seconds, which depend on the
machine. Two replicas, the ingress and the clients share its cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from support.ray.cluster import ROOT, RayCluster

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype.v1.calotype_pb2_grpc import GenerationServiceAsyncStub

ROUNDS = int(os.environ.get("ROUNDS", "5"))
PACED, PACE_SECONDS = 40, 0.02
UNPACED = 400
STREAMS = 8
CANCELS = 20
PICTURES = 32
GOALS = {"replicas2_over_1": ">= 1.8"}
OUTPUT = Path("build/bench-ray.json")


def main() -> None:
    """Runs all measurements, prints the table and writes the file."""
    results: dict[str, float] = {"cores": os.cpu_count() or 0}
    with tempfile.TemporaryDirectory() as folder:
        results |= asyncio.run(transports(Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        results |= asyncio.run(replicas(Path(folder)))
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps({name: round(value, 4) for name, value in results.items()}, indent=2) + "\n")
    for name, value in results.items():
        print(f"{name:32} {value:10.3f}  {GOALS.get(name, '')}")


async def transports(folder: Path) -> dict[str, float]:
    """Compares the plain server with Ray: lag, processor time of all serving processes, cancels."""

    def scripted(config: dict[str, Any], deployment: dict[str, Any]) -> None:
        config["applications"][0]["import_path"] = "benchmarks.scripted_ray:app"
        deployment["num_replicas"] = 1
        deployment["ray_actor_options"]["runtime_env"]["env_vars"]["PYTHONPATH"] = str(ROOT / "tests")

    found: dict[str, list[float]] = {}
    plain = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs yet
        [sys.executable, "-m", "benchmarks.scripted"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        address = plain.stdout.readline().split()[0]
        # Same niceness as Ray's replicas.
        psutil.Process(plain.pid).nice(15)
        with RayCluster(folder, scripted, PYTHONPATH=str(ROOT / "tests")) as cluster:
            servers = {
                "plain": (address, lambda: cpu_of([psutil.Process(plain.pid)])),
                "ray": (cluster.address, lambda: cpu_of(ray_processes())),
            }
            for number in range(ROUNDS + 1):
                for name, (target, cpu) in servers.items():
                    measured = await one_round(target, cpu)
                    if number:  # the first round warms up
                        for what, value in measured.items():
                            found.setdefault(f"{name}_{what}", []).append(value)
    finally:
        plain.stdin.close()
        plain.wait(10)
    results = {name: statistics.median(values) for name, values in found.items()}
    for what in ("lag_ms", "cpu_ms_per_message", "messages_per_second", "cancel_ms"):
        ratios = [ray / own for ray, own in zip(found[f"ray_{what}"], found[f"plain_{what}"], strict=True)]
        results[f"{what}_ray_over_plain"] = statistics.median(ratios)
    results["lost_cancels"] = sum(found["ray_lost_cancels"])
    return results


async def one_round(target: str, cpu: Callable[[], float]) -> dict[str, float]:
    """Measures one server in one round."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = GenerationServiceStub(channel)

        async def lags() -> list[float]:
            request = pb.GenerateRequest(step_count=PACED)
            request.preview.min_interval.FromNanoseconds(round(PACE_SECONDS * 1e9))
            return [(time.monotonic_ns() - message.sequence) / 1e6 async for message in stub.Generate(request)]

        async def drain() -> int:
            return len([0 async for _ in stub.Generate(pb.GenerateRequest(step_count=UNPACED))])

        paced = [lag for each in await asyncio.gather(*(lags() for _ in range(STREAMS))) for lag in each]
        before, started = cpu(), time.monotonic()
        messages = sum(await asyncio.gather(*(drain() for _ in range(STREAMS))))
        seconds, spent = time.monotonic() - started, cpu() - before
        return {
            "lag_ms": statistics.median(paced),
            "messages_per_second": messages / seconds,
            "cpu_ms_per_message": spent * 1000 / messages,
            **await cancels(stub),
        }


async def cancels(stub: GenerationServiceAsyncStub) -> dict[str, float]:
    """Cancels calls right after a message; the servicer's list contains the time of each cancel."""
    took, lost = [], 0
    for number in range(CANCELS):
        request = pb.GenerateRequest(
            step_count=10_000, request_id=f"cancel-{os.getpid()}-{number}-{time.monotonic_ns()}"
        )
        request.preview.min_interval.FromNanoseconds(round(PACE_SECONDS * 1e9))
        call = stub.Generate(request)
        for _ in range(2):
            await call.read()
        sent = time.monotonic_ns()
        call.cancel()
        for _ in range(100):
            answer = await stub.ListGenerations(pb.ListGenerationsRequest())
            heard = {each.request_id: each.create_time.ToNanoseconds() for each in answer.generations}
            if request.request_id in heard:
                took.append((heard[request.request_id] - sent) / 1e6)
                break
            await asyncio.sleep(0.01)
        else:
            lost += 1
    return {"cancel_ms": statistics.median(took), "lost_cancels": lost}


async def replicas(folder: Path) -> dict[str, float]:
    """Returns images per second of two replicas over those of one, with one torch thread each."""
    counts: dict[int, list[float]] = {1: [], 2: []}
    with RayCluster(folder) as cluster:
        for number in range(2 * max(2, ROUNDS // 2)):
            cluster.deployment["num_replicas"] = 2 - number % 2
            await cluster.apply()
            await cluster.until_running()
            await pictures(cluster.address, 8)
            started = time.monotonic()
            await pictures(cluster.address, PICTURES)
            counts[2 - number % 2].append(PICTURES / (time.monotonic() - started))
    one, two = (statistics.median(counts[number]) for number in (1, 2))
    return {"replicas1_pictures_per_second": one, "replicas2_pictures_per_second": two, "replicas2_over_1": two / one}


async def pictures(address: str, number: int) -> None:
    """Generates `number` images at once, without previews."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = GenerationServiceStub(channel)

        async def one(seed: int) -> None:
            request = pb.GenerateRequest(prompt="fox", seed=seed)
            request.preview.method = pb.PREVIEW_METHOD_NONE
            phases = [message.phase async for message in stub.Generate(request)]
            assert phases[-1] == pb.PHASE_SUCCEEDED

        await asyncio.gather(*(one(seed) for seed in range(number)))


def ray_processes() -> list[psutil.Process]:
    """Returns all processes of the cluster, including the ingress."""
    head = psutil.Process(int((ROOT / "build" / "ray" / "pid").read_text()))
    return [head, *head.children(recursive=True)]


def cpu_of(processes: list[psutil.Process]) -> float:
    """Returns the processor time of the processes in seconds."""
    return sum(sum(each.cpu_times()[:2]) for each in processes if each.is_running())


if __name__ == "__main__":
    main()
