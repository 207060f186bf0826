"""Pipelines cannot change a module that requests share."""

from __future__ import annotations

import inspect
import re
from typing import Any

import diffusers
import pytest
import torch

from calotype_server.engine.requests.denoiser_proxy import DenoiserProxy
from calotype_server.engine.requests.read_only import ChangeRejected, is_change
from support.engine import tiny


@pytest.fixture
def unet() -> Any:
    """A module that a test may change."""
    return tiny.build("sd15").unet


CHANGES = {
    "attention processors": lambda unet: unet.set_attn_processor(unet.attn_processors),
    "the processor of a part": lambda unet: setattr(unet.mid_block.attentions[0], "processor", None),
    "the processor of a part in a list": lambda unet: setattr(list(unet.modules())[5], "processor", None),
    "the processor of a named part": lambda unet: setattr(dict(unet.named_modules())["mid_block"], "processor", None),
    "a hook": lambda unet: unet.mid_block.register_forward_hook(print),
    "fusion": lambda unet: unet.fuse_qkv_projections(),
    "FreeU": lambda unet: unet.enable_freeu(1.0, 1.0, 1.0, 1.0),
    "adapters": lambda unet: unet.set_adapters("a"),
    "a device": lambda unet: unet.to("meta"),
    "a number format": lambda unet: unet.to(torch.float16),
    "half": lambda unet: unet.half(),
    "training": lambda unet: unet.train(),
    "gradients": lambda unet: unet.requires_grad_(True),
    "weights": lambda unet: unet.load_state_dict({}),
    "an attribute": lambda unet: setattr(unet, "anything", 1),
    "a deleted attribute": lambda unet: delattr(unet, "mid_block"),
    "a hook of diffusers": lambda unet: diffusers.hooks.HookRegistry.check_if_exists_or_initialize(unet),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_rejected(unet: Any, change: str) -> None:
    """Everything that would change the module, or a part of it, raises, and leaves the module as it was."""
    before = {name: dict(vars(part)) for name, part in unet.named_modules()}
    with pytest.raises(ChangeRejected, match="shared by all requests"):
        CHANGES[change](DenoiserProxy(unet, unet))
    assert {name: dict(vars(part)) for name, part in unet.named_modules()} == before


def test_reading_is_allowed(unet: Any) -> None:
    """Attributes, parts and calls are those of the module; a conversion to its own format does nothing."""
    proxy = DenoiserProxy(unet, lambda *_, **__: "answer")
    assert (proxy.config, proxy.dtype, proxy(1)) == (unet.config, unet.dtype, "answer")
    assert isinstance(proxy, torch.nn.Module)
    assert isinstance(proxy.mid_block, type(unet.mid_block))
    assert len(proxy.down_blocks) == len(unet.down_blocks)
    assert [name for name, _ in proxy.named_modules()] == [name for name, _ in unet.named_modules()]
    assert proxy.to("cpu", torch.float32).eval() is proxy
    embedded = torch.ones(1, 32)
    assert torch.equal(proxy.time_embedding(embedded), unet.time_embedding(embedded))


def test_changes_can_be_ignored(unet: Any) -> None:
    """A proxy whose answers do not matter accepts changes, but they have no effect."""
    proxy = DenoiserProxy(unet, unet, ignore_changes=True)
    before = unet.attn_processors
    for part in proxy.modules():
        part.processor = None
    proxy.set_attn_processor(None)
    assert unet.attn_processors == before


READERS = re.compile(
    "(build|create|encoder_decoder|from|get|named|patchify|process|post_process|save|to_json|unpatchify)_?.*"
    "|active_adapters|buffers|cache_context|children|extra_repr|forward|modules|num_parameters|parameters|state_dict"
)
"""Methods of denoisers that change nothing."""


def test_every_method_of_a_denoiser_is_known() -> None:
    """Each public method of diffusers' denoisers is known to change its module, or not to."""
    kinds = {
        kind
        for name in dir(diffusers)
        if re.search("Transformer|UNet", name) and inspect.isclass(kind := getattr(diffusers, name))
        if issubclass(kind, diffusers.ModelMixin)
    }
    assert len(kinds) > 20
    methods = {
        name
        for kind in kinds
        for name, value in inspect.getmembers(kind)
        if not name.startswith("_") and callable(value) and not inspect.isclass(value)
    }
    assert {"set_attn_processor", "fuse_qkv_projections", "parameters"} <= methods
    unknown = {name for name in methods if is_change(name) == bool(READERS.fullmatch(name))}
    assert not unknown
