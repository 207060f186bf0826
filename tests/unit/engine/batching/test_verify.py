"""Checks at load: which models may be shared, and whose calls may be joined."""

import types

import accelerate.hooks
import diffusers
import pytest
import torch

from calotype_server.engine.batching.verify import unbatchable, verify
from calotype_server.engine.runtime.eager import EagerRuntime
from support.engine import tiny
from support.engine.batching import Denoiser, sample


def calls(*values):
    """Returns arguments for calls of the test denoiser."""
    return [((sample(value), torch.tensor(number)), {}) for number, value in enumerate(values)]


class Coupled(torch.nn.Module):
    """Subtracts the batch's mean, so that an answer depends on the other rows."""

    def forward(self, sample, timestep):
        return (sample - 0.001 * sample.mean(0, keepdim=True),)


class Imprecise(torch.nn.Module):
    """Is right to seven digits; the last bits depend on the first row of the batch."""

    def forward(self, sample, timestep):
        return (sample * (1 + 1e-7 * (sample[0, 0] > 1)),)


class SingleRow(torch.nn.Module):
    """Raises for more than one row."""

    def forward(self, sample, timestep):
        return (sample.reshape(1, 4),)


class Aggregating(torch.nn.Module):
    """Returns one answer for the whole batch."""

    def forward(self, sample, timestep):
        return (sample.sum(),)


class Invalid(torch.nn.Module):
    """Returns NaN for more than one row."""

    def forward(self, sample, timestep):
        return (sample if len(sample) == 1 else sample * float("nan"),)


class TestVerify:
    """Answers to joined calls must equal the answers to single calls."""

    def test_independent_rows_pass(self):
        """A model whose rows do not affect each other may be batched, deterministically or not."""
        assert verify(EagerRuntime(Denoiser()), calls(1, 2, 3)) is None
        assert verify(EagerRuntime(Denoiser(), exact=True), calls(1, 2, 3), deterministic_rows=8) is None

    @pytest.mark.parametrize(
        ("module", "reason"),
        [(Coupled(), "differ by"), (Aggregating(), "differ by"), (Invalid(), "differ by nan")],
    )
    def test_dependent_rows_are_rejected(self, module, reason):
        """A model whose answers depend on other rows is not batched, and the operator learns why."""
        assert reason in verify(EagerRuntime(module), calls(1, 2, 3))

    def test_a_failing_joined_call_raises(self):
        """An exception of the model is raised: the caller decides whether to try again at the next start."""
        with pytest.raises(RuntimeError):
            verify(EagerRuntime(SingleRow()), calls(1, 2, 3))

    def test_a_deterministic_server_needs_equal_bits(self):
        """A difference within the tolerance is allowed, but not for a deterministic server."""
        assert verify(EagerRuntime(Imprecise()), calls(1, 2)) is None
        assert "last bits" in verify(EagerRuntime(Imprecise(), exact=True), calls(1, 2), deterministic_rows=4)

    def test_calls_with_different_signatures_are_not_enough(self):
        """Without two calls that can be joined nothing is verified, so the model is not batched."""
        different = [((sample(1, 1, 4), torch.tensor(0)), {}), ((sample(1, 1, 6), torch.tensor(0)), {})]
        assert "different signatures" in verify(EagerRuntime(Denoiser()), different)

    def test_the_tolerance_depends_on_the_dtype(self):
        """Half precision allows larger differences than single precision."""

        class Rounding(torch.nn.Module):
            def forward(self, sample, timestep):
                return (sample * (1.01 if len(sample) > 1 else 1.0),)

        half = [((sample(value).bfloat16(), torch.tensor(0)), {}) for value in (1, 2)]
        assert verify(EagerRuntime(Rounding()), half) is None
        assert "differ" in verify(EagerRuntime(Rounding()), calls(1, 2))


class TestUnbatchable:
    """Models that keep state between steps cannot be shared, and the reason is reported."""

    def test_plain_modules_can_be_shared(self):
        """An ordinary module has no reason against it."""
        assert unbatchable(tiny.shared("flux").transformer) is None

    def test_caches_cannot_be_shared(self):
        """The caches of diffusers keep residuals in the module."""
        module = tiny.build("flux").transformer
        module.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        assert "cache" in unbatchable(module)
        module.disable_cache()
        assert unbatchable(module) is None

    def test_stateful_hooks_cannot_be_shared(self):
        """A cache that was added as a hook is found too."""
        module = tiny.build("flux").transformer
        diffusers.hooks.apply_first_block_cache(module, diffusers.FirstBlockCacheConfig(threshold=0.1))
        assert "hook" in unbatchable(module)

    def test_offloading_cannot_be_shared(self):
        """Accelerate's hooks on any part of the model move weights while other requests use them."""
        module = tiny.build("sd15").unet
        accelerate.hooks.add_hook_to_module(module.mid_block, accelerate.hooks.ModelHook())
        assert "Accelerate" in unbatchable(module)

    def test_several_processes_cannot_be_shared(self):
        """Context parallelism would need all processes to agree on every batch."""
        module = Denoiser()
        module._parallel_config = types.SimpleNamespace()  # type: ignore[assignment]
        assert "processes" in unbatchable(module)
