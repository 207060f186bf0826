"""Two replicas of the bundled model on Ray Serve, through its ingress: `make test-ray`."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import calotype
from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from support.callers import STEPS, Job, until
from support.grpcweb import WebChannel
from support.process import BridgeProcess
from support.ray.cluster import RayCluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPTS = ("a red apple", "fox", "banana", "umbrella")
JOBS = 40
LONG = 150
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A Ray cluster for all tests."""
    with RayCluster(tmp_path_factory.mktemp("ray"), PYTHONPATH=str(TESTS)) as cluster:
        yield cluster


@pytest.fixture
async def client(cluster: RayCluster) -> AsyncIterator[calotype.AsyncClient]:
    """A client that resumes lost streams."""
    async with calotype.AsyncClient(cluster.address, stall_timeout=2.0, retries=100) as client:
        yield client


@pytest.fixture
async def stub(cluster: RayCluster) -> AsyncIterator[Any]:
    """A stub that does not resume."""
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        yield GenerationServiceStub(channel)


async def all_ended(client: calotype.AsyncClient) -> list[calotype.GenerationSummary]:
    """Waits until all generations have ended, and returns them."""
    async with asyncio.timeout(60):
        while True:
            known = [each async for each in client.generations()]
            if all(each.phase.ended for each in known):
                return known
            await asyncio.sleep(0.2)


async def both_reachable(client: calotype.AsyncClient) -> None:
    """Waits until the ingress knows both replicas, which is slightly after Ray reports them as running."""
    known = set()
    while len(known) < 2:
        known.add((await client.model()).replica)


async def on_each(client: calotype.AsyncClient) -> dict[Job, asyncio.Task[bytes]]:
    """Starts long generations, and returns one of each replica with its caller."""
    await both_reachable(client)
    step = asyncio.Event()
    jobs = [Job("fox") for _ in range(8)]
    tasks = [asyncio.create_task(job.run(client, step, LONG)) for job in jobs]
    await until(lambda: len({home for job in jobs for home in job.homes}) == 2 and all(job.seen for job in jobs), step)
    found = {job.homes[0]: (job, task) for job, task in zip(jobs, tasks, strict=True)}
    for task in set(tasks) - {task for _, task in found.values()}:
        task.cancel()
    return dict(found.values())


async def test_an_image_streams_with_its_previews(client: calotype.AsyncClient) -> None:
    """Previews arrive in order, and the last message contains the image."""
    generation = client.generate("a red apple", seed=5, steps=8)
    seen = [progress async for progress in generation]
    assert [progress.image_step for progress in seen if progress.preview] == sorted(
        {progress.image_step for progress in seen if progress.preview}
    )
    assert sum(progress.preview is not None for progress in seen) >= 4
    assert seen[-1].phase == "succeeded"
    assert (await generation.result()).data.startswith(b"\x89PNG")


async def test_violations_arrive_typed(client: calotype.AsyncClient) -> None:
    """A rejection before the first message carries its code and details, with all violations at once."""
    with pytest.raises(calotype.InvalidRequest) as rejected:
        await client.generate("", width=7, steps=100_000).result()
    assert {violation.field for violation in rejected.value.violations} >= {"width", "steps"}


@pytest.mark.parametrize("method", ["Cancel", "Finish", "Watch"])
async def test_an_unknown_generation_is_not_found(stub: Any, method: str) -> None:
    """Every method returns NOT_FOUND with the reason OTHER_REPLICA for an unknown id, from any replica."""
    request = getattr(pb, f"{method}Request")(generation_id="feedbeef.unknown")
    with pytest.raises(grpc.aio.AioRpcError) as rejected:
        call = getattr(stub, method)(request)
        await (call.read() if method == "Watch" else call)
    assert rejected.value.code() is grpc.StatusCode.NOT_FOUND
    assert b"OTHER_REPLICA" in dict(rejected.value.trailing_metadata())["grpc-status-details-bin"]


async def test_every_replica_reaches_every_generation(client: calotype.AsyncClient) -> None:
    """Watch, list, finish and cancel calls find a generation through any replica that the ingress chooses."""
    (one, finished), (other, cancelled) = (await on_each(client)).items()
    to_finish, to_cancel = one.seen[0].generation_id, other.seen[0].generation_id
    for _ in range(4):  # the ingress chooses either replica
        for generation_id in (to_finish, to_cancel):
            progress = await anext(aiter(client.watch(generation_id)))
            assert progress.generation_id == generation_id
        assert {to_finish, to_cancel} <= {each.generation_id async for each in client.generations()}
    for _ in range(4):
        await client.finish(to_finish)
        await client.cancel(to_cancel)
    assert await finished
    assert one.seen[-1].finished_early
    with pytest.raises(calotype.Cancelled):
        await cancelled
    await all_ended(client)


