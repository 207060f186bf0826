"""LoRAs are added to the rows that ask for them, and to nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calotype_server.engine.adapters.layers import AdaptedLayer, LayerDelta, RowRange, RowsMismatch, applied
from calotype_server.types import Lora

NAMES = ("a", "b", "c")


def linear():
    """Returns a linear layer."""
    return torch.nn.Linear(6, 5)


def convolution():
    """Returns a convolution that halves the size."""
    return torch.nn.Conv2d(6, 5, 3, padding=1, stride=2)


def adapted(layer):
    """Returns a layer with three LoRAs of different ranks."""
    deltas = {}
    for rank, name in enumerate(NAMES, 2):
        if isinstance(layer, torch.nn.Linear):
            down, up = torch.nn.Linear(6, rank, bias=False), torch.nn.Linear(rank, 5, bias=False)
        else:
            down = torch.nn.Conv2d(6, rank, 3, padding=1, stride=2, bias=False)
            up = torch.nn.Conv2d(rank, 5, 1, bias=False)
        deltas[name] = LayerDelta(down, up, 0.5 * rank)
    return AdaptedLayer(layer, deltas)


def expected(each, layer, x, loras):
    """Returns the output for LoRAs that are merged one after the other."""
    result = layer(x)
    for lora in (lora for lora in loras if lora.name in NAMES):
        down, up = each._deltas[lora.name]._parts
        result = result + up(down(x)) * each._deltas[lora.name].scaling * lora.scale
    return result


choices = st.lists(
    st.lists(
        st.builds(Lora, st.sampled_from((*NAMES, "elsewhere")), st.floats(-10, 10, width=32)),
        max_size=4,
        unique_by=lambda lora: lora.name,
    ).map(tuple),
    min_size=1,
    max_size=5,
)


@torch.no_grad()
@pytest.mark.parametrize(("make", "shape"), [(linear, (4, 6)), (linear, (6,)), (convolution, (6, 7, 9))])
@given(
    choices=choices,
    sizes=st.lists(st.integers(1, 3), min_size=5, max_size=5),
    padding=st.integers(0, 2),
    exact=st.booleans(),
)
def test_each_row_gets_its_own_loras(make, shape, choices, sizes, padding, exact):
    """Any LoRAs and scales of consecutive rows have the same effect as alone; other rows keep their bits."""
    layer = make()
    each = adapted(layer)
    ends = [sum(sizes[:number]) for number in range(len(choices) + 1)]
    ranges = [RowRange(ends[number], ends[number + 1], loras) for number, loras in enumerate(choices)]
    rows = ends[-1] + padding
    x = torch.randn(rows, *shape)
    plain = layer(x)
    with applied([each], ranges, rows, exact=exact):
        together = layer(x)
        assert torch.equal(layer(x), together)
    for part in ranges:
        alone = expected(each, layer, x[part.start : part.end], part.loras)
        torch.testing.assert_close(together[part.start : part.end], alone, atol=1e-5, rtol=1e-5)
        if not any(lora.name in NAMES for lora in part.loras):
            assert torch.equal(together[part.start : part.end], plain[part.start : part.end])
    assert torch.equal(together[ends[-1] :], plain[ends[-1] :])
    assert torch.equal(layer(x), plain)


@torch.no_grad()
def test_equal_loras_need_no_rows():
    """If all rows have the same LoRAs, a layer may get the tokens of all rows in one dimension."""
    layer = linear()
    each, x = adapted(layer), torch.randn(14, 6)
    loras = (Lora("a", 2.0), Lora("b"))
    with applied([each], [RowRange(0, 2, loras)], 2):
        together = layer(x)
    torch.testing.assert_close(together, expected(each, layer, x, loras))


@torch.no_grad()
def test_rows_that_cannot_be_told_apart_are_an_error():
    """With different LoRAs, an input without one entry for each row fails instead of mixing up requests."""
    layer = linear()
    ranges = [RowRange(0, 1, (Lora("a"),)), RowRange(1, 2, ())]
    with applied([adapted(layer)], ranges, 2), pytest.raises(RowsMismatch):
        layer(torch.randn(14, 6))


@torch.no_grad()
def test_a_layer_keeps_its_own_forward():
    """A `forward` that a hook has set is used, and is still there afterwards; also after an error."""
    layer = linear()
    calls = []

    def hooked(x):
        calls.append(len(x))
        return torch.nn.Linear.forward(layer, x)

    layer.forward = hooked
    with pytest.raises(ZeroDivisionError), applied([adapted(layer)], [RowRange(0, 3, (Lora("a"),))], 3):
        layer(torch.randn(3, 6))
        raise ZeroDivisionError
    assert calls == [3]
    assert layer.forward is hooked
    plain = linear()
    with applied([adapted(plain)], [RowRange(0, 3, (Lora("a"),))], 3):
        assert "forward" in vars(plain)
    assert "forward" not in vars(plain)


@torch.no_grad()
def test_the_number_format_follows_the_input():
    """Weights of a LoRA get the number format of the layer's input, also where weights are stored in another one."""
    layer = linear()
    each = adapted(layer)
    layer.to(torch.bfloat16)
    with applied([each], [RowRange(0, 2, (Lora("a"),))], 2):
        assert layer(torch.randn(2, 6, dtype=torch.bfloat16)).dtype is torch.bfloat16
