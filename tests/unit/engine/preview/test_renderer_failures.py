"""Failures of decoders, invalid latents and failing reports affect as few previews as possible."""

from types import SimpleNamespace

import pytest
import torch

from calotype_server.engine.tap import Step
from calotype_server.failpoints import injected
from calotype_server.types import Denoising
from support.engine.rendering import JOB, PATIENCE, hold, preview, queues_of, step


@pytest.mark.parametrize("fault", ["failing", "poisoned"])
def test_a_failure_in_a_batch_affects_one_preview(renderer, head, events, logs, fault):
    """If one image of a batch raises or is NaN, the others are shown, and one skipped preview is counted."""
    setattr(head, fault, {5})
    first, second, third = queues_of(renderer, events, "abc")
    hold(head, first)
    for preview_queue, number in ((first, 2), (second, 5), (third, 7)):
        preview_queue.offer(step(number))
    head.gate.set()
    reported = dict([events.get(timeout=PATIENCE) for _ in range(4)][1:])
    assert reported == {"a": preview(2), "b": Denoising(5, 9, 1), "c": preview(7)}
    assert not second.invalid
    second.offer(step(6))
    assert events.get(timeout=PATIENCE) == ("b", preview(6))


def test_two_failures_in_a_batch_are_counted_once_each(renderer, head, events, logs):
    """A step whose x0 is infinite is counted once, even if its batch is rendered again because another one failed."""
    head.failing = {5}
    first, second, third = queues_of(renderer, events, "abc")
    hold(head, first)
    first.offer(step(2))
    second.offer(step(5))
    third.offer(step(7, x0=torch.full((1, 4, 2, 2), float("inf"))))
    head.gate.set()
    reported = dict([events.get(timeout=PATIENCE) for _ in range(4)][1:])
    assert reported == {"a": preview(2), "b": Denoising(5, 9, 1), "c": Denoising(7, 9, 1)}


@pytest.mark.parametrize("failure", [ValueError, SystemExit])
@pytest.mark.parametrize("fault", ["failing", "poisoned"])
def test_a_failure_affects_one_preview(renderer, head, events, logs, fault, failure):
    """If the decoder raises or returns NaN, progress is reported with one skipped preview; the next step is shown."""
    setattr(head, fault, {1})
    head.failure = failure
    preview_queue = renderer.open_queue(JOB, events.put)
    preview_queue.offer(step(1))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9, 1)
    preview_queue.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)
    assert [(entry["log_level"], entry["step"]) for entry in logs] == [("error", 1)] * (fault == "failing")
    assert not preview_queue.invalid


def test_a_failing_x0_affects_one_preview(renderer, events, logs):
    """If computing x0 raises, one preview is skipped, and the next step is shown."""

    def fail():
        raise RuntimeError("no x0 today")

    preview_queue = renderer.open_queue(JOB, events.put)
    preview_queue.offer(SimpleNamespace(number=1, total=9, x0=fail, sample=torch.ones(1, 4, 2, 2)))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9, 1)
    preview_queue.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)


def test_an_unknown_x0_is_reported_without_an_image(renderer, head, events):
    """A step whose x0 is unknown is reported as progress, and noise is never shown."""
    preview_queue = renderer.open_queue(JOB, events.put)
    unknown = Step(1, 9, torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), None, None, None)
    preview_queue.offer(unknown)
    assert events.get(timeout=PATIENCE) == Denoising(1, 9)
    assert head.sizes == []
    assert not preview_queue.invalid


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["sample", "model_output"])
def test_invalid_latents_mark_the_queue(renderer, head, events, poison, where):
    """NaN or infinity in the latents or in the model's output marks the generation as invalid before the report."""
    invalid = torch.full((1, 4, 2, 2), poison)
    preview_queue = renderer.open_queue(JOB, events.put)
    preview_queue.offer(step(1, x0=invalid, **{where: invalid}))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9, 1)
    assert preview_queue.invalid


def test_an_infinite_x0_of_finite_latents_is_harmless(renderer, events):
    """An x0 may be infinite at zero signal: the generation continues, and the next step is shown."""
    preview_queue = renderer.open_queue(JOB, events.put)
    preview_queue.offer(step(1, x0=torch.full((1, 4, 2, 2), float("inf"))))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9, 1)
    assert not preview_queue.invalid
    preview_queue.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)


def test_an_invalid_generation_does_not_affect_others(renderer, events):
    """NaN in one generation does not mark another generation as invalid."""
    broken, healthy = renderer.open_queue(JOB, events.put), renderer.open_queue(JOB, events.put)
    invalid = torch.full((1, 4, 2, 2), float("nan"))
    broken.offer(step(1, x0=invalid, sample=invalid))
    assert events.get(timeout=PATIENCE) == Denoising(1, 9, 1)
    healthy.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)
    assert (broken.invalid, healthy.invalid) == (True, False)


@pytest.mark.parametrize("failure", [KeyError, SystemExit, GeneratorExit])
def test_a_failing_report_does_not_affect_others(renderer, events, logs, failure):
    """If one generation's `report` raises, other previews are reported, and `flush` still returns."""

    def fail(event):
        raise failure("reporter")

    broken, healthy = renderer.open_queue(JOB, fail), renderer.open_queue(JOB, events.put)
    broken.offer(step(9))
    broken.flush()
    healthy.offer(step(2))
    assert events.get(timeout=PATIENCE) == preview(2)
    assert [entry["log_level"] for entry in logs] == ["error"]


def test_no_exception_ends_the_thread(renderer, events, logs, monkeypatch):
    """If the renderer itself fails, the steps that were due are dropped, `flush` returns, and later steps are shown."""

    def fail(group):
        raise SystemExit(3)

    broken, healthy = queues_of(renderer, events, "ab")
    with monkeypatch.context() as patched:
        patched.setattr(renderer, "_fail", fail)
        with injected("engine.preview", lambda: fail(())):
            broken.offer(step(1))
            broken.flush()
    healthy.offer(step(2))
    assert events.get(timeout=PATIENCE) == ("b", preview(2))
    assert [entry["event"] for entry in logs] == ["previews failed"]