async def test_a_cancelled_call_frees_its_slot(client: calotype.AsyncClient, stub: Any) -> None:
    """Each of 24 calls that are cancelled right after a message, 8 at a time, ends its generation."""

    async def cancel_one() -> str:
        call = stub.Generate(pb.GenerateRequest(prompt="fox", step_count=LONG))
        message = await call.read()
        while not message.image:
            message = await call.read()
        call.cancel()
        return message.generation_id

    cancelled = {each for _ in range(3) for each in await asyncio.gather(*(cancel_one() for _ in range(8)))}
    known = {each.generation_id: each.phase for each in await all_ended(client)}
    assert [known[each] for each in cancelled] == ["cancelled"] * 24


async def test_a_deadline_ends_the_generation(client: calotype.AsyncClient, stub: Any) -> None:
    """The caller gets DEADLINE_EXCEEDED, and the server cancels the generation."""
    call = stub.Generate(pb.GenerateRequest(prompt="fox", step_count=LONG), timeout=0.4)
    message = await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        while await call.read() is not grpc.aio.EOF:
            pass
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    known = {each.generation_id: each.phase for each in await all_ended(client)}
    assert known[message.generation_id] == "cancelled"


async def test_the_bridge_reaches_the_replicas(cluster: RayCluster) -> None:
    """A browser's calls pass the bridge and the ingress: previews arrive one by one, errors keep their details."""
    with BridgeProcess("--upstream", cluster.address) as bridge:
        channel = WebChannel(bridge.web_address)
        stub = channel.stub()
        call, previews, last = stub.Generate(pb.GenerateRequest(prompt="fox", step_count=8)), 0, None
        while (message := await call.read()) is not grpc.aio.EOF:
            previews += message.image_kind == pb.IMAGE_KIND_PREDICTED
            last = message
        assert previews >= 4
        assert last.phase == pb.PHASE_SUCCEEDED
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await stub.Generate(pb.GenerateRequest(prompt="", width_px=7)).read()
        assert rejected.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        channel.close()


async def test_the_bridge_reports_a_crashed_replica(cluster: RayCluster, client: calotype.AsyncClient) -> None:
    """Streams of the crashed replica end with UNAVAILABLE, so that clients resume; streams of the other continue."""
    victim = next(iter((await cluster.until_running()).values()))
    await both_reachable(client)
    with BridgeProcess("--upstream", cluster.address) as bridge:

        async def follow(denoising: asyncio.Event) -> grpc.StatusCode:
            channel = WebChannel(bridge.web_address)
            call = channel.stub().Generate(pb.GenerateRequest(prompt="fox", step_count=LONG))
            try:
                while (message := await call.read()) is not grpc.aio.EOF:
                    if message.phase == pb.PHASE_DENOISING:
                        denoising.set()
            except grpc.aio.AioRpcError as error:
                return error.code()
            finally:
                channel.close()
            return grpc.StatusCode.OK

        denoising = [asyncio.Event() for _ in range(6)]
        calls = [asyncio.create_task(follow(each)) for each in denoising]
        await asyncio.gather(*(each.wait() for each in denoising))
        os.kill(victim, signal.SIGKILL)
        codes = Counter(await asyncio.gather(*calls))
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    await cluster.until_running()


