"""The preview thread draws the newest step, survives what goes wrong, and never makes the denoiser wait."""

import dataclasses
import itertools
import queue
import threading
from types import SimpleNamespace

import pytest
import torch

from calotype_server.engine.preview import queue as queue_module
from calotype_server.engine.preview.budget import PreviewBudget
from calotype_server.engine.preview.device_stream import CpuStream
from calotype_server.engine.preview.renderer import PreviewRenderer
from calotype_server.engine.tap import Step
from calotype_server.types import Denoising, Job, Pixels, PreviewMethod, PreviewOptions, PreviewReady

PATIENCE = 20
"""Seconds until a test that waits for something gives up."""

# By name, so that no budget decides what is drawn.
OPTIONS = PreviewOptions(method=PreviewMethod.HEAD)
JOB = Job("a red apple", None, 64, 32, 9, None, 0, "DDIMScheduler", OPTIONS)


class Drawer:
    """Draws pictures whose bytes are the number of the step; can be held up, and can fail."""

    def __init__(self):
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.failing = set()
        self.failure = ValueError
        self.poisoned = set()
        self.sizes = []
        self.batches = []
        """The steps of each call."""

    def decode(self, latents, width, height):
        self.entered.release()
        assert self.gate.wait(PATIENCE)
        self.sizes.append((width, height))
        numbers = [int(number) for number in latents.flatten(1)[:, 0]]
        self.batches.append(numbers)
        if self.failing & set(numbers):
            raise self.failure("the decoder is confused")
        values = torch.tensor([float("nan") if number in self.poisoned else number / 255 for number in numbers])
        return values[:, None, None, None].expand(-1, 3, 2, 3)


def renderer_of(drawer, **others):
    """A renderer with one decoder."""
    return PreviewRenderer({PreviewMethod.HEAD: drawer}, PreviewBudget(0.02), CpuStream(), **others)


@pytest.fixture
def head():
    """What the renderer draws with."""
    return Drawer()


@pytest.fixture
def renderer(head):
    """A renderer that is closed at the end, whatever its decoder waits for."""
    renderer = renderer_of(head)
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
    return PreviewReady(number, 9, Pixels(3, 2, bytes([number]) * 18), PreviewMethod.HEAD, skipped)


def hold(head, preview_queue, number=1):
    """Stops the preview thread in the middle of drawing a step."""
    head.gate.clear()
    preview_queue.offer(step(number))
    assert head.entered.acquire(timeout=PATIENCE)


def test_step_becomes_a_picture(renderer, head, events):
    """An offered step comes back as its picture, drawn for the shape that the job asks for."""
    renderer.open_queue(JOB, events.put).offer(step(3))
    assert events.get(timeout=PATIENCE) == preview(3)
    assert head.sizes == [(64, 32)]


def test_newest_step_wins(renderer, head, events):
    """While one picture is drawn, steps replace each other; the newest is drawn next and says how many it replaced."""
    preview_queue = renderer.open_queue(JOB, events.put)
    hold(head, preview_queue)
    for number in (2, 3, 4):
        preview_queue.offer(step(number))
    # That they are done is told at once, whatever takes so long to draw.
    assert [events.get(timeout=PATIENCE) for _ in range(2)] == [Denoising(3, 9), Denoising(4, 9)]
    head.gate.set()
    # A loss is told with whatever is told next.
    assert [events.get(timeout=PATIENCE) for _ in range(2)] == [preview(1, skipped=2), preview(4)]
    preview_queue.offer(step(5))
    assert events.get(timeout=PATIENCE) == preview(5)
    assert events.empty()


def queues_of(renderer, events, names, job=JOB):
    """A preview_queue for each name, whose events come with that name."""
    return [renderer.open_queue(job, lambda event, name=name: events.put((name, event))) for name in names]


def test_feeds_take_turns(renderer, head, events):
    """Generations that are due together are drawn by one call, in the order in which they became due."""
    first, second, third = queues_of(renderer, events, "abc")
    hold(head, first)
    second.offer(step(5))
    first.offer(step(2))
    third.offer(step(7))
    head.gate.set()
    drawn = [events.get(timeout=PATIENCE) for _ in range(4)]
    assert drawn == [("a", preview(1)), ("b", preview(5)), ("a", preview(2)), ("c", preview(7))]
    assert head.batches == [[1], [5, 2, 7]]


