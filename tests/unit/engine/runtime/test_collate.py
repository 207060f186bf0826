"""Arguments are joined by type and shape, and calls that cannot be joined get different signatures."""

import types

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from calotype_server.engine.runtime.collate import Collator
from support.engine import tiny
from support.engine.stand_in_device import OnDevice, StandInDevice


class Module(torch.nn.Module):
    """A module with the arguments of a transformer."""

    def forward(self, hidden_states, timestep=None, encoder_hidden_states=None, guidance=None, img_ids=None, **others):
        """Never called; only the signature matters."""


@pytest.fixture
def collator():
    """A collator for a module without special rules."""
    return Collator(Module())


def bind(collator, rows=1, **arguments):
    """Returns a call with this many rows of latents."""
    return collator.bind((torch.ones(rows, 3),), arguments, {})


def bind_call(collator, call):
    """Binds a call, which is a pair of args and kwargs."""
    args, kwargs = call
    return collator.bind(args, kwargs, {})


def joined(collator, *calls, padded_rows=None):
    """Returns the arguments that the module gets."""
    return collator.join(calls, padded_rows or sum(call.rows for call in calls))[1]


def test_position_and_keyword_are_the_same(collator):
    """Positional and keyword arguments give the same signature."""
    latents, timestep = torch.ones(1, 3), torch.tensor(1.0)
    by_position = collator.bind((latents, timestep), {}, {})
    by_keyword = collator.bind((), {"timestep": timestep, "hidden_states": latents}, {})
    assert by_position.signature == by_keyword.signature


def test_joining_on_a_device_reads_shared_values_once(collator):
    """Joined calls wait for a device only to compare values that rows share, and once for each tensor."""
    with StandInDevice() as device:
        requests = [({"img_ids": OnDevice(torch.zeros(4, 3)), "guidance": OnDevice(torch.ones(1))}, {}) for _ in "ab"]
        timesteps = OnDevice(torch.arange(6, 0, -1))
        for step, timestep in enumerate(timesteps):
            device.reset()
            calls = [
                collator.bind((OnDevice(torch.ones(1, 3)),), {**shared, "timestep": timestep}, digests)
                for shared, digests in requests
            ]
            assert joined(collator, *calls, padded_rows=3)["timestep"].on_cpu.tolist() == [6 - step] * 3
            assert device.copies.total() == 0
            assert device.reads.total() == (len(requests) if step == 0 else 0)


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        ((torch.tensor(5), torch.tensor(7)), [5, 5, 7]),
        ((torch.tensor(5), torch.tensor(7.5)), [5, 5, 7.5]),
        ((torch.tensor([5]), 7), [5, 5, 7]),
        ((torch.tensor([5, 6]), 7.5), [5, 6, 7.5]),
    ],
)
def test_timesteps_get_one_entry_per_row(collator, timesteps, expected):
    """Timesteps in any form are joined to one entry per row."""
    calls = [bind(collator, rows, timestep=timestep) for rows, timestep in zip((2, 1), timesteps, strict=True)]
    assert calls[0].signature == calls[1].signature
    assert joined(collator, *calls)["timestep"].tolist() == expected


def test_padding_repeats_the_last_row(collator):
    """Latents, timesteps and lists are padded to a fixed number of rows."""
    call = bind(collator, 1, timestep=torch.tensor(5), guidance=torch.tensor([3.0]))
    filled = joined(collator, call, padded_rows=3)
    assert filled["hidden_states"].shape == (3, 3)
    assert filled["timestep"].tolist() == [5, 5, 5]
    assert filled["guidance"].tolist() == [3, 3, 3]


def test_tensors_without_rows_are_compared(collator):
    """Equal positions are passed once; different ones prevent joining. A change in place is noticed."""
    positions, digests = torch.arange(6).reshape(3, 2), {}
    first = collator.bind((torch.ones(1, 3),), {"img_ids": positions}, digests)
    same = bind(collator, img_ids=positions.clone())
    assert first.signature == same.signature
    assert joined(collator, first, same)["img_ids"] is positions
    assert bind(collator, img_ids=positions + 1).signature != first.signature
    positions[0, 0] = 9
    assert collator.bind((torch.ones(1, 3),), {"img_ids": positions}, digests).signature != first.signature


def test_positions_are_never_taken_for_rows(collator):
    """FLUX's ids have one entry per token, even if there are as many tokens as rows."""
    call = bind(collator, 3, img_ids=torch.zeros(3, 2))
    assert joined(collator, call, call)["img_ids"].shape == (3, 2)


def test_other_numbers_must_be_equal(collator):
    """A number that is not a timestep must be equal, because its meaning per row is unknown."""
    assert bind(collator, guidance=torch.tensor(3.0)).signature == bind(collator, guidance=torch.tensor(3.0)).signature
    assert bind(collator, guidance=torch.tensor(3.0)).signature != bind(collator, guidance=torch.tensor(4.0)).signature


@pytest.mark.parametrize(
    ("one", "other"),
    [(None, 1), (True, 1), (1, 1.0), ("a", "b"), ([1], (1,)), ({"a": 1}, {"a": 2}), (Module(), Module())],
)
def test_different_values_prevent_joining(collator, one, other):
    """Flags, LoRA scales and all other values must have the same type and value."""
    assert bind(collator, value=one).signature == bind(collator, value=one).signature
    assert bind(collator, value=one).signature != bind(collator, value=other).signature


def test_different_shapes_and_dtypes_prevent_joining(collator):
    """Tensors that cannot be concatenated prevent joining."""
    signatures = {
        collator.bind((latents,), {}, {}).signature
        for latents in (torch.ones(1, 3), torch.ones(1, 4), torch.ones(1, 3, 1), torch.ones(1, 3).half())
    }
    assert len(signatures) == 4


