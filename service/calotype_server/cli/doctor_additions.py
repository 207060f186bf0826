"""The part of `calotype doctor` that checks the files that an operator adds to a model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from calotype_server.cli.findings import Finding
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from calotype_server.settings import Settings

__all__ = ["additions"]


def additions(settings: Settings, pipeline: Any, tiny_vae: str | None) -> Iterator[Finding]:
    """Yields a finding for each embedding and each LoRA, and for the tiny VAE.

    Args:
        settings: The operator's settings.
        pipeline: The loaded pipeline; changed, so it must not be in use.
        tiny_vae: Hub id or folder of the tiny VAE, or None.
    """
    from calotype_server.engine import capabilities, loading
    from calotype_server.engine.adapters.load import load_loras
    from calotype_server.engine.prompts.embeddings import load_embeddings

    for name, source in settings.embedding_sources.items():
        yield _finding("embedding", name, source, partial(load_embeddings, pipeline, {name: source}, download=False))
    for name, source in settings.lora_sources.items():
        yield _finding("lora", name, source, partial(load_loras, pipeline, {name: source}, download=False))
    if tiny_vae is not None:
        load = partial(loading.load_tiny_vae, tiny_vae, like=capabilities.decoder(pipeline), download=False)
        yield _finding("tiny-vae", tiny_vae, tiny_vae, load)


def _finding(subject: str, name: str, source: str, load: Callable[[], object]) -> Finding:
    from calotype_server.engine.loading.explain import is_unreachable

    try:
        load()
    except ModelUnavailable as error:
        if is_unreachable(error):
            return Finding(True, subject, f"{source} is not in the local cache; serve will download it")
        return Finding(False, subject, f"{name} cannot be used", str(error))
    return Finding(True, subject, f"{name} fits the model")