@pytest.mark.parametrize("difference", [{"width": 32}, {"height": 64}])
def test_only_what_is_alike_is_drawn_together(renderer, head, events, difference):
    """Pictures of other sizes are drawn by a call of their own."""
    first, second = queues_of(renderer, events, "ab")
    (other,) = queues_of(renderer, events, "c", dataclasses.replace(JOB, **difference))
    hold(head, first)
    for preview_queue, number in ((first, 2), (other, 3), (second, 4)):
        preview_queue.offer(step(number))
    head.gate.set()
    assert len([events.get(timeout=PATIENCE) for _ in range(4)]) == 4
    assert head.batches == [[1], [2, 4], [3]]


@pytest.mark.parametrize("trouble", ["failing", "poisoned"])
def test_trouble_in_a_batch_costs_the_culprits_preview_only(renderer, head, events, logs, trouble):
    """Where one picture of a batch raises or is NaN, the others are shown, and the loss is counted once."""
    setattr(head, trouble, {5})
    first, second, third = queues_of(renderer, events, "abc")
    hold(head, first)
    for preview_queue, number in ((first, 2), (second, 5), (third, 7)):
        preview_queue.offer(step(number))
    head.gate.set()
    told = dict([events.get(timeout=PATIENCE) for _ in range(4)][1:])
    assert told == {"a": preview(2), "b": Denoising(5, 9, 1), "c": preview(7)}
    assert not second.invalid
    second.offer(step(6))
    assert events.get(timeout=PATIENCE) == ("b", preview(6))


def test_two_troubles_in_a_batch_are_counted_once_each(renderer, head, events, logs):
    """A member whose x0 is infinite is counted once, although the batch is drawn again for another's failure."""
    head.failing = {5}
    first, second, third = queues_of(renderer, events, "abc")
    hold(head, first)
    first.offer(step(2))
    second.offer(step(5))
    third.offer(step(7, x0=torch.full((1, 4, 2, 2), float("inf"))))
    head.gate.set()
    told = dict([events.get(timeout=PATIENCE) for _ in range(4)][1:])
    assert told == {"a": preview(2), "b": Denoising(5, 9, 1), "c": Denoising(7, 9, 1)}


@pytest.mark.parametrize("failure", [ValueError, SystemExit])
@pytest.mark.parametrize("trouble", ["failing", "poisoned"])
def test_failure_costs_one_picture(renderer, head, events, logs, trouble, failure):
    """A decoder that raises or gives NaN leaves progress without a picture, counted; the next step is drawn."""
    setattr(head, trouble, {1})
    head.failure = failure
    preview_queue = renderer.open_queue(JOB, events.put)
    preview_queue.offer(step(1))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9, 1)
    preview_queue.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)
    assert [(entry["log_level"], entry["step"]) for entry in logs] == [("error", 1)] * (trouble == "failing")
    assert not preview_queue.invalid


def test_failing_x0_costs_one_picture(renderer, events, logs):
    """A scheduler that cannot compute its x0 costs a picture, and nothing else."""

    def fail():
        raise RuntimeError("no x0 today")

    preview_queue = renderer.open_queue(JOB, events.put)
    preview_queue.offer(SimpleNamespace(number=1, total=9, x0=fail, sample=torch.ones(1, 4, 2, 2)))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9, 1)
    preview_queue.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)


def test_unknown_x0_is_progress(renderer, head, events):
    """A step whose x0 is unknown is progress without a picture, never a picture of noise."""
    preview_queue = renderer.open_queue(JOB, events.put)
    unknown = Step(1, 9, torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), None, None, None)
    preview_queue.offer(unknown)
    assert events.get(timeout=PATIENCE) == Denoising(1, 9)
    assert head.sizes == []
    assert not preview_queue.invalid


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["sample", "model_output"])
def test_invalid_latents_break_the_feed(renderer, head, events, poison, where):
    """NaN or infinity in the latents or in the model's answer marks the generation as broken, before it is told."""
    invalid = torch.full((1, 4, 2, 2), poison)
    preview_queue = renderer.open_queue(JOB, events.put)
    preview_queue.offer(step(1, x0=invalid, **{where: invalid}))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9, 1)
    assert preview_queue.invalid
    assert head.sizes == []


