"""What stands in for the denoiser in a request's view of the pipeline."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DenoiserProxy"]


class DenoiserProxy:
    """Passes for a module, but has its calls answered by somebody else.

    Attributes read are the module's. What a pipeline does to a module that it believes to be alone with is kept from
    the shared one: caches are neither entered nor reset, and attributes cannot be written.

    Args:
        module: The real one.
        answer: Called in its place.
    """

    __slots__ = ("_answer", "_module")

    def __init__(self, module: Any, answer: Callable[..., Any]) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_answer", answer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Asks `answer`."""
        return self._answer(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Asks `answer`, as pipelines that skip a module's hooks would call it."""
        return self._answer(*args, **kwargs)

    def cache_context(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        """Does nothing: the module has one state for each context's name, and all requests use the same names."""
        return contextlib.nullcontext()

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: pipelines call it when they end, and the others have not."""

    @property  # type: ignore[misc]  # typeshed gives it a setter
    def __class__(self) -> Any:
        """The module's, so that a pipeline which looks for modules, to find its device, finds this one."""
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name!r} cannot be set: the {type(self._module).__name__} is shared by all requests.")
