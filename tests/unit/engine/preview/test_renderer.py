"""The preview thread renders the newest step, survives failures, and never delays the denoiser."""

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
from calotype_server.types import Denoising, PreviewMethod, PreviewOptions, PreviewReady
from support.engine.rendering import JOB, OPTIONS, PATIENCE, hold, preview, queues_of, renderer_of, step


def test_an_offered_step_becomes_a_preview(renderer, head, events):
    """An offered step is reported with its image, decoded for the size of the job."""
    renderer.open_queue(JOB, events.put).offer(step(3))
    assert events.get(timeout=PATIENCE) == preview(3)
    assert head.sizes == [(64, 32)]


def test_the_newest_step_replaces_older_ones(renderer, head, events):
    """While one step is rendered, only the newest waits; the next event counts the replaced ones as skipped."""
    preview_queue = renderer.open_queue(JOB, events.put)
    hold(head, preview_queue)
    for number in (2, 3, 4):
        preview_queue.offer(step(number))
    # The progress of replaced steps is reported at once.
    assert [events.get(timeout=PATIENCE) for _ in range(2)] == [Denoising(3, 9), Denoising(4, 9)]
    head.gate.set()
    # Skipped previews are counted in the next event.
    assert [events.get(timeout=PATIENCE) for _ in range(2)] == [preview(1, skipped=2), preview(4)]
    preview_queue.offer(step(5))
    assert events.get(timeout=PATIENCE) == preview(5)
    assert events.empty()


def test_steps_that_are_due_together_are_batched(renderer, head, events):
    """Steps of several generations are decoded by one call, in the order in which they became due."""
    first, second, third = queues_of(renderer, events, "abc")
    hold(head, first)
    second.offer(step(5))
    first.offer(step(2))
    third.offer(step(7))
    head.gate.set()
    drawn = [events.get(timeout=PATIENCE) for _ in range(4)]
    assert drawn == [("a", preview(1)), ("b", preview(5)), ("a", preview(2)), ("c", preview(7))]
    assert head.batches == [[1], [5, 2, 7]]


def test_a_batch_waits_for_the_device_twice(renderer, head, events, monkeypatch):
    """Reading numbers from a GPU waits for it: a batch asks once which rows are finite, and once for the pixels."""
    first, second, third = queues_of(renderer, events, "abc")
    reads = []
    for name in ("tolist", "cpu", "__float__", "item"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, name=name, read=read: (reads.append(name), read(*args))[1]
        )
    hold(head, first)
    for preview_queue in (first, second, third):
        preview_queue.offer(step(2))
    head.gate.set()
    for _ in range(4):
        assert events.get(timeout=PATIENCE)[1].pixels
    assert reads == ["tolist", "cpu"] * 2


@pytest.mark.parametrize("difference", [{"width": 32}, {"height": 64}])
def test_different_sizes_are_not_batched(renderer, head, events, difference):
    """Images of different sizes are decoded by separate calls."""
    first, second = queues_of(renderer, events, "ab")
    (other,) = queues_of(renderer, events, "c", dataclasses.replace(JOB, **difference))
    hold(head, first)
    for preview_queue, number in ((first, 2), (other, 3), (second, 4)):
        preview_queue.offer(step(number))
    head.gate.set()
    assert len([events.get(timeout=PATIENCE) for _ in range(4)]) == 4
    assert head.batches == [[1], [2, 4], [3]]


def test_a_closed_queue_drops_its_step(renderer, head, events):
    """A step that waits when its generation ends is never rendered, and other generations are not affected."""
    preview_queue, other = renderer.open_queue(JOB, events.put), renderer.open_queue(JOB, events.put)
    hold(head, other)
    preview_queue.offer(step(2))
    preview_queue.close()
    other.offer(step(3))
    head.gate.set()
    assert [events.get(timeout=PATIENCE) for _ in range(2)] == [preview(1), preview(3)]
    assert events.empty()


def test_closing_the_renderer_ends_its_thread(head, events):
    """Closing renders the steps that are due, then ends the thread."""
    before = set(threading.enumerate())
    renderer = renderer_of(head)
    (thread,) = (each for each in set(threading.enumerate()) - before if each.name == "calotype-preview")
    assert thread.daemon
    renderer.open_queue(JOB, events.put).offer(step(1))
    renderer.close()
    assert not thread.is_alive()
    assert events.get_nowait() == preview(1)


def test_flush_waits_for_the_last_step(renderer, events):
    """When `flush` returns, all steps that were due have been reported."""
    for _ in range(50):
        preview_queue = renderer.open_queue(JOB, events.put)
        preview_queue.offer(step(8))
        preview_queue.offer(step(9))
        preview_queue.flush()
        reported = []
        while not events.empty():
            reported.append(events.get_nowait())
        assert reported[-1].step == 9
        assert isinstance(reported[-1], PreviewReady)


