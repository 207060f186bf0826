"""The cost of previews: the choice of a decoder depends only on measurements."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from calotype_server.engine.preview.budget import Choice, PreviewBudget
from calotype_server.engine.preview.costs import CoreCosts, DeviceCosts, PreviewCosts
from calotype_server.types import PreviewMethod

HEAD, TINY, FULL = PreviewMethod.HEAD, PreviewMethod.TINY_VAE, PreviewMethod.FULL_VAE
ALL = (HEAD, TINY, FULL)
PIXELS = 64 * 64
seconds = st.floats(1e-6, 100)


def measured(
    share: float = 0.02,
    *,
    step: float = 1.0,
    encode: float = 0.0,
    costs: PreviewCosts | None = None,
    **decoders: float,
) -> PreviewBudget:
    """Returns a budget with measured seconds for an image of `PIXELS`, by method name."""
    budget = PreviewBudget(share)
    budget.charge(costs or CoreCosts())
    budget.observe_step(step, PIXELS)
    if encode:
        budget.observe_encode(encode)
    for name, value in decoders.items():
        budget.observe_decode(PreviewMethod(name), value, PIXELS)
    return budget


@pytest.mark.parametrize(
    ("decoders", "expected"),
    [
        ({"head": 0.001, "tiny_vae": 0.01, "full_vae": 0.02}, Choice(FULL, 1)),
        ({"head": 0.001, "tiny_vae": 0.01, "full_vae": 0.035}, Choice(FULL, 2)),
        ({"head": 0.001, "tiny_vae": 0.01, "full_vae": 0.045}, Choice(TINY, 1)),
        ({"head": 0.001, "tiny_vae": 0.05, "full_vae": 0.9}, Choice(HEAD, 1)),
        ({"head": 0.1, "tiny_vae": 0.5, "full_vae": 0.9}, Choice(HEAD, 5)),
    ],
)
def test_the_best_method_that_is_fast_enough_is_chosen(decoders: dict, expected: Choice) -> None:
    """With 0.02 s per step for previews, the best decoder that can show every second step is chosen."""
    assert measured(**decoders).choose(ALL, PIXELS) == expected


def test_an_unmeasured_method_is_not_assumed_to_be_fast() -> None:
    """A decoder without a measurement is not preferred to the head."""
    assert PreviewBudget(0.02).choose(ALL, PIXELS) == Choice(HEAD, 1)
    assert measured(head=0.001).choose(ALL, PIXELS) == Choice(HEAD, 1)
    assert measured(head=0.1).choose(ALL, PIXELS) == Choice(HEAD, 5)
    without_steps = PreviewBudget(0.02)
    without_steps.observe_decode(FULL, 1e-9, PIXELS)
    assert without_steps.choose(ALL, PIXELS) == Choice(HEAD, 1)


def test_a_chosen_method_is_kept_up_to_a_larger_stride() -> None:
    """With a stride of two to four steps a generation keeps its method; beyond four it changes."""
    budget = measured(head=0.001, full_vae=0.07)
    assert budget.choose(ALL, PIXELS) == Choice(HEAD, 1)
    assert budget.choose(ALL, PIXELS, current=HEAD) == Choice(HEAD, 1)
    assert budget.choose(ALL, PIXELS, current=FULL) == Choice(FULL, 4)
    assert measured(head=0.001, full_vae=0.09).choose(ALL, PIXELS, current=FULL) == Choice(HEAD, 1)


def test_the_encoder_counts() -> None:
    """The cost of a preview includes encoding."""
    assert measured(head=0.01).stride(HEAD, PIXELS) == 1
    assert measured(head=0.01, encode=0.05).stride(HEAD, PIXELS) == 3


def test_contention_scales_the_cost() -> None:
    """With a contention of 0.5, a preview costs the denoiser half of its computing time."""
    assert measured(head=0.08).stride(HEAD, PIXELS) == 4
    assert measured(head=0.08, costs=CoreCosts(0.5)).stride(HEAD, PIXELS) == 2


def test_a_gpu_loses_only_the_time_of_the_decoder() -> None:
    """On a GPU, the encoder costs nothing, and neither does the time for which a preview waits next to the denoiser."""
    budget = measured(head=0.01, encode=0.5, costs=DeviceCosts())
    for _ in range(100):
        budget.observe_decode(HEAD, 0.3, PIXELS)
    assert budget.cost(HEAD, PIXELS) == pytest.approx(0.01)
    budget.observe_decode(HEAD, 0.004, PIXELS)
    assert budget.cost(HEAD, PIXELS) == pytest.approx(0.004)


@pytest.mark.parametrize(
    ("step", "next_to_steps", "jpeg", "full"),
    [(33.7, 2.02, 0.78, 26.7), (80.9, 1.96, 0.81, 99.3), (173.2, 2.32, 0.80, 102.1)],
    ids=["SD 1.5 at 512 px", "SDXL at 1024 px", "FLUX at 1024 px"],
)
def test_a_gpu_shows_every_step(step: float, next_to_steps: float, jpeg: float, full: float) -> None:
    """With 2 %, AUTO on a GPU shows every step of SD 1.5 and larger models, with the head.

    The milliseconds of a step, of a head's preview next to the denoiser, of its JPEG file and of the full VAE were
    measured on one H200. The time of the head's kernels alone was not: a preview launches 13 operations, and 10 µs
    for each is an upper estimate. The budgets allow 0.67, 1.6 and 3.5 ms.
    """
    budget = measured(step=step, head=13 * 0.01, full_vae=full, costs=DeviceCosts())
    for _ in range(20):
        budget.observe_encode(jpeg)
        budget.observe_decode(HEAD, next_to_steps, PIXELS)
    assert budget.choose(ALL, PIXELS) == Choice(HEAD, 1)


def test_costs_follow_the_size() -> None:
    """Costs of steps and decoders are proportional to the number of pixels; the cost of the encoder is not."""
    budget = measured(head=0.01)
    assert budget.cost(HEAD, 4 * PIXELS) == pytest.approx(0.04)
    assert budget.stride(HEAD, 4 * PIXELS) == budget.stride(HEAD, PIXELS)


def test_the_choice_follows_later_measurements() -> None:
    """If steps become faster, an affordable decoder can become too expensive, and the other way round."""
    budget = measured(head=0.001, full_vae=0.02)
    assert budget.choose(ALL, PIXELS).method is FULL
    for _ in range(30):
        budget.observe_step(0.1, PIXELS)
    assert budget.choose(ALL, PIXELS).method is HEAD
    for _ in range(30):
        budget.observe_decode(FULL, 0.001, PIXELS)
    assert budget.choose(ALL, PIXELS).method is FULL


def test_one_odd_measurement_changes_little() -> None:
    """A single high measurement has a weight of 5 %."""
    budget = measured(head=0.01)
    budget.observe_decode(HEAD, 0.06, PIXELS)
    assert budget.cost(HEAD, PIXELS) == pytest.approx(0.0125)


def test_without_methods_there_is_no_choice() -> None:
    """Without an available method the choice is None."""
    assert measured(head=0.01).choose((), PIXELS) is None


@given(
    share=st.floats(0.001, 1),
    step=seconds,
    encode=st.floats(0, 10),
    decoders=st.dictionaries(st.sampled_from(ALL), seconds),
    methods=st.sets(st.sampled_from(ALL)),
    current=st.none() | st.sampled_from(ALL),
    costs=st.floats(0, 1).map(CoreCosts) | st.builds(DeviceCosts),
    scale=st.integers(1, 64),
)
def test_the_share_is_kept(share, step, encode, decoders, methods, current, costs, scale) -> None:
    """For any measurements on any device, the cost per step is at most the configured share."""
    decoded = {method.value: cost for method, cost in decoders.items()}
    budget = measured(share, step=step, encode=encode, costs=costs, **decoded)
    pixels = scale * PIXELS
    choice = budget.choose(methods, pixels, current)
    assert (choice is None) == (not methods)
    assume(choice is not None)
    assert choice.method in methods
    assert choice.stride >= 1
    cost = budget.cost(choice.method, pixels)
    if cost is None:
        # Never measured, so only ever the last resort.
        assert choice.method is next(method for method in ALL if method in methods)
    else:
        assert cost <= share * choice.stride * step * scale * (1 + 1e-9)
