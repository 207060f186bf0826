"""Calls of concurrent requests are run together, by one thread, and everybody gets their own answer."""

import threading
from concurrent.futures import wait

import pytest
import torch

from calotype_server import errors
from calotype_server.engine.batching.batcher import StepBatcher
from calotype_server.engine.batching.measure import Threads
from calotype_server.engine.tap import Stopped
from support.engine.batching import Party, answer_to, sample
from support.runs import PATIENCE


@pytest.fixture
def party():
    """A batcher without faults."""
    with Party() as party:
        yield party


def values(futures):
    """The answers of calls that succeeded."""
    return [future.result(0) for future in futures]


def test_calls_that_wait_are_run_together(party):
    """Different timesteps and numbers of rows share one call, and each gets its own rows."""
    answers = values(party.together((1, 10), (2, 20, 2), (3, 30)))
    assert party.module.sizes == [4]
    for answer, expected in zip(answers, [answer_to(1, 10), answer_to(2, 20, 2), answer_to(3, 30)], strict=True):
        assert torch.equal(answer, expected)


def test_sizes_are_kept_apart(party):
    """Latents of another size are another batch."""
    answers = values(party.together((1, 0, 1, 4), (2, 0, 1, 6), (3, 0, 1, 4)))
    assert sorted(party.module.sizes) == [1, 2]
    assert torch.equal(answers[1], answer_to(2, 0, 1, 6))


def test_no_more_rows_than_allowed():
    """More calls than fit take turns in the order of arrival; one that is larger than all is run alone."""
    with Party(max_rows=4) as party:
        answers = values(party.together(*((number, 0, 2) for number in range(5)), (9, 0, 6)))
        assert sorted(party.module.sizes) == [2, 4, 4, 6]
        assert torch.equal(answers[5], answer_to(9, 0, 6))


def test_a_single_request_is_passed_on_as_it_is():
    """Alone, the arguments arrive untouched and the answer is the module's own object: bit for bit a direct call."""
    seen = []
    result = (torch.zeros(1, 4),)

    class Module(torch.nn.Module):
        def forward(self, sample, timestep, mask=None):
            seen.append((sample, timestep, mask, torch.is_grad_enabled(), threading.current_thread().name))
            return result

    batcher = StepBatcher(Module(), max_rows=4)
    given, timestep, mask = torch.ones(1, 4), torch.tensor(3), torch.ones(1, 2)
    with batcher.stream() as stream:
        assert stream.proxy()(given, timestep, mask=mask) is result
    batcher.close()
    assert all(a is b for a, b in zip(seen[0], (given, timestep, mask), strict=False))
    assert seen[0][3:] == (False, "calotype-device")


def test_requests_join_and_leave_at_any_step(party):
    """Three requests of different length, which begin when another is under way, all get every answer right."""

    def request(value, steps, begin, began):
        assert begin.wait(PATIENCE)
        with party.batcher.stream() as stream:
            for number in range(steps):
                assert torch.equal(party.step(stream, value, number), answer_to(value, number))
                if number == 1:
                    began.set()
        return True

    events = [threading.Event() for _ in range(4)]
    events[0].set()
    futures = [
        party.start(request, value, steps, events[value], events[value + 1]) for value, steps in enumerate((9, 5, 3))
    ]
    assert all(future.result(PATIENCE) for future in futures)


def test_threads_of_torch_are_the_device_threads():
    """Torch keeps the number by thread; a call of many rows is computed with more."""
    seen = []
    with Party(lambda rows: seen.append((len(rows), torch.get_num_threads())), threads=Threads(2, 3, 4)) as party:
        party.call(1)
        values(party.together((1,), (2, 0, 3)))
        party.call(1)
    assert seen == [(1, 2), (1, 2), (4, 3), (1, 2)]


def test_batches_are_reported(party):
    """A timeline tells when a call was made, and who shared it."""
    values(party.together((1,), (2, 0, 2)))
    party.batcher.close()
    _, record = party.records
    assert (record.rows, record.padded_rows, record.streams) == (3, 3, (1, 2))
    assert record.started > 0
    assert record.seconds >= 0


def test_a_failing_listener_is_survived(logs):
    """What a listener raises is logged, and the next call is served."""
    with Party(on_batch=lambda _: 1 / 0) as party:
        party.call(1)
        assert torch.equal(party.call(2), answer_to(2, 0))
    assert "a batch cannot be reported" in [entry["event"] for entry in logs]


def test_deterministic_batches_have_one_size():
    """Every batch is filled up to the same number of rows, and nobody sees the filling."""
    with Party(max_rows=5, deterministic=True) as party:
        assert torch.equal(party.call(1, 7), answer_to(1, 7))
        answers = values(party.together((1, 10), (2, 20, 2)))
        assert torch.equal(answers[1], answer_to(2, 20, 2))
        assert set(party.module.sizes) == {5}
    assert (party.records[-1].rows, party.records[-1].padded_rows) == (3, 5)


