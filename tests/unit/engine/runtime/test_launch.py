"""Graphs are worth while only where launching takes most of a step."""

import itertools

import pytest

from calotype_server.engine.runtime.launch import Launch, measure_launch, worth_capturing


@pytest.mark.parametrize(
    ("launch", "step", "worth"),
    [(34.4, 33.7, True), (58.8, 80.9, True), (114, 173, False), (70, 100, True), (69.9, 100, False), (0, 1, False)],
)
def test_launching_must_take_seventy_percent(launch, step, worth):
    """The measured figures of SD 1.5 and SDXL qualify, those of FLUX do not."""
    assert worth_capturing(launch, step) is worth


def test_the_fastest_of_three_calls_counts():
    """A launch ends when the call returns, a step when the device is done; the first call only warms up."""
    now = itertools.accumulate([0, 3, 1, 0, 2, 1, 0, 4, 4])
    done = []
    found = measure_launch(lambda: done.append("call"), lambda: done.append("wait"), clock=lambda: next(now))
    assert found == Launch(2, 3)
    assert done == ["call", *["wait", "call", "wait"] * 3]
