"""A denoiser with predictable answers, and threads that call it through a batcher."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading

import torch

from calotype_server.engine.batching.batcher import StepBatcher
from calotype_server.engine.runtime.eager import EagerRuntime
from support.runs import PATIENCE

__all__ = ["Callers", "Denoiser", "answer_to", "sample"]


class Denoiser(torch.nn.Module):
    """Answers every row with twice itself plus its timestep.

    Args:
        act: Called with the rows before each answer; may wait or raise.
    """

    def __init__(self, act=lambda _: None):
        super().__init__()
        self.act = act
        self.sizes = []
        """Number of rows of each call."""
        self.eval()

    def forward(self, sample, timestep, return_dict=True):
        self.sizes.append(sample.shape[0])
        self.act(sample)
        return (sample * 2 + timestep.reshape(-1, 1),)


def sample(value, rows=1, width=4):
    """Returns a batch in which every number is `value`."""
    return torch.full((rows, width), float(value))


def answer_to(value, timestep, rows=1, width=4):
    """Returns the denoiser's answer to `sample(value)`."""
    return sample(2 * value + timestep, rows, width)


class Callers:
    """Calls one batcher from threads. The device can be held, so that calls are certain to wait together.

    Args:
        act: Called with the rows before each answer; may wait or raise.
        runtime: Makes the runtime for the module, from the keyword arguments of `EagerRuntime`.
        options: For the batcher.
    """

    def __init__(self, act=lambda _: None, *, runtime=EagerRuntime, **options):
        self.module = Denoiser(self._act)
        self.act = act
        self.records = []
        self._threads = []
        self._free = threading.Event()
        self._free.set()
        self._held = threading.Event()
        options = {"max_rows": 16, "on_batch": self.records.append, **options}
        self.runtime = runtime(self.module, exact=options.get("deterministic", False))
        self.batcher = StepBatcher(self.runtime, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._free.set()
        self.batcher.close()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _act(self, rows):
        if not self._free.is_set():
            self._held.set()
            assert self._free.wait(PATIENCE)
        self.act(rows)

    def start(self, function, *args):
        """Runs a function in its own daemon thread, so that a stuck one cannot outlive the process."""
        future = concurrent.futures.Future()

        def run():
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()
        return future

    def call(self, value, timestep=0, rows=1, width=4):
        """Makes a request of one step."""
        with self.batcher.open_session() as session:
            return self.step(session, value, timestep, rows, width)

    def step(self, session, value, timestep=0, rows=1, width=4):
        """Makes one step of a request."""
        return session.proxy()(sample(value, rows, width), torch.tensor(timestep))[0]

    def plug(self):
        """Starts a call that runs the module."""
        return self.start(self.call, 0)

    @contextlib.contextmanager
    def held(self, waiting):
        """Holds the device inside a call, and releases it when `waiting` calls wait."""
        self._free.clear()
        self._held.clear()
        plug = self.plug()
        assert self._held.wait(PATIENCE)
        yield
        self.await_calls(waiting)
        self.module.sizes.clear()
        self._free.set()
        plug.result(PATIENCE)

    def await_calls(self, count):
        """Blocks until `count` calls wait for the held device."""
        changed = self.batcher._changed
        with changed:
            assert changed.wait_for(lambda: len(self.batcher._scheduler.waiting) >= count, PATIENCE)

    def together(self, *calls):
        """Makes calls that wait at the same time, in this order, and returns their finished futures."""
        futures = []
        with self.held(len(calls)):
            for call in calls:
                futures.append(self.start(self.call, *call))
                self.await_calls(len(futures))
        concurrent.futures.wait(futures, PATIENCE)
        assert all(future.done() for future in futures)
        return futures
