"""Calls the denoiser through a step cache, where requests do not share it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype_server.engine.requests.denoiser_proxy import DenoiserProxy
from calotype_server.engine.runtime.collate import Collator

if TYPE_CHECKING:
    from calotype_server.engine.runtime.collate import Digests
    from calotype_server.engine.step_cache.cache import StepCache

__all__ = ["cached_proxy"]


def cached_proxy(module: Any, cache: StepCache) -> DenoiserProxy:
    """Returns the object to use in place of a denoiser that no other request uses meanwhile."""
    collator = Collator(module)
    digests: Digests = {}

    def answer(*args: Any, **kwargs: Any) -> Any:
        return cache.answer(collator.bind(args, kwargs, digests).kind, lambda: module(*args, **kwargs))

    return DenoiserProxy(module, answer)
