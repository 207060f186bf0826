"""A graph's arguments are written into memory that stays in place, as the plain call would get them."""

import pytest
import torch

from calotype_server.engine.runtime.buffers import StaticInputs, copied, only_tensors
from calotype_server.engine.runtime.collate import Collator, Rows
from calotype_server.engine.runtime.outside import OutsideTensors
from calotype_server.engine.runtime.signature import sign
from support.engine import tiny

CPU = torch.device("cpu")


def signed(**named):
    """Returns a call with these arguments."""
    return sign(None, named)


def inputs(signature, device=CPU, stage=torch.clone):
    """Returns the static memory for a call."""
    return StaticInputs(signature, device, stage)


def test_rows_are_joined_in_place():
    """Parts are concatenated into the same memory each time; plain values and the structure stay."""
    parts = [torch.ones(1, 2), torch.full((2, 2), 2.0)]
    static = inputs(signed(latents=Rows(parts), others={"ids": (torch.arange(3), None)}, flag=True))
    latents, ids = static.named["latents"], static.named["others"]["ids"][0]
    assert torch.equal(latents, torch.cat(parts))
    assert static.named["others"]["ids"][1] is None
    assert static.named["flag"] is True
    static.write(signed(latents=Rows([torch.full((3, 2), 5.0)]), others={"ids": (torch.ones(3), None)}, flag=True))
    assert static.named["latents"] is latents
    assert latents.tolist() == [[5, 5]] * 3
    assert ids.tolist() == [1, 1, 1]


def test_given_tensors_are_not_kept():
    """The memory is the graph's own: a request that changes its tensor later does not change the arguments."""
    given, shared = torch.ones(2, 2), torch.ones(3)
    static = inputs(signed(latents=Rows([given]), ids=shared))
    given.zero_()
    shared.zero_()
    assert static.named["latents"].sum() == 4
    assert static.named["ids"].sum() == 3


def test_mixed_formats_become_the_common_one():
    """Timesteps in different number formats get the one that `torch.cat` would choose."""
    static = inputs(signed(timestep=Rows([torch.tensor([5]), torch.tensor([7.5])])))
    assert static.named["timestep"].dtype is torch.float32
    assert static.named["timestep"].tolist() == [5, 7.5]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_is_that_of_a_joined_call(layout):
    """Joined images keep their layout, also when they are written again."""
    parts = [torch.randn(1, 3, 4, 4).to(memory_format=layout) for _ in range(2)]
    static = inputs(signed(latents=Rows(parts)))
    static.write(signed(latents=Rows(parts[::-1])))
    expected = torch.cat(parts[::-1])
    assert torch.equal(static.named["latents"], expected)
    assert static.named["latents"].stride() == expected.stride()


def test_numbers_are_staged_in_their_final_format():
    """A tensor on the CPU goes to the device through staging memory, converted before, so that nothing waits."""
    staged = []
    rows = Rows([torch.tensor([5]), torch.tensor([7.5]), torch.tensor([1.0]).expand(2)])
    static = inputs(signed(timestep=rows), torch.device("meta"), lambda tensor: staged.append(tensor) or tensor)
    assert static.named["timestep"].device.type == "meta"
    assert [each.dtype for each in staged] == [torch.float32] * 3
    assert all(each.is_contiguous() for each in staged)


@pytest.mark.parametrize("family", ["flux", "sd15", "z_image"])
def test_a_gathered_call_equals_a_joined_one(family):
    """A module gets the same arguments from static memory as from `Collator.join`, with padding."""
    module = next(part for name, part in tiny.shared(family).components.items() if name in ("unet", "transformer"))
    collator = Collator(module)
    first = torch.randn(2, 4, 8, 8)
    if family == "z_image":
        args = ([*first[:, :, None]], torch.tensor([0.5, 0.5]), [torch.randn(3, 16)] * 2)
        named = {}
    else:
        args, named = (first,), {"timestep": torch.tensor(5), "encoder_hidden_states": torch.randn(2, 3, 32)}
    calls = [collator.bind(args, named, {}) for _ in range(2)]
    _, joined = collator.join(calls, 6)
    static = inputs(sign(module, collator.gather(calls, 6))).named
    assert list(static) == list(joined)
    assert all(
        torch.equal(a, b)
        for name in joined
        for a, b in zip(
            *(each if isinstance(each, list) else [each] for each in (static[name], joined[name])), strict=True
        )
    )


def test_disturbed_values_are_different_and_finite():
    """Disturbing changes every number that may change and removes NaN; token ids and masks stay."""
    static = inputs(
        signed(
            latents=torch.tensor([2.0, float("nan"), float("inf")]),
            timestep=torch.tensor([981, 5]),
            ids=torch.tensor([4, 6]),
            mask=torch.tensor([True, False]),
        )
    )
    static.disturb()
    assert static.named["latents"][:2].tolist() == [1, 0]
    assert static.named["latents"].isfinite().all()
    assert static.named["timestep"].tolist() == [490, 2]
    assert static.named["ids"].tolist() == [4, 6]
    assert static.named["mask"].tolist() == [True, False]


def test_copies_share_no_memory():
    """Tensors in any structure are copied; an answer with unknown objects is recognised."""
    answer = {"sample": (torch.ones(2), [torch.ones(1)], None)}
    copy = copied(answer)
    answer["sample"][0].zero_()
    answer["sample"][1][0].zero_()
    assert copy["sample"][0].tolist() == [1, 1]
    assert copy["sample"][1][0].tolist() == [1]
    assert only_tensors(answer)
    assert not only_tensors((torch.ones(1), object()))


def test_outside_tensors_are_those_that_existed_before():
    """Weights, views and cached tensors that a call reads are found; its arguments' results are not."""
    weight, cached = torch.ones(2, 2), torch.ones(2)
    with OutsideTensors(torch.device("cpu")) as outside:
        result = (weight[0] @ weight + cached).mul_(2)
        result + result.view(1, 2)
    memory = {each.untyped_storage().data_ptr() for each in outside.tensors}
    assert memory == {weight.untyped_storage().data_ptr(), cached.untyped_storage().data_ptr()}


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda given: given.max().item(), "_local_scalar_dense"),
        (lambda given: given[given > 0], "index"),
        (lambda given: given * torch.tensor([1.0, 2.0]), "lift_fresh"),
        (lambda given: (given > 0)[given.long()], None),
        (lambda given: given.masked_fill(given > 0, 2).to(torch.float16), None),
        (lambda given: given.clone().copy_(given), None),
    ],
)
def test_operations_that_wait_are_noticed(call, waits):
    """Values and constants for which the CPU waits are named; work that stays on the device is not."""
    with OutsideTensors(torch.device("cpu")) as outside:
        call(torch.ones(2))
    assert (outside.waits is None) == (waits is None)
    assert waits is None or waits in outside.waits
    with OutsideTensors(torch.device("meta")) as outside:
        call(torch.ones(2))
    assert outside.waits is None
