"""The simulation of a fleet, compared with formulas, with the product, and with common sense."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sizing.fleet import FairQueue, Fleet, Model, Request, Routing, poisson, simulate
from calotype_server.engine.batching.pending import RequestSlot
from calotype_server.generations.admission import Admission
from calotype_server.generations.estimates import StepTimeEstimator
from calotype_server.types import Job

SERVICE = 0.5
"""Duration of a generation in the formulas, in seconds."""

MODELS = st.builds(
    Model,
    step_seconds=st.sampled_from((((2, 0.05),), ((2, 0.05), (4, 0.06), (8, 0.09), (16, 0.16)))),
    steps=st.integers(1, 5),
    rows=st.just(2),
    between=st.sampled_from((0.0, 0.001)),
    encoding=st.sampled_from((0.0, 0.02)),
    decoding=st.sampled_from((0.0, 0.1)),
    shared=st.booleans(),
)
FLEETS = st.builds(
    Fleet,
    replicas=st.integers(1, 4),
    max_active=st.integers(1, 6),
    max_rows=st.sampled_from((1, 2, 8, 16)),
    max_queue=st.integers(0, 5),
    routing=st.sampled_from(Routing),
)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_at_a_time_matches_the_formula_of_pollaczek_and_khinchine(load: float) -> None:
    """The mean wait without batching is that of M/D/1, load x service / 2 (1 - load), within 5 %."""
    model = Model(((1, SERVICE),), steps=1, rows=1)
    done = simulate(model, Fleet(1, 1, 1, math.inf), poisson(load / SERVICE, 20_000, seed=1))
    waited = statistics.mean(each.started - each.arrived for each in done.requests)
    assert waited == pytest.approx(load * SERVICE / (2 * (1 - load)), rel=0.05)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_a_device_without_batching_gain_matches_processor_sharing(load: float) -> None:
    """With many short steps, the time from arrival to end is that of M/G/1 processor sharing, within 5 %."""
    model = Model(((1, SERVICE / 20), (2, SERVICE / 10)), steps=20, rows=1)
    done = simulate(model, Fleet(1, 10_000, 10_000), poisson(load / SERVICE, 5000, seed=1))
    took = statistics.mean(each.finished - each.arrived for each in done.requests)
    assert took == pytest.approx(SERVICE / (1 - load), rel=0.05)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("max_active", [1, 4, 8])
def test_a_busy_replica_reaches_its_capacity(max_active: int, shared: bool) -> None:
    """A replica that is never idle reaches `Model.capacity` within 6 %, and never exceeds it."""
    model = Model(((2, 0.05), (16, 0.16)), encoding=0.02, decoding=0.05, shared=shared)
    requests = [Request(0.0, number, slot=RequestSlot(number)) for number in range(400)]
    done = simulate(model, Fleet(1, max_active, 16, math.inf), requests)
    capacity = model.capacity(max_active, 16)
    assert 0.94 * capacity < len(requests) / done.seconds <= 1.001 * capacity


@settings(max_examples=60, deadline=None)
@given(model=MODELS, fleet=FLEETS, seed=st.integers(0, 999), rate=st.floats(0.5, 50))
def test_no_request_is_lost_or_finishes_too_early(model: Model, fleet: Fleet, seed: int, rate: float) -> None:
    """Each request ends once or is rejected because the queue is full, and takes at least the time of all its steps."""
    done = simulate(model, fleet, poisson(rate, 60, seed, callers=3), seed=seed)
    shortest = model.steps * model.seconds(model.rows)
    for each in done.requests:
        if each.rejected:
            assert math.isnan(each.started)
            continue
        assert each.step == model.steps
        assert each.arrived <= each.started < each.first_preview <= each.finished
        least = shortest + model.encoding + model.decoding
        assert each.finished - each.started >= least - 1e-6
    steps = sum(each.step for each in done.requests)
    together = max(1, min(fleet.max_active, fleet.max_rows // model.rows))
    assert steps / together <= done.batches <= steps
    assert fleet.max_queue or sum(not each.rejected for each in done.requests) > 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), replicas=st.integers(1, 4), load=st.floats(0.1, 2))
def test_twice_the_replicas_never_increase_a_wait(seed: int, replicas: int, load: float) -> None:
    """With round-robin and one generation at a time, no request waits longer after the number of replicas doubles."""
    model = Model(((1, SERVICE),), steps=1, rows=1)

    def waits(count: int) -> list[float]:
        fleet = Fleet(count, 1, 1, math.inf, Routing.ROUND_ROBIN)
        requests = poisson(load * replicas / SERVICE, 50, seed)
        return [each.started - each.arrived for each in simulate(model, fleet, requests).requests]

    assert all(more <= few + 1e-6 for few, more in zip(waits(replicas), waits(2 * replicas), strict=True))


def test_waits_grow_with_load_and_shrink_with_better_routing() -> None:
    """With batches, the mean wait grows with the load, and counting calls beats random routing."""
    model = Model(((2, 0.05), (16, 0.16)), encoding=0.02, decoding=0.05)

    def seen(share: float, routing: Routing) -> float:
        rate = share * 8 * model.capacity(8, 16)
        done = simulate(model, Fleet(8, 8, 16, math.inf, routing), poisson(rate, 1000, seed=1))
        return statistics.mean(each.first_preview - each.arrived for each in done.requests)

    assert seen(0.4, Routing.LEAST) < seen(0.7, Routing.LEAST) < seen(0.95, Routing.LEAST)
    # If all generations are equally long, round-robin is as good as counting calls.
    assert max(seen(0.95, Routing.LEAST), seen(0.95, Routing.ROUND_ROBIN)) < seen(0.95, Routing.RANDOM)


@given(
    callers=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=12),
    slots=st.integers(1, 3),
)
async def test_the_simulated_queue_has_the_order_of_the_product(callers: list[tuple[int, int]], slots: int) -> None:
    """Each free slot goes to the same request in the simulation and in the product, if none is kept for others."""
    job = Job("a cat", None, 1, 1, 1, 3.0, 0, "DDIMScheduler")
    # Between two requests so much time passes that the other callers seem to have left.
    clock = itertools.count(0, 1000).__next__
    admission = Admission(StepTimeEstimator(), max_active=slots, max_queue=100, max_queue_per_caller=100, clock=clock)
    queue = FairQueue()
    tickets = []
    active: list[int] = []
    ended: set[int] = set()
    for number, (caller, steps) in enumerate(callers):
        work = Job(job.prompt, None, 1, 1, steps, 3.0, 0, job.scheduler)
        tickets.append(admission.enter(work, str(caller), lambda *_: None))
        queue.push(number, caller, work=steps)
        if len(active) < slots:
            active.append(queue.pop())
    while active:
        assert {number for number, ticket in enumerate(tickets) if ticket.turn.done()} - ended == set(active)
        first = active.pop(0)
        ended.add(first)
        admission.leave(tickets[first])
        if len(queue):
            active.append(queue.pop())


def test_step_times_are_interpolated_linearly() -> None:
    """Times between measured rows are interpolated, larger ones extrapolated, and smaller ones equal the first."""
    model = Model(((2, 0.05), (4, 0.06), (8, 0.1)))
    times = [model.seconds(rows) for rows in (1, 2, 3, 4, 6, 8, 12)]
    assert times == pytest.approx([0.05, 0.05, 0.055, 0.06, 0.08, 0.1, 0.14])
