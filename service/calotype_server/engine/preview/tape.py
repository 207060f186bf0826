"""Records what a pipeline does from latents to images, and repeats it without the pipeline.

A pipeline call takes several milliseconds of Python, with the interpreter's lock, before and after the VAE. Next to a
denoiser that is limited by launching kernels from Python, each preview would delay the denoiser by that time. The few
operations around the VAE do not depend on the values of the latents, so they can be repeated for other latents of the
same shape. A tape is only used after it gave the same images as the pipeline for other latents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from calotype_server.engine.runtime.compare import compare, tensors

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Tape", "TapedVae"]


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations of one call, recorded while the mode is active, between `start` and `end`.

    Attributes:
        verified: Whether `agrees` compared other latents than those of the recording, with success. Only then `play`
            may replace the pipeline.
        started: Whether `start` was called.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.verified = False
        self._recording = False
        self._usable = False
        self.started = False
        self._slots: dict[int, int] = {}
        """Numbers of tensors that depend on the latents, by the `id` of the tensor."""
        self._alive: list[torch.Tensor] = []
        """Tensors in the order of their slots. While they are alive, their `id` belongs to them."""
        self._calls: list[tuple[Callable[..., Any], list[Any], Any, list[int]]] = []
        """Functions, flat arguments, their structure, and the slots of the results."""
        self._result = 0
        self._recorded = torch.empty(0)

    def start(self, latents: torch.Tensor) -> None:
        """Starts to record, at these latents; everything recorded before is dropped."""
        self._recording = False
        self._slots.clear()
        self._alive.clear()
        self._calls.clear()
        self._track(latents)
        self._recorded = latents.clone()
        self.started = self._usable = self._recording = True

    def end(self, images: torch.Tensor) -> bool:
        """Ends the recording. Returns whether the images can be computed again from other latents."""
        slot = self._slots.get(id(images))
        self._recording = False
        self._usable = self._usable and slot is not None
        self._result = slot or 0
        self._slots.clear()
        self._alive.clear()
        return self._usable

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a function and records the call instead of its operations."""
        recorded, self._recording = self._recording, False
        result = function(*args, **kwargs)
        self._recording = recorded
        if recorded:
            self._record(function, args, kwargs, result)
        return result

    @torch.no_grad()
    def play(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the images of other latents of the same shape, format and device."""
        values = {0: latents}
        for function, flat, structure, slots in self._calls:
            filled = [values[each.number] if isinstance(each, _Slot) else each for each in flat]
            args, kwargs = tree_unflatten(filled, structure)
            values.update(zip(slots, tensors(function(*args, **kwargs)), strict=True))
        return values[self._result]

    def agrees(self, latents: torch.Tensor, images: torch.Tensor) -> bool:
        """Returns whether the tape gives the images that the pipeline gave for these latents.

        The latents of the recording prove nothing.
        """
        if torch.equal(latents, self._recorded):
            return True
        try:
            error, allowed = compare(self.play(latents), images)
        except (RuntimeError, TypeError, ValueError):
            return False
        self.verified = error <= allowed
        return self.verified

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._recording:
            self._record(func, args, kwargs or {}, result)
        return result

    def _record(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        flat, structure = tree_flatten((args, kwargs))
        found = [isinstance(each, torch.Tensor) and id(each) in self._slots for each in flat]
        if not any(found):
            return  # It does not depend on the latents, so its result is a constant.
        if not all(id(each) in self._slots for each in _written(function, args, kwargs)):
            self._usable = False  # It writes into a constant, which all images would share.
        results = list(tensors(result))
        if not results:
            self._usable = False  # A number for Python: what happens next may depend on it.
        arguments = [_Slot(self._slots[id(each)]) if known else each for each, known in zip(flat, found, strict=True)]
        self._calls.append((function, arguments, structure, [self._track(each) for each in results]))

    def _track(self, tensor: torch.Tensor) -> int:
        """Returns the slot of a tensor. A result in place is its argument and keeps the slot."""
        slot = self._slots.setdefault(id(tensor), len(self._alive))
        if slot == len(self._alive):
            self._alive.append(tensor)
        return slot


class _Slot:
    """A place in the arguments for a tensor that depends on the latents."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class TapedVae:
    """Looks like a VAE, but its calls are recorded as one.

    Args:
        vae: The VAE.
        tape: Records `decode`.
    """

    def __init__(self, vae: Any, tape: Tape) -> None:
        self._vae = vae
        self._tape = tape

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Decodes latents."""
        return self._tape.run(self._vae.decode, args, kwargs)

    @property  # type: ignore[misc]  # typeshed gives it a setter
    def __class__(self) -> Any:
        """The class of the VAE, so that type checks of a pipeline succeed."""
        return self._vae.__class__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)


def _written(function: Any, args: Any, kwargs: Any) -> list[Any]:
    """Returns the arguments that an operation changes."""
    schema = getattr(function, "_schema", None)
    return [
        args[number] if number < len(args) else kwargs.get(argument.name)
        for number, argument in enumerate(() if schema is None else schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
