"""A request reports a step's progress after its next call is submitted, and loses no report."""

import dataclasses
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype_server import errors
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.batching.batcher import StepBatcher
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.protocol import Stop
from calotype_server.engine.runtime.collate import Collator
from calotype_server.engine.stepping.step_reports import StepReports
from calotype_server.types import Decoding, Denoising, EncodingPrompt, Event, PreviewMethod, PreviewOptions
from support.engine import tiny
from support.engine.batching import Callers
from support.runs import JOB, PATIENCE, STEPS

SILENT = dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod.NONE))


@given(st.lists(st.sampled_from(["step", "last", "other", "hold", "flush"]), max_size=12))
def test_reports_keep_their_order(actions):
    """Whatever happens in whatever order, every event is reported once and in order, and only progress is delayed."""
    reported, given_events, holding = [], [], False
    reports = StepReports(reported.append)
    for number, action in enumerate(actions):
        if action == "hold":
            reports.hold()
            holding = True
        elif action == "flush":
            reports.flush()
            assert reported == given_events
        else:
            event: Event = EncodingPrompt() if action == "other" else Denoising(number if action == "step" else 99, 99)
            given_events.append(event)
            reports(event)
            held = holding and action == "step"
            assert reported == given_events[: len(given_events) - held]
    reports.flush()
    assert reported == given_events


def test_other_threads_report_at_once():
    """Progress that the preview thread reports is not held."""
    reported = []
    reports = StepReports(reported.append)
    reports.hold()
    thread = threading.Thread(target=reports, args=(Denoising(1, 4),))
    thread.start()
    thread.join(PATIENCE)
    assert reported == [Denoising(1, 4)]


def test_a_call_that_cannot_be_followed_by_its_report_is_withdrawn():
    """If reporting fails after a call was submitted, the request fails, and the device does not compute the call."""

    def fail():
        raise ValueError("unreported")

    with Callers() as callers:
        session = callers.batcher.open_session(on_submitted=fail)
        with callers.held(waiting=0):
            with pytest.raises(ValueError, match="unreported"):
                callers.step(session, 1)
            assert not callers.batcher._scheduler.waiting
        assert callers.call(2) is not None
        assert callers.module.sizes == [1]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An engine that shares its denoiser."""
    engine = build_engine(
        "tiny",
        tiny.build("sd15"),
        defaults=Defaults(),
        cache_dir=tmp_path_factory.mktemp("cache"),
        max_active=2,
        max_rows=4,
        threads=1,
        preview_methods=(PreviewMethod.FULL_VAE,),
    )
    yield engine
    engine.close()


def test_progress_follows_the_next_call(engine, monkeypatch):
    """Each step is reported once, between submitting the next call and its answer; the last one before decoding."""
    happened: list[str | int] = []
    submit = StepBatcher.submit

    def submitting(self, pending):
        submit(self, pending)
        happened.append("call")

    def report(event):
        if isinstance(event, Denoising) and event.step:
            happened.append(event.step)
        elif isinstance(event, Decoding):
            happened.append("decoding")

    monkeypatch.setattr(StepBatcher, "submit", submitting)
    engine.run(SILENT, report, Stop())
    between = [part for step in range(1, STEPS) for part in ("call", step)]
    assert happened == ["call", *between, STEPS, "decoding"]


def test_a_failure_loses_no_progress(engine, monkeypatch):
    """A generation that fails before it submits its next call has reported all its steps."""
    steps, calls = [], []
    bind = Collator.bind

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise ValueError("broken")
        return bind(*args)

    def report(event):
        if isinstance(event, Denoising):
            steps.append(event.step)

    monkeypatch.setattr(Collator, "bind", failing)
    with pytest.raises(errors.GenerationFailed):
        engine.run(SILENT, report, Stop())
    assert steps == [0, 1, 2]