def test_infinite_x0_of_finite_latents_is_harmless(renderer, events):
    """An x0 may be infinite at zero signal; the generation goes on and the next step has its picture."""
    preview_queue = renderer.open_queue(JOB, events.put)
    preview_queue.offer(step(1, x0=torch.full((1, 4, 2, 2), float("inf"))))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9, 1)
    assert not preview_queue.invalid
    preview_queue.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)


def test_broken_feed_leaves_others_alone(renderer, events):
    """One generation's NaN is not another's."""
    broken, healthy = renderer.open_queue(JOB, events.put), renderer.open_queue(JOB, events.put)
    invalid = torch.full((1, 4, 2, 2), float("nan"))
    broken.offer(step(1, x0=invalid, sample=invalid))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9, 1)
    healthy.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)
    assert (broken.invalid, healthy.invalid) == (True, False)


def test_closed_feed_is_forgotten(renderer, head, events):
    """What waits when a generation ends is never drawn, and the thread goes on with the others."""
    preview_queue, other = renderer.open_queue(JOB, events.put), renderer.open_queue(JOB, events.put)
    hold(head, other)
    preview_queue.offer(step(2))
    preview_queue.close()
    other.offer(step(3))
    head.gate.set()
    assert [events.get(timeout=PATIENCE) for _ in range(2)] == [preview(1), preview(3)]
    assert events.empty()


def test_closing_the_renderer_ends_its_thread(head, events):
    """Closing draws what is due, then ends the thread."""
    before = set(threading.enumerate())
    renderer = renderer_of(head)
    (thread,) = (each for each in set(threading.enumerate()) - before if each.name == "calotype-preview")
    assert thread.daemon
    renderer.open_queue(JOB, events.put).offer(step(1))
    renderer.close()
    assert not thread.is_alive()
    assert events.get_nowait() == preview(1)


def test_the_last_step_is_drawn_before_the_end(renderer, events):
    """When `flush` returns, what was due has been reported."""
    for _ in range(50):
        preview_queue = renderer.open_queue(JOB, events.put)
        preview_queue.offer(step(8))
        preview_queue.offer(step(9))
        preview_queue.flush()
        told = []
        while not events.empty():
            told.append(events.get_nowait())
        assert told[-1].step == 9
        assert isinstance(told[-1], PreviewReady)


@pytest.mark.parametrize("failing", [set(), {9}])
def test_flush_waits_for_what_is_being_drawn(renderer, head, events, failing):
    """A picture that is under way is waited for, also when it comes to nothing."""
    head.failing = failing
    preview_queue = renderer.open_queue(JOB, events.put)
    hold(head, preview_queue, number=9)
    flushing = threading.Thread(target=lambda: (preview_queue.flush(), events.put("flushed")))
    flushing.start()
    head.gate.set()
    assert events.get(timeout=PATIENCE) == (Denoising(9, 9, 1) if failing else preview(9))
    assert events.get(timeout=PATIENCE) == "flushed"
    flushing.join()


def test_flush_of_nothing_returns(renderer, events):
    """Where nothing was due, or all of it is drawn, there is nothing to wait for."""
    preview_queue = renderer.open_queue(JOB, events.put)
    preview_queue.flush()
    preview_queue.offer(step(1))
    preview_queue.flush()
    preview_queue.flush()
    assert events.get_nowait() == preview(1)


def test_none_reports_progress_and_draws_nothing(renderer, head, events):
    """Without previews each step, the last included, is progress, told by the denoiser's own thread."""
    preview_queue = renderer.open_queue(
        dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod.NONE)), events.put
    )
    for number in range(1, 10):
        preview_queue.offer(step(number))
        assert events.get_nowait() == Denoising(number, 9)
    preview_queue.flush()
    assert events.empty()
    assert head.batches == []


def test_steps_between_are_progress(renderer, head, events):
    """With every third step asked for, the others are told without a picture, and the last has one."""
    options = dataclasses.replace(OPTIONS, every_steps=4)
    preview_queue = renderer.open_queue(dataclasses.replace(JOB, preview=options), events.put)
    told = []
    for number in range(1, 10):
        preview_queue.offer(step(number))
        told.append(events.get(timeout=PATIENCE))
    shown = {4, 8, 9}
    assert told == [preview(number) if number in shown else Denoising(number, 9) for number in range(1, 10)]


