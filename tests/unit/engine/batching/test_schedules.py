"""Which generations come first, on a virtual clock: first previews, ends, and bounds of every wait."""

import statistics

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calotype_server.engine.batching.urgency import LOOKS_IN_A_ROW
from calotype_server.types import Schedule
from support.engine.scheduling import Request, VirtualDevice

GPU, CPU = 0.02, None
"""Seconds of a launch, for a step of one second."""


def run(schedule, *, max_rows=2, launch=GPU, **options):
    """Returns the requests, after eight that arrive together have run."""
    requests = [Request(number, **options) for number in range(8)]
    VirtualDevice(max_rows=max_rows, schedule=schedule, launch=launch).run(requests)
    return requests


def first_look(requests):
    """Returns the mean time to the end of the first step, in steps."""
    return statistics.mean(request.looked_at for request in requests)


def completion(requests):
    """Returns the mean time to the end of the last step, in steps."""
    return statistics.mean(request.ended_at for request in requests)


class TestEightUsersOfAModelThatTakesTurns:
    """The arithmetic of the README, in steps of the denoiser."""

    @pytest.mark.parametrize(
        ("schedule", "steps", "look", "end"),
        [
            (Schedule.FIFO, 20, 71.0, 90.0),
            (Schedule.FAIR, 20, 4.5, 156.5),
            (Schedule.FIRST_LOOK, 20, 4.5, 93.5),
            (Schedule.FIFO, 4, 15.0, 18.0),
            (Schedule.FAIR, 4, 4.5, 28.5),
            (Schedule.FIRST_LOOK, 4, 4.5, 21.5),
        ],
    )
    def test_the_arithmetic(self, schedule, steps, look, end):
        """Each schedule needs exactly these steps on average until the first preview and until the end."""
        requests = run(schedule, steps=steps)
        assert first_look(requests) == pytest.approx(look)
        assert completion(requests) == pytest.approx(end)
        assert max(request.ended_at for request in requests) == pytest.approx(8 * steps)

    @pytest.mark.parametrize("launch", [CPU, GPU])
    @pytest.mark.parametrize("synchronises", [False, True])
    @pytest.mark.parametrize(("steps", "looks", "ends"), [(20, 0.1, 1.05), (4, 0.35, 1.2)])
    def test_the_targets(self, launch, synchronises, steps, looks, ends):
        """The ratios to FIFO hold although every request needs time between two steps, as a lone one does.

        The device waits for it: otherwise two requests would take turns, and end later.
        """
        host = {"steps": steps, "host": 0.01, "launch": launch, "synchronises": synchronises}
        fifo, mine = run(Schedule.FIFO, **host), run(Schedule.FIRST_LOOK, **host)
        assert first_look(mine) <= looks * first_look(fifo)
        assert completion(mine) <= ends * completion(fifo)
        assert completion(fifo) <= 1.02 * 4.5 * steps
        assert max(each.ended_at for each in fifo) >= 0.98 * max(each.ended_at for each in mine)


class TestBatches:
    """The same order decides which requests share a batch."""

    @pytest.mark.parametrize("launch", [CPU, GPU])
    def test_batches_stay_full_when_more_are_active_than_fit(self, launch):
        """With eight requests and room for four, all see a preview after two steps, and four end first."""
        requests = [Request(number, host=0.01) for number in range(8)]
        device = VirtualDevice(max_rows=8, launch=launch).run(requests)
        assert device.mean_rows() == 8
        assert max(request.looked_at for request in requests) < 2.1
        assert all(request.ended_at < 21.5 for request in requests[:4])
        assert all(request.ended_at < 41.5 for request in requests[4:])

    def test_a_new_request_leaves_no_place_empty(self):
        """A request that arrives replaces only the youngest of a full batch, for one step."""
        requests = [Request(0), Request(1), Request(2, arrives=5.5)]
        device = VirtualDevice(max_rows=4, launch=CPU).run(requests)
        assert [len(shared) for _, _, shared in device.batches[:21]] == [2] * 21
        assert requests[0].ended_at == 20
        assert requests[1].ended_at == 21

    def test_a_large_call_is_not_overtaken_forever(self):
        """A request whose rows never fit beside others runs as soon as it is the oldest."""
        requests = [Request(0, steps=5), Request(1, steps=5, rows=7), Request(2, steps=50), Request(3, steps=50)]
        VirtualDevice(max_rows=4, launch=CPU).run(requests)
        assert requests[1].ended_at <= 12

    def test_the_oldest_request_chooses_the_size(self):
        """Requests of another size wait until the older ones have ended, except for their first step."""
        requests = [Request(0, signature="small"), Request(1, signature="large"), Request(2, signature="small")]
        VirtualDevice(max_rows=16, launch=CPU).run(requests)
        assert [request.ended_at for request in requests] == [21, 40, 21]


