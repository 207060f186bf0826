"""The durations of a generation's phases."""

import time

import pytest

from calotype_server.generations.stopwatch import Stopwatch
from calotype_server.types import Decoding, Denoising, EncodingPrompt


def test_the_device_corrects_the_start_of_decoding(monkeypatch):
    """An event that says for how long the device has decoded moves time from decoding to denoising."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[-1])
    stopwatch = Stopwatch()
    for now, event in ((1.0, EncodingPrompt()), (2.0, Denoising(0, 4)), (5.0, Decoding(batch_rows=2))):
        clock.append(now)
        assert stopwatch.note(event)
    clock.append(8.0)
    assert not stopwatch.note(Decoding(batch_rows=2, seconds=1.0))
    timings = stopwatch.timings()
    assert (timings.encoding_prompt, timings.denoising, timings.decoding) == pytest.approx((1.0, 5.0, 1.0))
    assert stopwatch.batch_rows == 2