@pytest.mark.parametrize("failing", [set(), {9}])
def test_flush_waits_for_the_current_step(renderer, head, events, failing):
    """`flush` waits for the step that is being rendered, even if rendering fails."""
    head.failing = failing
    preview_queue = renderer.open_queue(JOB, events.put)
    hold(head, preview_queue, number=9)
    flushing = threading.Thread(target=lambda: (preview_queue.flush(), events.put("flushed")))
    flushing.start()
    head.gate.set()
    assert events.get(timeout=PATIENCE) == (Denoising(9, 9, 1) if failing else preview(9))
    assert events.get(timeout=PATIENCE) == "flushed"
    flushing.join()


def test_flush_returns_at_once_without_due_steps(renderer, events):
    """If nothing was due, or everything is rendered, `flush` does not block."""
    preview_queue = renderer.open_queue(JOB, events.put)
    preview_queue.flush()
    preview_queue.offer(step(1))
    preview_queue.flush()
    preview_queue.flush()
    assert events.get_nowait() == preview(1)


def test_none_reports_progress_only(renderer, head, events):
    """Without previews each step, including the last, is reported as progress by the denoiser's own thread."""
    preview_queue = renderer.open_queue(
        dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod.NONE)), events.put
    )
    for number in range(1, 10):
        preview_queue.offer(step(number))
        assert events.get_nowait() == Denoising(number, 9)
    preview_queue.flush()
    assert events.empty()
    assert head.batches == []


def test_steps_between_previews_are_reported_as_progress(renderer, head, events):
    """With `every_steps=4`, every fourth step and the last one have a preview; the others are progress."""
    options = dataclasses.replace(OPTIONS, every_steps=4)
    preview_queue = renderer.open_queue(dataclasses.replace(JOB, preview=options), events.put)
    reported = []
    for number in range(1, 10):
        preview_queue.offer(step(number))
        reported.append(events.get(timeout=PATIENCE))
    shown = {4, 8, 9}
    assert reported == [preview(number) if number in shown else Denoising(number, 9) for number in range(1, 10)]


def test_an_unavailable_method_shows_nothing(renderer, head, events):
    """If the requested method has no decoder, no other decoder is used."""
    options = PreviewOptions(method=PreviewMethod.FULL_VAE)
    preview_queue = renderer.open_queue(dataclasses.replace(JOB, preview=options), events.put)
    preview_queue.offer(step(9))
    preview_queue.flush()
    assert events.get_nowait() == Denoising(9, 9)
    assert head.batches == []


def test_automatic_uses_the_available_decoder(renderer, head, events):
    """With AUTO the budget chooses among the decoders, and the last step is always shown."""
    preview_queue = renderer.open_queue(dataclasses.replace(JOB, preview=PreviewOptions()), events.put)
    preview_queue.offer(step(9))
    assert events.get(timeout=PATIENCE) == preview(9)


def test_the_budget_records_decoding_times(head, events):
    """After a preview, the budget knows the decoder's CPU time for that size."""
    budget = PreviewBudget(0.02)
    renderer = PreviewRenderer({PreviewMethod.HEAD: head}, budget, CpuStream())
    assert budget.cost(PreviewMethod.HEAD, JOB.pixel_count) is None
    renderer.open_queue(JOB, events.put).offer(step(1))
    renderer.close()
    assert budget.cost(PreviewMethod.HEAD, JOB.pixel_count) > 0


def test_generations_share_the_denoisers_time(renderer, head, events, monkeypatch):
    """With two open generations, each accounts for half of the time between its steps; alone, for all of it."""
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


class TestIdleTasks:
    """Idle tasks run when no step is due."""

    def test_due_steps_run_before_idle_tasks(self, renderer, head, events):
        """A step that became due after a waiting task still runs first."""
        preview_queue = renderer.open_queue(JOB, events.put)
        hold(head, preview_queue)
        for name in ("first", "second"):
            renderer.when_idle(lambda name=name: events.put(name))
        preview_queue.offer(step(2))
        head.gate.set()
        assert [events.get(timeout=PATIENCE) for _ in range(4)] == [preview(1), preview(2), "first", "second"]

    def test_a_step_runs_between_two_tasks(self, renderer, head, events):
        """A step that becomes due during a task is rendered before the next task."""
        started, proceed = threading.Event(), threading.Event()
        renderer.when_idle(lambda: (started.set(), proceed.wait(PATIENCE)))
        assert started.wait(PATIENCE)
        renderer.when_idle(lambda: events.put("second"))
        renderer.open_queue(JOB, events.put).offer(step(1))
        proceed.set()
        assert [events.get(timeout=PATIENCE) for _ in range(2)] == [preview(1), "second"]

    def test_a_failing_task_is_logged(self, renderer, events, logs):
        """An exception in a task is logged, and later previews and tasks still run."""

        def fail():
            raise ValueError("nothing to learn")

        renderer.when_idle(fail)
        renderer.open_queue(JOB, events.put).offer(step(1))
        renderer.when_idle(lambda: events.put("next"))
        assert {str(events.get(timeout=PATIENCE)) for _ in range(2)} == {str(preview(1)), "next"}
        assert [entry["log_level"] for entry in logs] == ["error"]

    def test_too_many_tasks_are_dropped(self, head, events):
        """At most eight tasks wait, so that they cannot keep many tensors alive."""
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
