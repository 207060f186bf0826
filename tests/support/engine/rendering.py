"""A preview renderer with a controllable decoder, for tests of the preview thread."""

import threading

import torch

from calotype_server.engine.preview.budget import PreviewBudget
from calotype_server.engine.preview.device_stream import CpuStream
from calotype_server.engine.preview.renderer import PreviewRenderer
from calotype_server.engine.tap import Step
from calotype_server.types import Job, Pixels, PreviewMethod, PreviewOptions, PreviewReady

PATIENCE = 20
"""Seconds until a test that waits for something gives up."""

# An explicit method, so that the budget does not choose.
OPTIONS = PreviewOptions(method=PreviewMethod.HEAD)
JOB = Job("a red apple", None, 64, 32, 9, None, 0, "DDIMScheduler", OPTIONS)


class Drawer:
    """Decodes to images whose bytes are the number of the step. It can be blocked, and it can fail."""

    def __init__(self):
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.failing = set()
        self.failure = ValueError
        self.poisoned = set()
        self.sizes = []
        self.batches = []
        """Numbers of the steps in each call."""

    def decode(self, latents, width, height):
        self.entered.release()
        assert self.gate.wait(PATIENCE)
        self.sizes.append((width, height))
        # A real decoder also turns invalid latents into some image.
        numbers = [int(number) for number in latents.flatten(1)[:, 0].nan_to_num(0, 0, 0)]
        self.batches.append(numbers)
        if self.failing & set(numbers):
            raise self.failure("the decoder is confused")
        values = torch.tensor([float("nan") if number in self.poisoned else number / 255 for number in numbers])
        return values[:, None, None, None].expand(-1, 3, 2, 3)


def renderer_of(drawer, **others):
    """Returns a renderer with one decoder."""
    return PreviewRenderer({PreviewMethod.HEAD: drawer}, PreviewBudget(0.02), CpuStream(), **others)


def step(number, *, x0=None, sample=None, model_output=None):
    """Returns a finished step with `x0`, by default filled with the number of the step."""
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
    """Returns the event with the decoder's image of a step."""
    return PreviewReady(number, 9, Pixels(3, 2, bytes([number]) * 18), PreviewMethod.HEAD, skipped)


def hold(head, preview_queue, number=1):
    """Blocks the preview thread while it renders a step."""
    head.gate.clear()
    preview_queue.offer(step(number))
    assert head.entered.acquire(timeout=PATIENCE)


def queues_of(renderer, events, names, job=JOB):
    """Returns a queue for each name; its events are reported together with that name."""
    return [renderer.open_queue(job, lambda event, name=name: events.put((name, event))) for name in names]