ARRIVALS = st.lists(
    st.builds(
        dict,
        arrives=st.floats(0, 60, allow_subnormal=False),
        steps=st.integers(1, 12),
        rows=st.sampled_from([1, 2]),
        signature=st.sampled_from("ab"),
        synchronises=st.booleans(),
        host=st.sampled_from([0.0, 0.01, 0.3]),
    ),
    min_size=1,
    max_size=12,
)


def numbered(arrivals):
    """Returns requests whose numbers follow their arrivals."""
    return [Request(number, **each) for number, each in enumerate(sorted(arrivals, key=lambda each: each["arrives"]))]


class TestBounds:
    """Any requests on any device."""

    @settings(max_examples=40, deadline=None)
    @given(ARRIVALS, st.sampled_from(Schedule), st.sampled_from([1, 2, 4]), st.sampled_from([CPU, GPU, 0.7]))
    def test_every_generation_ends(self, arrivals, schedule, max_rows, launch):
        """Every call is answered, and no call waits while the device is idle for longer than `max_wait`."""
        requests = numbered(arrivals)
        device = VirtualDevice(max_rows=max_rows, schedule=schedule, launch=launch)
        device.run(requests)
        assert all(request.ended_at is not None for request in requests)
        assert device.longest_wait_while_idle <= device.scheduler.max_wait * 1.25 + 1e-6

    @settings(max_examples=30, deadline=None)
    @given(ARRIVALS, st.data())
    def test_cancelled_requests_leave_no_trace(self, arrivals, data):
        """If some requests are cancelled at any time, all others end."""
        requests = numbered(arrivals)
        device = VirtualDevice(max_rows=2, launch=data.draw(st.sampled_from([CPU, GPU])))
        cancelled = data.draw(st.lists(st.sampled_from(requests), unique=True))
        for request in cancelled:
            device.at(data.draw(st.floats(0, 80)), lambda request=request: device.cancel(request))
        device.run(requests)
        assert all(request.ended_at is not None for request in requests if request not in cancelled)

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.floats(0, 30), max_size=12), st.integers(2, 20))
    @example([float(second) for second in range(12)], 20)
    def test_a_new_generation_delays_the_oldest_by_one_step(self, arrivals, steps):
        """The oldest generation ends at most one step later for each generation that arrived meanwhile."""
        requests = [Request(0, steps=steps)]
        requests += [Request(number + 1, arrives=each) for number, each in enumerate(sorted(arrivals))]
        VirtualDevice(max_rows=1, launch=CPU).run(requests)
        assert requests[0].ended_at <= steps + sum(arrived <= requests[0].ended_at for arrived in arrivals) + 1e-6

    def test_an_endless_series_of_short_requests_stops_nobody(self):
        """A caller that starts a request of one step whenever one ends gets at most every second step in the end."""
        steps = 100
        flood = [Request(number, steps=1, arrives=0.5 * number) for number in range(1, 1000)]
        patient = Request(0, steps=steps)
        VirtualDevice(max_rows=1, launch=CPU).run([patient, *flood])
        assert patient.ended_at <= 2 * steps + LOOKS_IN_A_ROW
