"""temporary"""

import os

import structlog

from calotype_server import errors
from calotype_server.engine.preview.budget import PreviewBudget
from calotype_server.types import PreviewMethod

_log = structlog.get_logger(__name__)


def load_engine(settings, observe):
    # OpenMP's threads spin while they wait for each other. A server shares its cores, with its own event loop at least,
    # and spinning against it was measured to cost up to twenty times the time of a step. Read when torch is imported.
    budget = PreviewBudget(settings.preview_budget)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Here, so that a wrong address or flag is told before torch has been imported for seconds.
    from calotype_server.engine import capabilities, diffusers_engine, loading

    device = loading.pick_device(settings.device)
    pipeline = loading.load_pipeline(
        settings.model,
        revision=settings.revision,
        variant=settings.variant,
        device=device,
        dtype=loading.pick_dtype(settings.dtype, device),
    )
    try:
        given = capabilities.Defaults(settings.step_count, settings.guidance_scale, settings.tiny_vae)
        defaults = given.or_else(capabilities.read_defaults(loading.locate(settings.model)))
        tiny_vae = loading.load_tiny_vae(defaults.tiny_vae, like=pipeline.vae) if defaults.tiny_vae else None
        engine = diffusers_engine.DiffusersEngine(
            loading.display_name(settings.model),
            pipeline,
            defaults=defaults,
            cache_dir=settings.cache_dir,
            threads=settings.threads,
            budget=budget,
            preview_methods=settings.allowed_methods,
            tiny_vae=tiny_vae,
            max_active=settings.max_active,
            max_rows=settings.max_batch_rows,
            deterministic=settings.deterministic,
            observe=observe,
        )
        _check_default_method(settings, engine.model)
        return engine
    except errors.StartupError:
        raise
    except Exception as error:
        _log.exception("the pipeline cannot be driven")
        kind = type(pipeline).__name__
        raise errors.ModelUnavailable(f"{settings.model!r} is a {kind}, which Calotype cannot drive.") from error


def _check_default_method(settings, model) -> None:
    """Otherwise every request that leaves the method open would be refused."""
    method = settings.preview_method
    if method in (PreviewMethod.AUTO, PreviewMethod.NONE) or method in model.preview_methods:
        return
    others = ", ".join((PreviewMethod.AUTO, *model.preview_methods, PreviewMethod.NONE))
    hint = " Name one that fits the model with --tiny-vae, or" if method is PreviewMethod.TINY_VAE else " Please"
    raise errors.ModelUnavailable(
        f"--preview-method is {method}, by which no previews of {settings.model!r} can be drawn."
        f"{hint} choose another method: {others}."
    )
