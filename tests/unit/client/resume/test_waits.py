"""When a client calls again after a failed call: a table that both clients share, and properties of every history."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from calotype import CalotypeError, DataLoss, DeadlineExceeded, InternalError, Overloaded, Unavailable
from calotype._constants import LOADING_TIMEOUT_SECONDS, RETRY_MAX_SECONDS
from calotype._resume.backoff import RetryPolicy
from calotype._resume.policy import Resumption
from calotype._resume.waits import Waits
from calotype._status import from_error_message
from calotype.v1 import calotype_pb2 as v1

CASES = json.loads(Path(__file__).with_name("retry_cases.json").read_text())
"""Client and server histories. `test/waits.test.ts` of the TypeScript client reads them, too."""

ERRORS: dict[str, tuple[type[CalotypeError], str, str]] = {
    "loading": (Unavailable, "NOT_READY", "The model is still loading."),
    "draining": (Unavailable, "DRAINING", "The server is stopping."),
    "unreached": (Unavailable, "", "failed to connect to all addresses"),
    "no upstream": (Unavailable, "UPSTREAM_UNAVAILABLE", "The server behind this bridge cannot be reached."),
    "no state": (Unavailable, "STATE_UNAVAILABLE", "The disk is full."),
    "queue full": (Overloaded, "QUEUE_FULL", "The queue is full."),
    "damaged": (DataLoss, "DATA_LOSS", "The stored generation is damaged."),
    "deadline": (DeadlineExceeded, "", "The timeout passed before the server finished."),
}
ENDS = {
    "draining end": (v1.PHASE_FAILED, 14, "DRAINING"),
    "abandoned end": (v1.PHASE_CANCELLED, 1, "ABANDONED"),
    "crashed end": (v1.PHASE_FAILED, 13, "ENGINE_CRASHED"),
    "damaged end": (v1.PHASE_FAILED, 15, "DATA_LOSS"),
}


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def call(resumption: Resumption, numbers: Any, answer: str, retry_after: float | None) -> float | CalotypeError:
    """Makes one call with this answer. Returns the wait before the next call, or the error for the caller."""
    facts: dict[str, Any] = {"generation_id": f"g{next(numbers)}", "seed": 5}
    if answer == "step":
        number = next(numbers)
        assert resumption.take(v1.Progress(**facts, sequence=number, step=number, phase=v1.PHASE_DENOISING))
        return resumption.lost(Unavailable("Socket closed"))
    if answer in ENDS:
        phase, code, reason = ENDS[answer]
        error = v1.Error(code=code, reason=reason, message="It ended.")
        if retry_after is not None:
            error.retry_delay.FromNanoseconds(int(retry_after * 1e9))
        end = resumption.take(v1.Progress(**facts, sequence=999, phase=phase, error=error))
        return from_error_message(end.error, InternalError) if end else resumption.lost(Unavailable("Socket closed"))
    kind, reason, text = ERRORS[answer]
    return resumption.lost(kind(text, reason=reason, retry_after=retry_after))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_history(case):
    """The client waits, and gives up, as the table says. Without randomness, each wait is the longest possible one."""
    limits, clock, numbers = case["limits"], Clock(), itertools.count(1)
    policy = RetryPolicy(
        limits.get("retries", 10),
        random=lambda: 1.0,
        clock=clock,
        wait_for_server=limits.get("waitForServer", 0.0),
        loading_timeout=limits.get("loadingTimeout"),
    )
    resumption = Resumption(v1.GenerateRequest(request_id="r"), policy, limits.get("timeout"))
    for each in case["calls"]:
        if each["answer"] == "image":
            return
        for wait in each.get("waits", []):
            assert call(resumption, numbers, each["answer"], each.get("retryAfter")) == pytest.approx(wait)
            clock.now += wait
        if raised := each.get("raises"):
            error = call(resumption, numbers, each["answer"], each.get("retryAfter"))
            assert isinstance(error, CalotypeError)
            assert f"{error.code} {error.reason}".strip() == raised
            return
    raise AssertionError("the history has no end")


def test_errors_say_what_the_client_waited_for():
    """The error at the end of a wait names the server's state and the limit."""
    clock = Clock()
    loading = Unavailable("The model is still loading.", reason="NOT_READY")
    waits = Waits(RetryPolicy(clock=clock), 5.0)
    waits.after(loading)
    clock.now += 5
    assert str(waits.after(loading)) == "The timeout passed while waiting for the server: The model is still loading."
    waits = Waits(RetryPolicy(clock=clock, loading_timeout=5.0))
    waits.after(loading)
    clock.now += 5
    assert str(waits.after(loading)) == "The server was not ready within 5 s: The model is still loading."


