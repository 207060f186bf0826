"""What previews may cost: the choice follows what was measured, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from calotype_server.engine.preview.budget import Choice, PreviewBudget
from calotype_server.types import PreviewMethod

HEAD, TINY, FULL = PreviewMethod.HEAD, PreviewMethod.TINY_VAE, PreviewMethod.FULL_VAE
ALL = (HEAD, TINY, FULL)
PIXELS = 64 * 64
seconds = st.floats(1e-6, 100)


def measured(share: float = 0.02, *, step: float = 1.0, encode: float = 0.0, **decoders: float) -> PreviewBudget:
    """A budget that was told seconds for a picture of `PIXELS`, by the names of the methods."""
    budget = PreviewBudget(share)
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
def test_the_best_that_is_quick_enough_is_chosen(decoders: dict, expected: Choice) -> None:
    """Two hundredths of a second are free in each step; a decoder that manages every second step is taken."""
    assert measured(**decoders).choose(ALL, PIXELS) == expected


def test_what_was_never_measured_is_not_taken_for_quick() -> None:
    """Without a figure for it, no decoder is chosen over the head, measured or not."""
    assert PreviewBudget(0.02).choose(ALL, PIXELS) == Choice(HEAD, 1)
    assert measured(head=0.001).choose(ALL, PIXELS) == Choice(HEAD, 1)
    assert measured(head=0.1).choose(ALL, PIXELS) == Choice(HEAD, 5)
    without_steps = PreviewBudget(0.02)
    without_steps.observe_decode(FULL, 1e-9, PIXELS)
    assert without_steps.choose(ALL, PIXELS) == Choice(HEAD, 1)


def test_a_choice_is_kept_a_little_longer_than_it_is_taken() -> None:
    """Between two and four steps, a generation stays with what it was drawn with; beyond, it changes."""
    budget = measured(head=0.001, full_vae=0.07)
    assert budget.choose(ALL, PIXELS) == Choice(HEAD, 1)
    assert budget.choose(ALL, PIXELS, current=HEAD) == Choice(HEAD, 1)
    assert budget.choose(ALL, PIXELS, current=FULL) == Choice(FULL, 4)
    assert measured(head=0.001, full_vae=0.09).choose(ALL, PIXELS, current=FULL) == Choice(HEAD, 1)


def test_the_encoder_counts() -> None:
    """A preview costs its JPEG too."""
    assert measured(head=0.01).stride(HEAD, PIXELS) == 1
    assert measured(head=0.01, encode=0.05).stride(HEAD, PIXELS) == 3


def test_contention_says_how_much_of_it_the_denoiser_feels() -> None:
    """Where the denoiser uses half of the cores, half of the work is in its way."""
    budget = measured(head=0.08)
    assert budget.stride(HEAD, PIXELS) == 4
    budget.set_contention(0.5)
    assert budget.stride(HEAD, PIXELS) == 2


def test_costs_follow_the_size() -> None:
    """Steps and decoders were measured on one size and are expected in proportion on another; the encoder is not."""
    budget = measured(head=0.01)
    assert budget.cost(HEAD, 4 * PIXELS) == pytest.approx(0.04)
    assert budget.stride(HEAD, 4 * PIXELS) == budget.stride(HEAD, PIXELS)


def test_the_choice_follows_what_is_measured_later() -> None:
    """When steps become quicker, as on a warm machine, the decoder that was affordable is not any more, and back."""
    budget = measured(head=0.001, full_vae=0.02)
    assert budget.choose(ALL, PIXELS).method is FULL
    for _ in range(30):
        budget.observe_step(0.1, PIXELS)
    assert budget.choose(ALL, PIXELS).method is HEAD
    for _ in range(30):
        budget.observe_decode(FULL, 0.001, PIXELS)
    assert budget.choose(ALL, PIXELS).method is FULL


def test_one_odd_measurement_changes_little() -> None:
    """A hiccup of the machine weighs a twentieth."""
    budget = measured(head=0.01)
    budget.observe_decode(HEAD, 0.06, PIXELS)
    assert budget.cost(HEAD, PIXELS) == pytest.approx(0.0125)


def test_nothing_to_draw_with_is_no_choice() -> None:
    """A server that allows no method, or a model that none can draw."""
    assert measured(head=0.01).choose((), PIXELS) is None


@given(
    share=st.floats(0.001, 1),
    step=seconds,
    encode=st.floats(0, 10),
    decoders=st.dictionaries(st.sampled_from(ALL), seconds),
    methods=st.sets(st.sampled_from(ALL)),
    current=st.none() | st.sampled_from(ALL),
    contention=st.floats(0, 1),
    scale=st.integers(1, 64),
)
def test_the_share_is_kept(share, step, encode, decoders, methods, current, contention, scale) -> None:
    """Whatever was measured, the cost spread over the steps to the next preview is at most the share."""
    budget = measured(share, step=step, encode=encode, **{method.value: cost for method, cost in decoders.items()})
    budget.set_contention(contention)
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
