"""Objects that look like the shared modules, but reject everything that would change them.

A pipeline assumes that it owns its denoiser. Some change it while they generate: perturbed attention guidance replaces
attention processors, and some guiders register hooks. Concurrent requests would then change each other's images.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["ChangeRejected", "ReadOnly", "is_change"]

_VERBS = (
    "add|apply|compile|convert|delete|disable|enable|extract|freeze|fuse|inject|init|initialize|load|maybe|merge|remove|"
    "replace|reset|set|unfreeze|unfuse|unload|unmerge|unregister|unset|register|update|upcast"
)
_CONVERSIONS = (
    "bfloat16|cpu|cuda|double|eval|float|half|ipu|mtia|requires_grad_|share_memory|to|to_empty|train|type|xpu|"
    "zero_grad|dequantize|push_to_hub|smart_apply"
)
_CHANGE = re.compile(rf"_*(?:{_VERBS})(?:_.*)?|{_CONVERSIONS}")
"""Names of methods that change a module: these verbs, alone or before an underscore, and conversions of its weights."""

_MODULES = ("children", "modules")
_NAMED_MODULES = ("named_children", "named_modules", "items")


class ChangeRejected(AttributeError):
    """A pipeline tried to change a module that requests share.

    Args:
        change: Name of the method or the attribute.
        kind: Class of the module.
    """

    def __init__(self, change: str, kind: str) -> None:
        super().__init__(f"{change!r} would change a {kind} that is shared by all requests.")
        self.reason = f"Its pipeline changes the denoiser during a generation ({change} of {kind})."


@functools.cache
def is_change(name: str) -> bool:
    """Whether a method of that name changes its module."""
    return _CHANGE.fullmatch(name) is not None


class ReadOnly:
    """Looks like a module and calls it, but rejects changes of it and of its parts.

    Args:
        module: The real module.
        ignore_changes: Whether changes have no effect, instead of raising `ChangeRejected`.
    """

    __slots__ = ("_ignore_changes", "_module")

    def __init__(self, module: Any, *, ignore_changes: bool = False) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_ignore_changes", ignore_changes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        return self._module(*args, **kwargs)

    @property  # type: ignore[misc]  # typeshed gives it a setter
    def __class__(self) -> Any:
        """The module's class, so that a pipeline that looks for a module to find its device finds this object."""
        return self._module.__class__

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, torch.nn.Module):
            return self._part(value)
        if not callable(value):
            return value
        if is_change(name):
            return functools.partial(self._change, name)
        if name in _MODULES or name in _NAMED_MODULES or name in ("get_submodule", "values"):
            return functools.partial(self._parts, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        self._reject(name)

    def __delattr__(self, name: str) -> None:
        self._reject(name)

    def __len__(self) -> int:
        return len(self._module)

    def __bool__(self) -> bool:
        return bool(self._module)

    def __iter__(self) -> Iterator[Any]:
        return (self._part(each) for each in self._module)

    def __getitem__(self, key: Any) -> Any:
        return self._part(self._module[key])

    def _part(self, value: Any) -> Any:
        return ReadOnly(value, ignore_changes=self._ignore_changes) if isinstance(value, torch.nn.Module) else value

    def _parts(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the modules that a method of the module returns, as read-only objects."""
        found = method(*args, **kwargs)
        if isinstance(found, torch.nn.Module):
            return self._part(found)
        if name in _NAMED_MODULES:
            return ((key, self._part(value)) for key, value in found)
        return (self._part(value) for value in found)

    def _change(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Takes the place of a method that changes the module; a conversion to its own format does not."""
        if name == "to" and _is_converted(self._module, *args, **kwargs):
            return self
        if name == "eval" and not self._module.training:
            return self
        return self._reject(name)

    def _reject(self, name: str) -> Any:
        if self._ignore_changes:
            return self
        raise ChangeRejected(name, self._module.__class__.__name__)


def _is_converted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether `module.to` with these arguments would change nothing."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if memory_format is not None:
        return False
    return all(
        (device is None or (device.type == each.device.type and device.index in (None, each.device.index)))
        and (dtype is None or not each.is_floating_point() or dtype == each.dtype)
        for each in module.parameters()
    )
