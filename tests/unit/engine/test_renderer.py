"""The preview thread draws the newest step, survives what goes wrong, and never makes the denoiser wait."""

import queue
import threading
from types import SimpleNamespace

import pytest
import torch

from calotype_server.engine.preview.renderer import PreviewRenderer
from calotype_server.engine.tap import Step
from calotype_server.types import Denoising, Job, Pixels, PreviewReady

PATIENCE = 20
"""Seconds until a test that waits for something gives up."""

JOB = Job("a red apple", None, 64, 32, 9, None, 0, "DDIMScheduler")


class Head:
    """Draws a picture whose bytes are the number of the step; can be held up, and can fail."""

    def __init__(self):
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.failing = set()
        self.sizes = []

    def render(self, latents, width, height):
        self.entered.release()
        assert self.gate.wait(PATIENCE)
        self.sizes.append((width, height))
        number = int(latents.flatten()[0])
        if number in self.failing:
            raise ValueError("the head is confused")
        return torch.full((2, 3, 3), number, dtype=torch.uint8)


@pytest.fixture
def head():
    """The head that the renderer draws with."""
    return Head()


@pytest.fixture
def renderer(head):
    """A renderer that is closed at the end, whatever its head waits for."""
    renderer = PreviewRenderer(head)
    yield renderer
    head.gate.set()
    renderer.close()


@pytest.fixture
def events():
    """What is reported, from any thread."""
    return queue.SimpleQueue()


def step(number, *, x0=None, sample=None, model_output=None):
    """A finished step that reports `x0`, by default filled with its own number."""
    ones = torch.ones(1, 4, 2, 2)
    return Step(
        number=number,
        total=9,
        sample=ones if sample is None else sample,
        model_output=ones if model_output is None else model_output,
        level=None,
        reported=number * ones if x0 is None else x0,
        scheduler=None,
    )


def preview(number, skipped=0):
    """The event of the picture that the head draws of a step."""
    return PreviewReady(number, 9, Pixels(3, 2, bytes([number]) * 18), skipped)


def hold(head, feed, number=1):
    """Stops the preview thread in the middle of drawing a step."""
    head.gate.clear()
    feed.offer(step(number))
    assert head.entered.acquire(timeout=PATIENCE)


def test_step_becomes_a_picture(renderer, head, events):
    """An offered step comes back as its picture, drawn for the shape that the job asks for."""
    renderer.feed(JOB, events.put).offer(step(3))
    assert events.get(timeout=PATIENCE) == preview(3)
    assert head.sizes == [(64, 32)]


def test_newest_step_wins(renderer, head, events):
    """While one picture is drawn, steps replace each other; the newest is drawn next and says how many it replaced."""
    feed = renderer.feed(JOB, events.put)
    hold(head, feed)
    for number in (2, 3, 4):
        feed.offer(step(number))
    head.gate.set()
    assert [events.get(timeout=PATIENCE) for _ in range(2)] == [preview(1), preview(4, skipped=2)]
    feed.offer(step(5))
    assert events.get(timeout=PATIENCE) == preview(5)
    assert events.empty()


def test_feeds_take_turns(renderer, head, events):
    """Two generations are drawn in the order in which they became due, each with its own newest step."""
    first, second = (renderer.feed(JOB, lambda event, name=name: events.put((name, event))) for name in "ab")
    hold(head, first)
    second.offer(step(5))
    first.offer(step(2))
    second.offer(step(6))
    head.gate.set()
    drawn = [events.get(timeout=PATIENCE) for _ in range(3)]
    assert drawn == [("a", preview(1)), ("b", preview(6, skipped=1)), ("a", preview(2))]


def test_failure_costs_one_picture(renderer, head, events, logs):
    """A head that raises leaves progress without a picture and a line in the log; the next step is drawn."""
    head.failing = {1}
    feed = renderer.feed(JOB, events.put)
    feed.offer(step(1))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9)
    feed.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)
    assert [(entry["log_level"], entry["step"]) for entry in logs] == [("error", 1)]
    assert not feed.broken


def test_failing_x0_costs_one_picture(renderer, events, logs):
    """A scheduler that cannot compute its x0 costs a picture, and nothing else."""

    def fail():
        raise RuntimeError("no x0 today")

    feed = renderer.feed(JOB, events.put)
    feed.offer(SimpleNamespace(number=1, total=9, x0=fail))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9)
    feed.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)


def test_unknown_x0_is_progress(renderer, head, events):
    """A step whose x0 is unknown is progress without a picture, never a picture of noise."""
    feed = renderer.feed(JOB, events.put)
    unknown = Step(1, 9, torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), None, None, None)
    feed.offer(unknown)
    assert events.get(timeout=PATIENCE) == Denoising(1, 9)
    assert head.sizes == []
    assert not feed.broken


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["sample", "model_output"])
def test_invalid_latents_break_the_feed(renderer, head, events, poison, where):
    """NaN or infinity in the latents or in the model's answer marks the generation as broken, before it is told."""
    invalid = torch.full((1, 4, 2, 2), poison)
    feed = renderer.feed(JOB, events.put)
    feed.offer(step(1, x0=invalid, **{where: invalid}))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9)
    assert feed.broken
    assert head.sizes == []


def test_infinite_x0_of_finite_latents_is_harmless(renderer, events):
    """An x0 may be infinite at zero signal; the generation goes on and the next step has its picture."""
    feed = renderer.feed(JOB, events.put)
    feed.offer(step(1, x0=torch.full((1, 4, 2, 2), float("inf"))))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9)
    assert not feed.broken
    feed.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)


def test_broken_feed_leaves_others_alone(renderer, events):
    """One generation's NaN is not another's."""
    broken, healthy = renderer.feed(JOB, events.put), renderer.feed(JOB, events.put)
    invalid = torch.full((1, 4, 2, 2), float("nan"))
    broken.offer(step(1, x0=invalid, sample=invalid))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9)
    healthy.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)
    assert (broken.broken, healthy.broken) == (True, False)


def test_closed_feed_is_forgotten(renderer, head, events):
    """What waits when a generation ends is never drawn, and the thread goes on with the others."""
    feed, other = renderer.feed(JOB, events.put), renderer.feed(JOB, events.put)
    hold(head, other)
    feed.offer(step(2))
    feed.close()
    other.offer(step(3))
    head.gate.set()
    assert [events.get(timeout=PATIENCE) for _ in range(2)] == [preview(1), preview(3)]
    assert events.empty()


def test_closing_the_renderer_ends_its_thread(head, events):
    """Closing draws what is due, then ends the thread."""
    before = set(threading.enumerate())
    renderer = PreviewRenderer(head)
    (thread,) = (each for each in set(threading.enumerate()) - before if each.name == "calotype-preview")
    assert thread.daemon
    renderer.feed(JOB, events.put).offer(step(1))
    renderer.close()
    assert not thread.is_alive()
    assert events.get_nowait() == preview(1)
