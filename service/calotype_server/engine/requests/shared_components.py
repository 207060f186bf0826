"""Makes the components that concurrent requests share, apart from the denoiser, safe for concurrent use.

- A fast tokenizer stores padding and truncation as its own settings, and every call changes them, even `tokenize`.
  Without a lock, prompts are silently truncated or padded wrongly.
- Some autoencoders store the features of a decode in themselves (Qwen-Image, Wan).
- When a pipeline ends, it removes the offloading hooks from its components and adds them again.
- Hooks that move weights to the device and back must not do so in two threads at once.
- If memory runs out while a VAE decodes, it tries again in tiles.
"""

from __future__ import annotations

import copy
import functools
import threading
from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine.capabilities import decoder_name, moves_layers
from calotype_server.engine.requests.own_state import is_locked
from calotype_server.engine.requests.tiled_vae import TilingVae
from calotype_server.engine.requests.turns import Turns

if TYPE_CHECKING:
    import contextlib

__all__ = ["Locked", "shared_components"]

_VAE_METHODS = frozenset({"decode", "encode", "forward", "tiled_decode", "tiled_encode"})


def shared_components(pipeline: Any) -> dict[str, Any]:
    """Returns the components to use in every view of a pipeline, for `request_view`. Call it once for each pipeline.

    Any other code that uses the tokenizers or the VAE while requests run must use these components.
    """
    shared: dict[str, Any] = {"_all_hooks": []}
    tokenizers, turns = threading.Lock(), Turns()
    for name, component in pipeline.components.items():
        if is_locked(name, component):
            shared[name] = Locked(component, tokenizers)
        elif name != decoder_name(pipeline) and _takes_turns(name, component):
            shared[name] = Locked(component, turns.of(component))
    name = decoder_name(pipeline)
    vae = getattr(pipeline, name)
    lock = turns.of(vae) if _takes_turns(name, vae) else threading.Lock()
    shared[name] = Locked(TilingVae(_upcast(vae)), lock, _VAE_METHODS)
    return shared


def _takes_turns(name: str, component: Any) -> bool:
    """Whether hooks move a component's weights in the threads of requests; see `loading.offload`."""
    if not isinstance(component, torch.nn.Module):
        return False
    # The device thread alone calls a denoiser whose blocks move.
    return hasattr(component, "_hf_hook") or (name.startswith("text_encoder") and moves_layers(component))


class Locked:
    """Looks like a component, but runs its methods one at a time.

    Args:
        component: The real component.
        lock: Held while a method runs; several components may share it.
        methods: Names of the methods to guard; None for every public method, and those of modules inside.
    """

    def __init__(
        self,
        component: Any,
        lock: contextlib.AbstractContextManager[Any],
        methods: frozenset[str] | None = None,
    ) -> None:
        self.__dict__.update(_component=component, _lock=lock, _methods=methods)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the component."""
        with self._lock:
            return self._component(*args, **kwargs)

    def __len__(self) -> int:
        with self._lock:
            return len(self._component)

    @property  # type: ignore[misc]  # typeshed gives it a setter
    def __class__(self) -> Any:
        """The component's class, so that type checks of a pipeline succeed."""
        return self._component.__class__

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._component, name)
        guarded = not name.startswith("_") if self._methods is None else name in self._methods
        if guarded and isinstance(value, torch.nn.Module):
            return Locked(value, self._lock)
        if not (guarded and callable(value)):
            return value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return value(*args, **kwargs)

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        with self._lock:
            setattr(self._component, name, value)


class _UpcastVae:
    """A VAE in float32 for latents of any precision.

    If a float16 VAE overflows, pipelines convert it to float32, decode, and convert it back, while other requests may
    use it. A VAE that already is float32 is not converted.
    """

    def __init__(self, vae: Any) -> None:
        # A copy of an offloaded VAE would include the modules that its hook sends back, such as the denoiser.
        own = vae if hasattr(vae, "_hf_hook") else copy.deepcopy(vae)
        self.__dict__["_vae"] = own.to(torch.float32)

    def decode(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Decodes in float32."""
        return self._vae.decode(latents.to(torch.float32), *args, **kwargs)

    @property  # type: ignore[misc]  # typeshed gives it a setter
    def __class__(self) -> Any:
        return type(self._vae)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._vae, name, value)


def _upcast(vae: Any) -> Any:
    overflows = getattr(vae, "dtype", None) == torch.float16 and getattr(vae.config, "force_upcast", False)
    return _UpcastVae(vae) if overflows else vae
