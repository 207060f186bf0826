"""A graph's key is equal for calls that the same kernels compute, and for no others."""

import itertools
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calotype_server.engine.runtime.collate import Collator, Rows
from calotype_server.engine.runtime.signature import Refused, sign, why_not_module
from support.engine import tiny

CPU = torch.device("cpu")


class Module(torch.nn.Module):
    """A module with the arguments of a transformer."""

    def forward(self, hidden_states, timestep=None, guidance=None, img_ids=None, **others):
        """Never called; only the signature matters."""


def key(padded_rows=None, calls=1, **arguments):
    """Returns the key of equal calls together."""
    collator = Collator(Module())
    bound = [collator.bind((), {"hidden_states": torch.ones(2, 3), **arguments}, {}) for _ in range(calls)]
    return sign(collator, collator.gather(bound, padded_rows or sum(call.rows for call in bound))).key


shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])
descriptions = st.recursive(
    st.one_of(
        st.tuples(st.just("tensor"), shapes, dtypes),
        st.tuples(st.just("rows"), st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), shapes, dtypes),
        st.tuples(st.just("plain"), st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from("ab"))),
    ),
    lambda inner: st.one_of(
        st.tuples(st.just("list"), st.lists(inner, max_size=2).map(tuple)),
        st.tuples(st.just("tuple"), st.lists(inner, max_size=2).map(tuple)),
        st.tuples(
            st.just("dict"), st.dictionaries(st.sampled_from("xyz"), inner, max_size=2).map(lambda d: (*d.items(),))
        ),
    ),
    max_leaves=4,
)


def made(description):
    """Returns an argument of this description."""
    kind, *details = description
    if kind == "tensor":
        return torch.zeros(details[0], dtype=details[1])
    if kind == "rows":
        return Rows([torch.zeros(count, *details[1], dtype=details[2]) for count in details[0]])
    if kind == "plain":
        return details[0]
    if kind == "dict":
        return {name: made(each) for name, each in details[0]}
    return {"list": list, "tuple": tuple}[kind](made(each) for each in details[0])


def canonical(description):
    """Returns what decides about the kernels: types of plain values, and only the sum of joined rows."""
    kind, *details = description
    if kind == "rows":
        return (kind, sum(details[0]), *details[1:])
    if kind == "plain":
        return (kind, type(details[0]), details[0])
    if kind == "dict":
        return (kind, tuple((name, canonical(each)) for name, each in details[0]))
    if kind in ("list", "tuple"):
        return (kind, tuple(map(canonical, details[0])))
    return description


calls = st.dictionaries(st.sampled_from(["a", "b"]), descriptions, min_size=1, max_size=2)


@given(calls, calls)
def test_keys_are_equal_exactly_for_equal_descriptions(one, other):
    """Keys are equal exactly if names, structure, shapes, number formats and plain values are equal."""
    keys = [sign(None, {name: made(each) for name, each in call.items()}).key for call in (one, other)]
    same = [[(name, canonical(each)) for name, each in call.items()] for call in (one, other)]
    assert (keys[0] == keys[1]) == (same[0] == same[1])
    assert keys[0] == sign(None, {name: made(each) for name, each in one.items()}).key


def test_the_split_among_requests_does_not_matter():
    """Only the number of rows counts: two requests and one request with padding have the same key."""
    timestep = torch.tensor(5.0)
    assert key(calls=2, timestep=timestep) == key(4, timestep=timestep)
    assert key(4, timestep=timestep) != key(6, timestep=timestep)


@pytest.mark.parametrize("other", [5.0, torch.tensor([5.0]), torch.tensor([5.0, 5.0])])
def test_every_form_of_a_timestep_has_one_key(other):
    """A number, one value and a value per row are the same argument; another number format is not."""
    assert key(timestep=torch.tensor(5.0)) == key(timestep=other)
    assert key(timestep=torch.tensor(5)) != key(timestep=other)


def test_the_layout_counts():
    """Channels in the innermost dimension choose other kernels, and so do the strides of a shared tensor."""
    image = torch.ones(2, 3, 4, 4)
    assert key(hidden_states=image) != key(hidden_states=image.to(memory_format=torch.channels_last))
    positions = torch.zeros(4, 3)
    assert key(img_ids=positions) != key(img_ids=positions.T.contiguous().T)


@pytest.mark.parametrize("value", [1.5, {"scale": 0.5}, types.SimpleNamespace(), [object()], 1j])
def test_values_that_may_differ_at_every_step_are_refused(value):
    """A float or an unknown object has no key; the reason names the argument."""
    with pytest.raises(Refused, match="'guidance' contains a"):
        key(guidance=value)


@pytest.mark.parametrize(
    ("family", "argument"), [("qwen_image", "encoder_hidden_states_mask"), ("cogview4", "attention_kwargs")]
)
def test_arguments_that_make_a_model_wait_are_refused(family, argument):
    """The mask of Qwen-Image and the packing of CogView4 are refused, but not if they are None."""
    module = tiny.shared(family).transformer
    assert sign(module, {argument: None}).key
    with pytest.raises(Refused, match=argument):
        sign(module, {argument: {}})


class TestModule:
    """Modules of which no call can be computed by a graph are known before a capture."""

    @pytest.mark.parametrize(
        ("family", "reason"),
        [("chroma", "copies a constant"), ("lumina2", "lengths of the prompts"), ("flux", None), ("z_image", None)],
    )
    def test_classes_that_wait_for_the_gpu(self, family, reason):
        """A class that waits for the GPU in every call is refused with the reason; others are not."""
        found = why_not_module(tiny.shared(family).transformer, CPU)
        assert found is None if reason is None else reason in found

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda module: module.train(), "training mode"),
            (lambda module: module.inner.register_forward_hook(print), "A hook of its Linear"),
            (lambda module: module.inner.register_forward_pre_hook(print), "A hook of its Linear"),
            (lambda module: setattr(module.inner, "_hf_hook", object()), "A hook of its Linear"),
            (lambda module: setattr(module, "is_cache_enabled", True), "Its cache decides"),
            (lambda module: module.inner.to("meta"), "Not all of its weights are on cpu"),
            (
                lambda module: setattr(
                    module.inner, "processor", types.SimpleNamespace(_attention_backend="flash_varlen")
                ),
                "Its attention backend flash_varlen",
            ),
            (
                lambda module: setattr(
                    module.inner, "_diffusers_hook", types.SimpleNamespace(hooks={"group_offloading": object()})
                ),
                "A hook of its Linear",
            ),
            (
                lambda module: setattr(
                    module.inner, "_diffusers_hook", types.SimpleNamespace(hooks={"layerwise_casting": object()})
                ),
                None,
            ),
            (lambda _: None, None),
        ],
    )
    def test_states_that_need_python(self, change, reason):
        """Hooks, caches, offloaded weights, training and attention that reads lengths are refused."""
        module = torch.nn.Module()
        module.inner = torch.nn.Linear(2, 2)
        module.eval()
        change(module)
        found = why_not_module(module, CPU)
        assert found is None if reason is None else found.startswith(reason) or reason in found


def test_tensors_come_in_the_order_of_the_arguments():
    """The tensors of a call are listed with the names of their arguments."""
    tensors = [torch.zeros(1), torch.zeros(2)]
    signature = sign(None, {"a": {"x": tensors[0]}, "b": [None, tensors[1]]})
    assert [name for name, _ in signature.tensors()] == ["a", "b"]
    assert all(a is b for (_, a), b in itertools.zip_longest(signature.tensors(), tensors))