def test_dicts_and_tuples_are_joined_by_entry(collator):
    """Dicts and tuples, such as SDXL's conditions and ControlNet's residuals, are joined entry by entry."""
    calls = [
        bind(
            collator,
            number,
            conditions={"ids": torch.full((number, 2), number), "none": None},
            residuals=(torch.full((number, 1), number),),
        )
        for number in (1, 2)
    ]
    assert calls[0].signature == calls[1].signature
    both = joined(collator, *calls)
    assert both["conditions"]["ids"].tolist() == [[1, 1], [2, 2], [2, 2]]
    assert both["conditions"]["none"] is None
    assert both["residuals"][0].tolist() == [[1], [2], [2]]


def test_a_call_without_a_batch_runs_alone(collator):
    """A call whose first argument is not a batch is never joined, not even with an equal call."""
    calls = [collator.bind((types.SimpleNamespace(),), {}, {}) for _ in range(2)]
    assert calls[0].signature != calls[1].signature
    assert collator.join(calls[:1], 1)[0] is calls[0].args


def test_answers_keep_their_structure(collator):
    """Tuples, lists of rows and diffusers' output classes are split by row; the parts are views."""
    calls = [bind(collator, 1), bind(collator, 2)]
    rows = torch.arange(3.0).reshape(3, 1)
    for output, value in [
        ((rows,), lambda part: part[0]),
        (([*rows],), lambda part: torch.stack(part[0])),
        (Transformer2DModelOutput(sample=rows), lambda part: part.sample),
    ]:
        first, second = collator.split(output, calls, 3)
        assert type(first) is type(output)
        assert (value(first).tolist(), value(second).tolist()) == ([[0]], [[1], [2]])
    assert collator.split((rows,), calls, 3)[1][0].data_ptr() == rows[1:].data_ptr()


class TestLengths:
    """Prompts of different lengths share a batch if a mask can hide the padding, and the answers stay the same."""

    def run(self, family, *prompts, exact=False):
        """Returns the answers to single and to joined calls, and whether they could be joined."""
        module = getattr(tiny.shared(family), "transformer")  # noqa: B009
        collator = Collator(module, exact=exact)
        calls = [
            bind_call(collator, self.ARGUMENTS[family](self, number, *prompt)) for number, prompt in enumerate(prompts)
        ]
        if len({call.signature for call in calls}) > 1:
            return None
        rows = sum(call.rows for call in calls)
        with torch.no_grad():
            single = [module(*call.args, **call.kwargs)[0] for call in calls]
            args, kwargs = collator.join(calls, rows)
            parts = [part[0] for part in collator.split(module(*args, **kwargs), calls, rows)]
        return single, parts

    def noise(self, number, *shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(number))

    def qwen_image(self, number, length, mask):
        return (), {
            "hidden_states": self.noise(number, 1, 16, 16),
            "timestep": torch.tensor([0.5 + number / 10]),
            "encoder_hidden_states": self.noise(10 + number, 1, length, 16),
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, 4, 4)]],
            "return_dict": False,
        }

    def pixart_sigma(self, number, length, mask):
        return (self.noise(number, 1, 4, 8, 8),), {
            "encoder_hidden_states": self.noise(10 + number, 1, length, 32),
            "encoder_attention_mask": mask,
            "timestep": torch.tensor([100 * number]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }

    def z_image(self, number, length, size):
        latents, prompt = self.noise(number, 16, 1, *size), self.noise(10 + number, length, 16)
        return ([latents], torch.tensor([0.5]), [prompt]), {"return_dict": False}

    ARGUMENTS = {"qwen_image": qwen_image, "pixart_sigma": pixart_sigma, "z_image": z_image}  # noqa: RUF012

    @pytest.mark.parametrize("family", ["qwen_image", "pixart_sigma"])
    @pytest.mark.parametrize("masked", [False, True])
    def test_masks_hide_the_padding(self, family, masked):
        """A missing mask is added if another call is longer or has a mask."""
        mask = (torch.arange(9) < 6).long()[None] if masked else None
        single, parts = self.run(family, (12, None), (9, mask), (7, None))
        for a, b in zip(single, parts, strict=True):
            assert (a - b).abs().max() <= 2e-6 * a.abs().max()

    def test_unneeded_masks_stay_missing(self):
        """If no call needs a mask, none is added, because models are faster without."""
        collator = Collator(tiny.shared("qwen_image").transformer)
        calls = [bind_call(collator, self.qwen_image(number, 12, None)) for number in range(2)]
        assert joined(collator, *calls)["encoder_hidden_states_mask"] is None

    def test_z_image_takes_rows_of_any_size(self):
        """Prompts and images of different sizes share one forward pass."""
        single, parts = self.run("z_image", (11, (8, 8)), (5, (8, 12)))
        for a, b in zip(single, parts, strict=True):
            assert a[0].shape == b[0].shape
            assert (a[0] - b[0]).abs().max() <= 2e-6 * a[0].abs().max()

    @pytest.mark.parametrize(
        ("family", "one", "other"),
        [
            ("qwen_image", (12, None), (9, None)),
            ("qwen_image", (12, None), (12, torch.ones(1, 12))),
            ("z_image", (11, (8, 8)), (5, (8, 8))),
        ],
    )
    def test_exact_means_no_padding(self, family, one, other):
        """An exact collator does not pad one call to the length of another."""
        assert self.run(family, one, other, exact=True) is None
        assert self.run(family, one, one, exact=True) is not None