class TestCancel:
    """A cancelled request is gone at once."""

    def test_a_waiting_call_ends_at_once(self, party):
        """The device is still held when the cancelled call ends, and the others are served without its rows."""
        stream = party.batcher.stream()
        with party.held(1):
            cancelled, other = party.start(party.step, stream, 1), party.start(party.call, 2)
            party.await_calls(2)
            stream.cancel()
            assert isinstance(cancelled.exception(PATIENCE), Stopped)
        assert torch.equal(other.result(PATIENCE), answer_to(2, 0))
        assert party.module.sizes == [1]

    def test_a_running_call_ends_at_once(self):
        """The rows are computed and thrown away; the call does not wait for that."""
        entered, release = threading.Event(), threading.Event()

        def act(rows):
            entered.set()
            assert release.wait(PATIENCE)

        with Party(act) as party:
            stream = party.batcher.stream()
            cancelled = party.start(party.step, stream, 1)
            assert entered.wait(PATIENCE)
            stream.cancel()
            assert isinstance(cancelled.exception(PATIENCE), Stopped)
            release.set()
            assert torch.equal(party.call(2), answer_to(2, 0))

    def test_the_next_call_of_a_cancelled_request_ends(self, party):
        """Cancelled between two calls, or told to stop, a request does not reach the device again."""
        cancelled, told = party.batcher.stream(), party.batcher.stream(should_stop=lambda: True)
        cancelled.cancel()
        for stream in (cancelled, told):
            with pytest.raises(Stopped):
                party.step(stream, 1)
        assert party.module.sizes == []


class TestClose:
    """Closing ends the thread and leaves nobody waiting."""

    def test_waiting_calls_are_released(self, party):
        """Those that wait when the device comes free are told that the server stops; so are later ones."""
        with party.held(2):
            futures = [party.start(party.call, value) for value in (1, 2)]
            party.await_calls(2)
            closing = party.start(party.batcher.close)
            with party.batcher._changed:
                assert party.batcher._changed.wait_for(lambda: party.batcher._closing, PATIENCE)
        closing.result(PATIENCE)
        for future in futures:
            assert isinstance(future.exception(PATIENCE), errors.Draining)
        with pytest.raises(errors.Draining):
            party.call(3)

    def test_twice_is_harmless(self, party):
        """A second close finds nothing to do."""
        party.batcher.close()
        party.batcher.close()


def test_no_thread_is_left_after_many_requests():
    """Two hundred requests of all fates need one device thread, and none remains."""
    before = set(threading.enumerate())  # some of other tests, which may end meanwhile

    def act(rows):
        if (rows == 13).any():
            raise ValueError("unlucky")

    def request(party, number):
        with party.batcher.stream() as stream:
            for step in range(1 + number % 3):
                if number % 7 == 3 and step == 1:
                    stream.cancel()
                party.step(stream, 13 if number % 5 == 0 else number, step)
                if number % 11 == 4:
                    raise RuntimeError("own trouble")

    with Party(act, max_rows=6) as party:
        futures = [party.start(request, party, number) for number in range(200)]
        assert not wait(futures, PATIENCE).not_done
        names = [thread.name for thread in set(threading.enumerate()) - before]
        assert names.count("calotype-device") == 1
    assert {type(future.exception()) for future in futures} == {type(None), ValueError, Stopped, RuntimeError}
    assert not set(threading.enumerate()) - before


def test_proxy_passes_for_the_module(party):
    """Attributes are the module's and cannot be written; its caches are left alone."""
    proxy = party.batcher.stream().proxy()
    assert isinstance(proxy, torch.nn.Module)
    assert proxy.sizes is party.module.sizes
    with pytest.raises(AttributeError, match="shared by all requests"):
        proxy.sizes = []
    with proxy.cache_context("cond"):
        proxy._reset_stateful_cache()
    assert torch.equal(proxy.forward(sample(1), torch.tensor(2))[0], answer_to(1, 2))


def test_who_has_ended_is_not_expected(party):
    """The end of a request, however it came, is known to the others."""
    with party.batcher.stream() as stream:
        party.step(stream, 1)
        assert party.batcher._rendezvous._expected
    assert not party.batcher._rendezvous._expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_launches_do_not_run_ahead():
    """On CUDA no more than one batch besides the newest is launched and not computed."""
    module = torch.nn.Linear(4, 4).cuda()
    batcher = StepBatcher(module, max_rows=4)
    with batcher.stream() as stream, torch.no_grad():
        for value in range(5):
            latents = sample(value).cuda()
            assert torch.allclose(stream.proxy()(latents), module(latents))
            assert len(batcher._run_ahead._launched) <= 2
    batcher.close()
