"""A request's view has its own copy of everything that keeps state, and shares everything that is large."""

from __future__ import annotations

import functools
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch

from calotype_server.engine.requests.own_state import uncopyable
from calotype_server.engine.requests.shared_components import shared_components
from calotype_server.engine.requests.view import request_view
from support.engine import tiny

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def pipeline() -> Any:
    """A pipeline with a guider and a second scheduler, which refer to parts of it."""
    pipeline = tiny.build("sd15")
    guider = diffusers.AdaptiveProjectedMixGuidance()
    guider.denoiser, guider.pipeline = pipeline.unet, pipeline
    pipeline.guider = guider
    pipeline.prior_scheduler = diffusers.DDIMScheduler()
    pipeline.history = {"steps": [1, 2]}
    return pipeline


def test_small_components_are_copied(pipeline: Any) -> None:
    """Guiders, further schedulers, processors of images and plain containers belong to the request."""
    view = request_view(pipeline, pipeline.scheduler)
    for name in ("guider", "prior_scheduler", "image_processor", "history"):
        assert getattr(view, name) is not getattr(pipeline, name)
    view.guider.set_state(step=3, num_inference_steps=4, timestep=torch.tensor(1))
    view.history["steps"].append(3)
    assert pipeline.guider._step is None
    assert pipeline.history == {"steps": [1, 2]}
    assert view.guider.config == pipeline.guider.config
    assert view.image_processor.config == pipeline.image_processor.config


def test_copies_refer_to_the_shared_modules_and_to_the_view(pipeline: Any) -> None:
    """A copy that refers to the denoiser still refers to the shared one, and its pipeline is the view."""
    view = request_view(pipeline, pipeline.scheduler)
    assert view.guider.denoiser is pipeline.unet
    assert view.guider.pipeline is view


@pytest.mark.parametrize("share", [lambda _: {}, shared_components], ids=["plain", "locked"])
def test_large_components_are_shared(pipeline: Any, share: Callable[[Any], dict[str, Any]]) -> None:
    """Modules and tokenizers are the same objects in every view, also behind their locks."""
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.vae.to(torch.float16)
    shared = request_view(pipeline, pipeline.scheduler, **share(pipeline))
    view = request_view(shared, pipeline.scheduler)
    for name in ("unet", "vae", "text_encoder", "tokenizer"):
        assert getattr(view, name) is getattr(shared, name)


def test_code_is_not_copied(pipeline: Any) -> None:
    """Functions and methods that were set on a pipeline stay as they are."""
    pipeline.function, pipeline.method = (lambda: None), pipeline.unet.forward
    pipeline.partial = functools.partial(pipeline.function)
    view = request_view(pipeline, pipeline.scheduler)
    assert (view.function, view.method) == (pipeline.function, pipeline.method)
    assert view.partial.func is pipeline.function


def test_a_component_that_cannot_be_copied_is_named(pipeline: Any) -> None:
    """The view shares it, and `uncopyable` names it."""
    assert uncopyable(pipeline) is None
    pipeline.meter = SimpleNamespace(lock=threading.Lock())
    reason = "Its meter, a SimpleNamespace, cannot be copied for each request, and may keep state."
    assert uncopyable(pipeline) == reason
    assert request_view(pipeline, pipeline.scheduler).meter is pipeline.meter
