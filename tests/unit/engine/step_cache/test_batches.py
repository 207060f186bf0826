"""A request that skips calls, next to others on one batcher."""

import torch

from calotype_server.engine.step_cache.cache import StepCache
from calotype_server.types import forecast_steps
from support.engine.batching import Callers, answer_to, sample
from support.runs import PATIENCE

TOTAL = 28


def test_nobody_waits_for_a_request_that_skips():
    """The batcher expects a fast request's next call only before the steps that it computes."""
    cache = StepCache()
    cache.start(TOTAL)
    with Callers() as callers:
        session = callers.batcher.open_session(cache=cache)
        for step in range(TOTAL):
            before = len(callers.module.sizes)
            answer = callers.step(session, 1, step)
            skipped = len(callers.module.sizes) == before
            assert skipped == (step in forecast_steps(TOTAL))
            waits = session._slot in callers.batcher._scheduler.expected
            assert waits == (not skipped and step + 1 not in forecast_steps(TOTAL))
            settled = cache.settle(None, sample(1), answer)
            assert torch.allclose(settled, answer_to(1, step))


def test_other_requests_run_while_one_skips():
    """While a fast request is between two computed steps, calls of others run although it has not come back."""
    cache = StepCache()
    cache.start(TOTAL)
    first = min(forecast_steps(TOTAL))
    with Callers() as callers:
        callers.batcher._scheduler.observe(1000.0)  # Waiting would take 50 ms, and others would not be on time.
        fast, exact = callers.batcher.open_session(cache=cache), callers.batcher.open_session()
        for step in range(first):
            with callers.held(2):
                pair = [callers.start(callers.step, each, number, step) for number, each in enumerate((fast, exact))]
            answers = [each.result(PATIENCE) for each in pair]
            assert callers.module.sizes == [2]
            cache.settle(None, sample(0), answers[0])
        assert fast._slot not in callers.batcher._scheduler.expected
        assert torch.equal(callers.step(exact, 1, first), answer_to(1, first))
        assert callers.module.sizes == [2, 1]


def test_a_cancelled_request_ends_at_a_step_that_it_would_skip():
    """A request that should stop does not skip a call, but ends."""
    cache = StepCache()
    cache.start(TOTAL)
    with Callers() as callers:
        stopping = []
        session = callers.batcher.open_session(should_stop=lambda: bool(stopping), cache=cache)
        for step in range(min(forecast_steps(TOTAL))):
            cache.settle(None, sample(1), callers.step(session, 1, step))
        stopping.append(True)
        future = callers.start(callers.step, session, 1, 9)
        assert type(future.exception(PATIENCE)).__name__ == "Stopped"
