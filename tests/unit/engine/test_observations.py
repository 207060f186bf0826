"""Observations of steps, batches and previews, and the ids in the log lines of the engine's threads."""

import contextvars
import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch

from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.preview.budget import PreviewBudget
from calotype_server.engine.preview.costs import DeviceCosts
from calotype_server.engine.preview.device_stream import CpuStream
from calotype_server.engine.preview.renderer import PreviewRenderer
from calotype_server.engine.tap import Step
from calotype_server.observability.events import BatchDone, PreviewFailed, PreviewRendered, StepDone
from calotype_server.types import Decoding, Job, PreviewMethod, PreviewOptions
from support.engine import tiny
from support.engine.batching import Callers
from support.runs import JOB, PATIENCE, STEPS, Run

LIBRARY = logging.getLogger("a.library")


@pytest.fixture
def entries():
    """All log lines, Calotype's and a library's, with their bound ids and their threads."""
    found = []

    def keep(event, **others):
        found.append({"event": event, "thread": threading.current_thread().name, **others})

    def processor(_, __, entry):
        keep(**entry)
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.contextvars.merge_contextvars, processor])
    handler = logging.Handler()
    handler.emit = lambda record: keep(record.getMessage(), **structlog.contextvars.get_contextvars())
    LIBRARY.addHandler(handler)
    yield found
    LIBRARY.removeHandler(handler)


def bound(**ids):
    """Returns the context of a call with these ids."""
    context = contextvars.copy_context()
    context.run(structlog.contextvars.bind_contextvars, **ids)
    return context


def test_steps_batches_and_previews_are_observed(tmp_path):
    """There is one observation for each step after the first, each batch of two rows, and each preview."""
    seen = []
    pipeline = tiny.build("sd15")
    engine = build_engine(
        "tiny",
        pipeline,
        defaults=Defaults(),
        cache_dir=tmp_path,
        threads=1,
        max_active=2,
        max_rows=4,
        observe=seen.append,
    )
    try:
        run = Run(engine)
        seen.clear()
        with run.with_every_preview():
            run()
    finally:
        engine.close()
    steps = [each for each in seen if isinstance(each, StepDone)]
    batches = [each for each in seen if isinstance(each, BatchDone)]
    drawn = [each for each in seen if isinstance(each, PreviewRendered)]
    assert len(steps) == STEPS - 1
    assert [batch.rows for batch in batches] == [2] * STEPS
    assert [preview.method for preview in drawn] == [PreviewMethod.HEAD] * STEPS
    timed: list[Any] = [*steps, *batches, *drawn]
    assert all(each.seconds > 0 for each in timed)
    [decoding] = [event for event in run.events if isinstance(event, Decoding)]
    assert decoding.batch_rows == 2


def test_a_device_measures_the_decoding_of_the_final_image(tmp_path, monkeypatch):
    """On a GPU the last step is launched before it is computed; a second event says how long decoding really took."""
    budget = PreviewBudget(0.02)
    options = {"defaults": Defaults(), "cache_dir": tmp_path, "threads": 3, "budget": budget}
    engine = build_engine("tiny", tiny.shared("sd15"), **options)
    lap = SimpleNamespace(stop=lambda: None, device_seconds=lambda: 0.25, computing_seconds=lambda _: 0.25)
    monkeypatch.setattr(engine._parts.previews, "start_decoding", lambda: lap)
    budget.charge(DeviceCosts())
    run = Run(engine)
    run()
    engine.close()
    assert [event.seconds for event in run.events if isinstance(event, Decoding)] == [0.0, 0.25]
    assert budget.cost(PreviewMethod.FULL_VAE, JOB.pixel_count) == pytest.approx(0.25)


def test_a_session_knows_its_mean_number_of_rows():
    """The mean counts all rows in the batches of the session's own calls."""
    with Callers() as callers, callers.batcher.open_session() as session:
        assert session.mean_rows == 0
        callers.step(session, 1)
        assert session.mean_rows == 1
        with callers.held(2):
            futures = [callers.start(callers.step, session, 2), callers.start(callers.call, 3, 0, 2)]
        for future in futures:
            future.result(PATIENCE)
        assert session.mean_rows == (1 + 3) / 2


def test_lines_of_the_device_thread_carry_the_requests_ids(entries):
    """Lines that the denoiser logs carry the ids of the request and the generation."""

    def act(rows):
        LIBRARY.warning("a slow kernel")

    with Callers(act) as callers:
        bound(request="r1", generation="g1").run(callers.call, 1)
        bound(request="r2", generation="g2").run(callers.call, 2)
    lines = [(line["thread"], line["request"], line["generation"]) for line in entries]
    assert lines == [("calotype-device", "r1", "g1"), ("calotype-device", "r2", "g2")]


def test_exhausted_memory_is_logged_for_each_request(entries):
    """There is one line with the ids of each generation whose batch was split."""

    def act(rows):
        if len(rows) > 1:
            raise MemoryError

    with Callers(act) as callers:
        with callers.held(2):
            contexts = [bound(request=f"r{number}", generation=f"g{number}") for number in range(2)]
            futures = [callers.start(context.run, callers.call, 1) for context in contexts]
        for future in futures:
            future.result(PATIENCE)
    ids = {(line["request"], line["generation"]) for line in entries if line["event"] == "memory ran out"}
    assert ids == {("r0", "g0"), ("r1", "g1")}
    assert {line["thread"] for line in entries} == {"calotype-device"}


def test_lines_of_the_preview_thread_carry_the_generations_ids(entries):
    """Lines about a preview, and lines of an idle task, carry the ids of their generation."""
    seen, reported = [], threading.Semaphore(0)

    class Decoder:
        def decode(self, latents, width, height):
            LIBRARY.warning("an unusual colour")
            raise ValueError("no")

    renderer = PreviewRenderer({PreviewMethod.HEAD: Decoder()}, PreviewBudget(0.02), CpuStream(), observe=seen.append)
    job = Job("p", None, 64, 32, 9, None, 0, "DDIMScheduler", PreviewOptions(method=PreviewMethod.HEAD))
    ones = torch.ones(1, 4, 2, 2)
    step = Step(1, 9, ones, ones, level=None, reported=ones, scheduler=None)
    try:
        preview_queue = bound(request="r1", generation="g1").run(renderer.open_queue, job, lambda _: reported.release())
        preview_queue.offer(step)
        assert reported.acquire(timeout=PATIENCE)
        task_done = threading.Event()

        def task():
            LIBRARY.warning("an unusual image")
            task_done.set()

        bound(request="r2", generation="g2").run(renderer.when_idle, task)
        assert task_done.wait(PATIENCE)
    finally:
        renderer.close()
    lines = [(line["event"], line["request"], line["generation"]) for line in entries]
    assert lines == [
        ("an unusual colour", "r1", "g1"),
        ("preview failed", "r1", "g1"),
        ("an unusual image", "r2", "g2"),
    ]
    assert {line["thread"] for line in entries} == {"calotype-preview"}
    assert seen == [PreviewFailed()]
