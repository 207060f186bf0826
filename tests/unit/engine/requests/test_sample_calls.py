"""Realistic denoiser calls, captured from the pipeline's own code."""

from __future__ import annotations

import pytest
import torch

from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.requests.sample_calls import denoiser_call
from support.engine import tiny


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_the_captured_call_can_be_repeated(family: str) -> None:
    """The captured call gives the same answer every time."""
    pipeline = tiny.prompted(family)
    call = denoiser_call(pipeline, describe(family, pipeline, Defaults()))
    first, second = call()[0], call()[0]
    assert torch.equal(first, second)
