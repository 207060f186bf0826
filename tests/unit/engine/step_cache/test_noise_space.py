"""Model outputs converted to noise and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calotype_server.engine.schedulers.predicted_x0 import NoiseLevel, predict_x0
from calotype_server.engine.step_cache.noise_space import from_noise, to_noise

KINDS = ["epsilon", "sample", "v_prediction", "flow_prediction", "inverted_flow_prediction"]


def level_of(kind, share, scale):
    """Returns a noise level: a variance-preserving one times `scale`, or that of a flow."""
    if "flow" in kind:
        return NoiseLevel(kind, 1 - share, share)
    return NoiseLevel(kind, scale * (1 - share**2) ** 0.5, scale * share)


@given(st.sampled_from(KINDS), st.floats(0.05, 0.95), st.sampled_from([1.0, 8.0]), st.integers(0, 99))
def test_noise_and_x0_make_up_the_sample(kind, share, scale, seed):
    """The predicted noise and the predicted x0 of an output add up to the sample, and lead back to the output."""
    generator = torch.Generator().manual_seed(seed)
    sample, output = torch.randn(2, 1, 4, dtype=torch.float64, generator=generator)
    level = level_of(kind, share, scale)
    noise = to_noise(level, sample, output)
    assert torch.allclose(level.alpha * predict_x0(None, level, sample, output) + level.sigma * noise, sample)
    assert torch.allclose(from_noise(level, sample, noise), output)


@pytest.mark.parametrize("level", [None, NoiseLevel("edm", None, 0.5), NoiseLevel("v_prediction", 0.6, 0.8)])
def test_other_outputs_stay_as_they_are(level):
    """An output of an unknown kind, or with other channels than the sample, is not converted."""
    sample = torch.ones(1, 4)
    output = torch.ones(1, 8) if level is not None and level.kind == "v_prediction" else torch.ones(1, 4)
    assert to_noise(level, sample, output) is output
    assert from_noise(level, sample, output) is output