def test_several_servers_are_asked_again_without_the_delay_of_one():
    """With several servers, the delay of a loading server does not delay the call to another one."""
    loading = Unavailable("The model is still loading.", reason="NOT_READY", retry_after=60)
    waits = Waits(RetryPolicy(random=lambda: 1.0, is_balanced=True))
    assert [waits.after(loading) for _ in range(3)] == [0.25, 0.5, 1.0]


DELAYS = st.none() | st.floats(0, 120)


class AnyHistory(RuleBasedStateMachine):
    """A client and a server that answers anything at any time. Limits and invariants come from the documentation."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.error: CalotypeError | None = None
        self.configured = False

    @precondition(lambda self: self.error or not self.configured)
    @rule(
        retries=st.integers(1, 5),
        timeout=st.none() | st.floats(0.01, 1000),
        loading_timeout=st.none() | st.floats(0, 1000),
        random=st.floats(0, 1),
        balanced=st.booleans(),
    )
    def configure(self, retries, timeout, loading_timeout, random, balanced):
        policy = RetryPolicy(
            retries,
            random=lambda: random,
            clock=self.clock,
            loading_timeout=loading_timeout,
            is_balanced=balanced,
        )
        self.retries, self.balanced = retries, balanced
        self.deadline = math.inf if timeout is None else self.clock.now + timeout
        self.limit = loading_timeout
        if loading_timeout is None:
            self.limit = LOADING_TIMEOUT_SECONDS if timeout is None else math.inf
        self.waits = Waits(policy, timeout)
        self.failures, self.loading_since, self.contacted = 0, math.inf, False
        self.configured, self.error = True, None

    def ask(self, error: CalotypeError) -> None:
        """Passes an error, checks the verdict, and lets the wait pass."""
        verdict = self.waits.after(error)
        if isinstance(verdict, CalotypeError):
            self.error = verdict
            return
        left = self.deadline - self.clock.now
        asked = 0.0 if self.balanced and isinstance(error, Unavailable) else error.retry_after or 0.0
        assert 0 <= verdict <= min(left, asked + RETRY_MAX_SECONDS)
        until_limit = self.loading_since + self.limit - self.clock.now if error.reason == "NOT_READY" else math.inf
        assert verdict >= min(asked, left / 2, until_limit) - 1e-6
        self.clock.now += verdict

    @precondition(lambda self: self.configured and self.error is None)
    @rule(retry_after=DELAYS, seconds=st.floats(0, 30))
    def loading(self, retry_after, seconds):
        self.clock.now += seconds
        self.contacted, self.failures = True, 0
        self.loading_since = min(self.loading_since, self.clock.now)
        over = self.clock.now >= self.loading_since + self.limit
        late = self.clock.now >= self.deadline
        self.ask(Unavailable("The model is still loading.", reason="NOT_READY", retry_after=retry_after))
        assert (self.error is not None) == (over or late)

    @precondition(lambda self: self.configured and self.error is None)
    @rule(seconds=st.floats(0, 30))
    def refused(self, seconds):
        self.clock.now += seconds
        if self.contacted:
            self.failures += 1
        over = not self.contacted or self.failures > self.retries or self.clock.now >= self.deadline
        self.ask(Unavailable("failed to connect to all addresses"))
        assert (self.error is not None) == over

    @precondition(lambda self: self.configured and self.error is None)
    @rule(seconds=st.floats(0, 30))
    def news(self, seconds):
        self.clock.now += seconds
        self.waits.hear()
        self.waits.reset()
        self.contacted, self.failures, self.loading_since = True, 0, math.inf

    @precondition(lambda self: self.configured and self.error is None)
    @rule(error=st.sampled_from([InternalError("x", reason="ENGINE_CRASHED", retry_after=1), DataLoss("x")]))
    def crashed(self, error):
        self.ask(error)
        assert self.error is error

    @invariant()
    def failures_are_bounded(self):
        if self.configured and self.error is None:
            assert self.failures <= self.retries


AnyHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAnyHistory = AnyHistory.TestCase
