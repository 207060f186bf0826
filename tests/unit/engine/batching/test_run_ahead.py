"""Launches and lateness on a device that computes after a launch has returned."""

import random
import statistics
import threading

import pytest
import torch

from calotype_server.engine.batching.launches import Launches
from calotype_server.engine.batching.run_ahead import RunAhead
from calotype_server.types import Schedule
from support.engine.batching import Callers, answer_to
from support.engine.device import LaggingDevice
from support.engine.scheduling import Request, VirtualDevice
from support.runs import PATIENCE

STEP = 0.1


def eight(synchronises, schedule=Schedule.FIRST_LOOK, **options):
    """Returns a device after eight requests of 50 steps have run, with delays of up to a fifth of a step."""
    delays = random.Random(1)
    requests = [
        Request(
            number,
            steps=50,
            arrives=delays.uniform(0, 0.9 * STEP),
            host=lambda _: delays.uniform(0.002, 0.02),
            synchronises=synchronises(number),
        )
        for number in range(8)
    ]
    return VirtualDevice(max_rows=16, step=STEP, schedule=schedule, **options).run(requests)


class TestWholeBatches:
    """Batches of eight requests stay whole, whether a pipeline waits for an answer to be computed or not."""

    @pytest.mark.parametrize("schedule", Schedule)
    @pytest.mark.parametrize("launch", [0.002, 0.02, 0.07])
    def test_requests_that_wait_for_the_device_are_on_time(self, schedule, launch):
        """With schedulers that synchronise, such as DDIM, the mean batch has at least 15 of 16 rows."""
        assert eight(lambda _: True, schedule, launch=launch).mean_rows() >= 15

    @pytest.mark.parametrize("launch", [0.002, 0.02, 0.07])
    def test_the_device_never_pauses_for_requests_that_do_not_wait(self, launch):
        """With schedulers that do not synchronise, the next batch is launched before the device is idle."""
        device = eight(lambda _: False, launch=launch)
        assert device.mean_rows() >= 15
        assert device.idle <= 0.01 * STEP * len(device.batches)

    def test_both_kinds_share_batches(self):
        """Requests that do not wait for the device join those that do."""
        assert eight(lambda number: number % 2 == 0, launch=0.002).mean_rows() >= 15

    def test_a_late_request_delays_others_once(self):
        """A request that needs half a step between its steps is not waited for at every step."""
        quick = [Request(number, steps=40, synchronises=True, host=0.002) for number in range(3)]
        slow = Request(3, steps=20, synchronises=True, host=0.5 * STEP)
        device = VirtualDevice(max_rows=16, step=STEP, launch=0.002).run([*quick, slow])
        assert max(request.ended_at for request in quick) <= 40 * (STEP + 0.002) + 2 * device.scheduler.max_wait + STEP


class TestLaunches:
    """At most two batches are launched and not computed, and the second one late."""

    @pytest.mark.parametrize("synchronises", [False, True])
    @pytest.mark.parametrize("launch", [0.02, 0.3, 0.5, 0.7])
    def test_a_cancel_frees_the_device_within_a_step(self, launch, synchronises):
        """On average over all times of a cancel, the device works for another request after at most 1.2 steps."""
        waits = []
        for cancelled_at in torch.linspace(5, 7, 40).tolist():
            requests = [Request(0, host=0.01, synchronises=synchronises), Request(1, synchronises=synchronises)]
            device = VirtualDevice(max_rows=2, launch=launch)
            device.at(cancelled_at, lambda device=device, first=requests[0]: device.cancel(first))
            device.run(requests)
            begins = [
                begin for begin, end, shared in device.batches if requests[0] not in shared and end > cancelled_at
            ]
            waits.append(max(0.0, begins[0] - cancelled_at))
        assert statistics.mean(waits) <= 1.2
        assert max(waits) <= 2

    @pytest.mark.parametrize(("step", "waits"), [(0.004, False), (0.04, True)])
    def test_short_steps_are_launched_at_once(self, step, waits):
        """A launch is not held back where a delay of some milliseconds would leave the device without work."""
        launches, now = Launches(), 0.0
        for _ in range(2):
            launches.add([], now, now)
            now += step
            launches.finish(now)
        launches.add([], now, now)
        assert (launches.next_due() > now) is waits

    def test_a_new_request_waits_for_less_than_two_steps(self):
        """A request that arrives gets the device before the next step of a running one is launched."""
        running, new = Request(0), Request(1, arrives=5.5)
        VirtualDevice(max_rows=2, launch=0.02).run([running, new])
        assert new.looked_at == pytest.approx(7, abs=0.1)


def test_a_third_batch_is_not_launched():
    """The denoiser is called for the third time only when the first batch is computed."""
    device, called = LaggingDevice(), threading.Semaphore(0)
    with Callers(lambda _: called.release(), run_ahead=device.run_ahead()) as callers:

        def request():
            with callers.batcher.open_session() as session:
                return [callers.step(session, 1, number) for number in range(4)]

        running = callers.start(request)
        for _ in range(2):
            assert called.acquire(timeout=PATIENCE)
        callers.await_calls(1)
        assert not callers.records
        for number in range(4):
            device.compute(number)
            if number < 2:
                assert called.acquire(timeout=PATIENCE)
        assert torch.equal(running.result(PATIENCE)[3], answer_to(1, 3))
        assert len(device.events) == 4


def test_a_batch_is_reported_when_it_is_computed():
    """Records, and with them the measured step times, do not precede the device."""
    device, reported = LaggingDevice(), threading.Semaphore(0)
    with Callers(run_ahead=device.run_ahead(), on_batch=lambda _: reported.release()) as callers:
        callers.call(1)
        assert not reported.acquire(blocking=False)
        device.compute(0)
        assert reported.acquire(timeout=PATIENCE)


def test_the_limit_waits_for_the_step_before():
    """A pipeline that calls the denoiser itself continues when the step before is computed."""
    device = LaggingDevice()
    run_ahead = device.run_ahead()
    run_ahead.launched()
    run_ahead.limit()
    run_ahead.launched()
    waiting = threading.Thread(target=run_ahead.limit, daemon=True)
    waiting.start()
    assert device.events[0].waiting.wait(PATIENCE)
    assert waiting.is_alive()
    device.events[0].computed.set()
    waiting.join(PATIENCE)
    assert not waiting.is_alive()
    assert not device.events[1].waiting.is_set()


def test_a_cpu_has_computed_all_launched_work():
    """On a CPU there is nothing to wait for."""
    run_ahead = RunAhead(torch.device("cpu"))
    for _ in range(3):
        run_ahead.launched()
        run_ahead.limit()
    assert run_ahead.computed() == 1
    assert run_ahead.computed() == 0
