"""What is measured at load."""

from __future__ import annotations

import pytest
import torch

from calotype_server.engine import sample_calls
from calotype_server.engine.capabilities import Defaults, describe
from support.engine import tiny


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_the_denoiser_is_called_as_a_request_calls_it(family: str) -> None:
    """The captured call repeats the pipeline's own first call, and gives the same answer every time."""
    pipeline = tiny.prompted(family)
    call = sample_calls.denoiser_call(pipeline, describe(family, pipeline, Defaults()))
    first, second = call()[0], call()[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize(("single", "expected"), [(0.5, 1), (2.0, 4)])
def test_the_quicker_number_of_threads_is_picked(monkeypatch: pytest.MonkeyPatch, single: float, expected: int) -> None:
    """One thread where it is quicker, all of them where it is not; torch's setting is as before."""
    pipeline = tiny.shared("sd15")
    now = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        monkeypatch.setattr(sample_calls, "_seconds", lambda _: single * 0.1 if torch.get_num_threads() == 1 else 0.1)
        assert sample_calls.pick_threads(pipeline, describe("x", pipeline, Defaults())) == expected
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(now)


def test_a_slow_denoiser_is_not_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second for one call is work for every core."""
    pipeline = tiny.shared("sd15")
    now = torch.get_num_threads()
    torch.set_num_threads(4)
    measured = []
    monkeypatch.setattr(sample_calls, "_seconds", lambda _: measured.append(1) or 0.6)
    try:
        assert sample_calls.pick_threads(pipeline, describe("x", pipeline, Defaults())) == 4
        assert len(measured) == 1
    finally:
        torch.set_num_threads(now)
