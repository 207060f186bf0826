"""Loads the configured model and returns its engine. Importing this module does not import torch yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from calotype_server import errors
from calotype_server.engine.libraries import prepare_libraries
from calotype_server.engine.preview.budget import PreviewBudget
from calotype_server.types import PreviewMethod

if TYPE_CHECKING:
    from calotype_server.engine.protocol import Engine
    from calotype_server.observability.events import Observe
    from calotype_server.settings import Settings
    from calotype_server.types import ModelInfo

__all__ = ["engine_around", "load_engine"]

_log = structlog.get_logger(__name__)


def load_engine(settings: Settings, observe: Observe) -> Engine:
    """Loads the model that the settings name, and starts its engine. It blocks for seconds to minutes.

    Args:
        settings: The operator's settings.
        observe: Receives the engine's observations.

    Raises:
        StartupError: The device, the accelerator, the model or the preview method cannot be used.
    """
    prepare_libraries()
    # Not at the top: importing torch takes seconds, and a wrong address or flag should be reported before that.
    from calotype_server.engine import loading, memory
    from calotype_server.engine.loading.explain import first_line
    from calotype_server.engine.prompts import embeddings
    from calotype_server.engine.requests import trial
    from calotype_server.engine.runtime import select

    memory.return_large_blocks()
    device = loading.pick_device(settings.device)
    select.check_available(settings.accelerate, device)
    pipeline = loading.load_pipeline(loading.LoadOptions.of(settings, device))
    try:
        embeddings.load_embeddings(pipeline, settings.embedding_sources)
        trial.check_draws(settings.model, pipeline)
        return engine_around(settings, pipeline, observe)
    except errors.StartupError:
        raise
    except Exception as error:
        if memory.is_device_failure(error):
            _log.exception("the device failed")
            raise errors.ModelUnavailable(f"The device {device} failed while {settings.model!r} was loaded.") from error
        if memory.is_out_of_memory(error):
            raise errors.ModelUnavailable(f"The memory of {device} does not suffice for {settings.model!r}.") from error
        _log.exception("the pipeline is not supported")
        kind = type(pipeline).__name__
        raise errors.ModelUnavailable(
            f"{settings.model!r} is a {kind}, which Calotype does not support: {first_line(error)}."
        ) from error


def engine_around(settings: Settings, pipeline: Any, observe: Observe) -> Engine:
    """Starts an engine around a loaded pipeline.

    Args:
        settings: The operator's settings.
        pipeline: A text-to-image pipeline. Its text encoders get hooks if the settings name LoRAs.
        observe: Receives the engine's observations.

    Raises:
        ModelUnavailable: The model lacks the default preview method, its folder has an invalid `calotype.json`, or a
            LoRA does not fit it.
    """
    from calotype_server.engine import assembly, capabilities, loading
    from calotype_server.engine.adapters.load import load_loras

    loras = load_loras(pipeline, settings.lora_sources)
    given = capabilities.Defaults(settings.step_count, settings.guidance_scale, settings.tiny_vae)
    defaults = given.or_else(capabilities.read_defaults(loading.locate(settings.model)))
    tiny_vae = (
        loading.load_tiny_vae(defaults.tiny_vae, like=capabilities.decoder(pipeline)) if defaults.tiny_vae else None
    )
    engine = assembly.build_engine(
        loading.display_name(settings.model),
        pipeline,
        defaults=defaults,
        cache_dir=settings.cache_dir,
        threads=settings.threads,
        budget=PreviewBudget(settings.preview_budget),
        preview_methods=settings.allowed_methods,
        tiny_vae=tiny_vae,
        max_active=settings.max_active,
        max_rows=settings.max_batch_rows,
        deterministic=settings.deterministic,
        host_timesteps=settings.host_timesteps,
        schedule=settings.schedule,
        step_cache=settings.step_cache,
        accelerate=settings.accelerate,
        measure_again=settings.measure_again,
        memory_limit=settings.memory_limit,
        # Images that are retained later.
        reserved_bytes=settings.retain_bytes,
        other_sizes=settings.other_sizes,
        loras=loras,
        observe=observe,
    )
    _check_default_method(settings, engine.model)
    return engine


def _check_default_method(settings: Settings, model: ModelInfo) -> None:
    """Rejects a default method that the model lacks: every request that names no method would fail."""
    method = settings.preview_method
    if method in (PreviewMethod.AUTO, PreviewMethod.NONE) or method in model.preview_methods:
        return
    others = ", ".join((PreviewMethod.AUTO, *model.preview_methods, PreviewMethod.NONE))
    hint = "Choose"
    if method is PreviewMethod.TINY_VAE:
        hint = "Name a tiny VAE that fits the model with --tiny-vae, or choose"
    raise errors.ModelUnavailable(
        f"--preview-method is {method}, which {settings.model!r} does not support. {hint} another method: {others}."
    )