def test_a_method_that_is_not_there_is_progress(renderer, head, events):
    """What no decoder can draw is not drawn by another."""
    options = PreviewOptions(method=PreviewMethod.FULL_VAE)
    preview_queue = renderer.open_queue(dataclasses.replace(JOB, preview=options), events.put)
    preview_queue.offer(step(9))
    preview_queue.flush()
    assert events.get_nowait() == Denoising(9, 9)
    assert head.batches == []


def test_automatic_draws_with_what_there_is(renderer, head, events):
    """The budget chooses among the decoders; the last step is shown whatever it says."""
    preview_queue = renderer.open_queue(dataclasses.replace(JOB, preview=PreviewOptions()), events.put)
    preview_queue.offer(step(9))
    assert events.get(timeout=PATIENCE) == preview(9)


def test_a_reporter_that_raises_harms_nobody_else(renderer, events, logs):
    """The thread goes on, and `flush` does not wait for ever."""

    def fail(event):
        raise KeyError("reporter")

    broken, healthy = renderer.open_queue(JOB, fail), renderer.open_queue(JOB, events.put)
    broken.offer(step(9))
    broken.flush()
    healthy.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)
    assert [entry["log_level"] for entry in logs] == ["error"]


def test_the_budget_learns_what_decoding_took(head, events):
    """Each picture tells the budget the processor's time, for its size."""
    budget = PreviewBudget(0.02)
    renderer = PreviewRenderer({PreviewMethod.HEAD: head}, budget, CpuStream())
    assert budget.cost(PreviewMethod.HEAD, JOB.pixel_count) is None
    renderer.open_queue(JOB, events.put).offer(step(1))
    renderer.close()
    assert budget.cost(PreviewMethod.HEAD, JOB.pixel_count) > 0


def test_company_shares_the_denoisers_time(renderer, head, events, monkeypatch):
    """Two generations whose steps take a second together may spend on previews what one of half a second may."""
    observed = []
    monkeypatch.setattr(renderer._budget, "observe_step", lambda seconds, _: observed.append(seconds))
    clock = itertools.count()
    monkeypatch.setattr(queue_module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    first, second = renderer.open_queue(JOB, events.put), renderer.open_queue(JOB, events.put)
    first.offer(step(1))
    first.offer(step(2))
    second.close()
    first.offer(step(3))
    assert observed == [0.5, 1.0]


class TestChores:
    """What can wait is done when nothing is due."""

    def test_chore_waits_for_what_is_due(self, renderer, head, events):
        """However long a chore has waited, a step that became due after it goes first."""
        preview_queue = renderer.open_queue(JOB, events.put)
        hold(head, preview_queue)
        for name in ("first", "second"):
            renderer.when_idle(lambda name=name: events.put(name))
        preview_queue.offer(step(2))
        head.gate.set()
        assert [events.get(timeout=PATIENCE) for _ in range(4)] == [preview(1), preview(2), "first", "second"]

    def test_a_step_comes_between_two_chores(self, renderer, head, events):
        """A step that becomes due during a chore is drawn before the next one."""
        begun, go_on = threading.Event(), threading.Event()
        renderer.when_idle(lambda: (begun.set(), go_on.wait(PATIENCE)))
        assert begun.wait(PATIENCE)
        renderer.when_idle(lambda: events.put("second"))
        renderer.open_queue(JOB, events.put).offer(step(1))
        go_on.set()
        assert [events.get(timeout=PATIENCE) for _ in range(2)] == [preview(1), "second"]

    def test_failure_of_a_chore_is_logged(self, renderer, events, logs):
        """It costs what it would have done, and nothing else."""

        def fail():
            raise ValueError("nothing to learn")

        renderer.when_idle(fail)
        renderer.open_queue(JOB, events.put).offer(step(1))
        renderer.when_idle(lambda: events.put("next"))
        assert {str(events.get(timeout=PATIENCE)) for _ in range(2)} == {str(preview(1)), "next"}
        assert [entry["log_level"] for entry in logs] == ["error"]

    def test_too_many_chores_are_forgotten(self, head, events):
        """Under load they do not pile up, and hold no tensors."""
        renderer = renderer_of(head)
        hold(head, renderer.open_queue(JOB, queue.SimpleQueue().put))
        for number in range(20):
            renderer.when_idle(lambda number=number: events.put(number))
        head.gate.set()
        renderer.close()
        done = []
        while not events.empty():
            done.append(events.get_nowait())
        assert done == list(range(8))