async def test_a_page_survives_a_crashed_replica(cluster: RayCluster, client: calotype.AsyncClient) -> None:
    """A page in a real browser, behind bridge and ingress, shows each image once, equal to an undisturbed one."""
    victim = next(iter((await cluster.until_running()).values()))
    await both_reachable(client)
    variables = {"CALOTYPE_RAY_ADDRESS": cluster.address, "CALOTYPE_RAY_VICTIM": str(victim)}
    process = await asyncio.create_subprocess_exec(
        *("npm", "test", "--", "ray"), cwd=TESTS.parent / "web", env={**os.environ, **variables}, stdout=subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert b"1 passed" in output
    await cluster.until_running()


async def test_forty_callers_survive_a_frozen_and_a_killed_replica(
    cluster: RayCluster, client: calotype.AsyncClient
) -> None:
    """After SIGSTOP of one replica and SIGKILL of the other, each caller gets the undisturbed image exactly once."""
    step = asyncio.Event()
    before = await cluster.until_running()
    await both_reachable(client)
    undisturbed = {prompt: (await client.generate(prompt, seed=5, steps=STEPS).result()).data for prompt in PROMPTS}
    jobs = [Job(prompt) for prompt, _ in zip(itertools.cycle(PROMPTS), range(JOBS), strict=False)]
    running = [asyncio.create_task(job.run(client, step)) for job in jobs]

    def halfway() -> set[str]:
        return {job.homes[-1] for job in jobs if job.seen and job.is_halfway(job.homes[-1])}

    frozen, killed = before.values()
    await until(lambda: len(halfway()) == 2, step)
    os.kill(frozen, signal.SIGSTOP)
    await until(lambda: any(len(job.homes) > 1 for job in jobs), step)
    os.kill(frozen, signal.SIGCONT)
    await until(lambda: len(halfway()) == 2 or all(task.done() for task in running), step)
    os.kill(killed, signal.SIGKILL)
    pictures = await asyncio.gather(*running)
    after = await cluster.until_running()
    assert killed not in after.values()
    made = Counter(each.request_id for each in await all_ended(client) if each.phase == "succeeded")
    assert set(made.values()) == {1}
    assert sum(len(job.homes) > 1 for job in jobs) >= 2
    for job, picture in zip(jobs, pictures, strict=True):
        assert picture == undisturbed[job.prompt]
        assert [each.sequence for each in job.seen] == sorted({each.sequence for each in job.seen})
        assert [each.step for each in job.seen] == sorted(each.step for each in job.seen)
        assert [each.phase.ended for each in job.seen].count(True) == 1


async def test_a_frozen_replica_is_replaced(cluster: RayCluster, client: calotype.AsyncClient) -> None:
    """Ray replaces a replica that does not respond, and another replica serves its callers."""
    before = await cluster.until_running()
    name, pid = next(iter(before.items()))
    both = await on_each(client)
    os.kill(pid, signal.SIGSTOP)
    assert all(await asyncio.gather(*both.values()))
    await cluster.until_running(unlike={name: pid}, stopping=1)
    # Otherwise Ray waits for it as long as for a draining replica.
    os.kill(pid, signal.SIGKILL)
    await cluster.until_running()


@pytest.fixture
async def mortal(cluster: RayCluster) -> AsyncIterator[dict[str, int]]:
    """Replicas whose engine fails or hangs on certain prompts; restores the normal replicas afterwards."""
    config, environment = cluster.application, cluster.environment
    before = await cluster.until_running()
    path, variables = config["import_path"], dict(environment)
    config["import_path"] = "support.ray.mortal:app"
    environment["CALOTYPE_WATCHDOG_SECONDS"] = "2"
    await cluster.apply()
    mortals = await cluster.until_running(unlike=before)
    yield mortals
    config["import_path"] = path
    environment.clear()
    environment |= variables
    before = await cluster.until_running()
    await cluster.apply()
    await cluster.until_running(unlike=before)


@pytest.mark.parametrize(("prompt", "reason"), [("die", "ENGINE_DEAD"), ("hang", "ENGINE_STALLED")])
async def test_a_replica_with_a_dead_engine_is_replaced(
    cluster: RayCluster, mortal: dict[str, int], client: calotype.AsyncClient, prompt: str, reason: str
) -> None:
    """The caller gets the reason; the health check or the watchdog replaces the replica; other calls succeed."""
    async with calotype.AsyncClient(cluster.address, retries=0) as plain:
        with pytest.raises(calotype.CalotypeError) as caught:
            await plain.generate(prompt).result()
    assert caught.value.reason == reason
    while mortal.keys() <= (await cluster.until_running()).keys():
        await client.generate("fox").result()
    await both_reachable(client)
    await asyncio.gather(*(client.generate("fox").result() for _ in range(8)))


async def test_a_rolling_update_interrupts_no_stream(cluster: RayCluster) -> None:
    """While every replica is replaced, callers that cannot resume get every image."""
    before = await cluster.until_running()
    updated = asyncio.Event()

    async def call_on() -> int:
        pictures = 0
        async with grpc.aio.insecure_channel(cluster.address) as channel:
            stub = GenerationServiceStub(channel)
            while not updated.is_set():
                phases = [
                    message.phase async for message in stub.Generate(pb.GenerateRequest(prompt="fox", step_count=50))
                ]
                assert phases[-1] == pb.PHASE_SUCCEEDED
                pictures += 1
        return pictures

    callers = [asyncio.create_task(call_on()) for _ in range(4)]
    cluster.environment["CALOTYPE_RETAIN_COUNT"] = "255"
    await cluster.apply()
    await cluster.until_running(unlike=before)
    updated.set()
    assert all(await asyncio.gather(*callers))
