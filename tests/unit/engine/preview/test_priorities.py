"""The benchmark that compares priorities of the preview stream."""

import pytest
import torch

from benchmarks.gpu.side_stream import PRIORITIES, compare_priorities


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_every_step_is_drawn_with_each_priority(kind):
    """Each priority draws all steps, and gets a ratio and a latency."""
    device = torch.device(kind)
    drawn = []
    found = compare_priorities(
        lambda: torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device),
        lambda latents: drawn.append(float(latents.sum())),
        device,
        steps=3,
        rounds=1,
    )
    assert set(found) == {*PRIORITIES, *(f"latency_{name}" for name in PRIORITIES)}
    assert all(value > 0 for value in found.values())
    assert drawn == [64.0**3] * len(PRIORITIES) * (2 + 3)
