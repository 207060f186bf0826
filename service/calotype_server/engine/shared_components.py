"""What the views of concurrent requests share besides the denoiser, made safe for it.

- A fast tokenizer keeps padding and truncation as settings of the one tokenizer, and every call sets them, `tokenize`
  too: unguarded, prompts come out cut or filled up wrongly, in silence.
- Some autoencoders keep the features of a decode on themselves (Qwen-Image, Wan).
- A pipeline that has ended takes the hooks of offloading off its components and puts them on again.
"""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import torch

__all__ = ["Locked", "shared_components"]

_WORK_OF_A_VAE = frozenset({"decode", "encode", "forward", "tiled_decode", "tiled_encode"})


def shared_components(pipeline: Any) -> dict[str, Any]:
    """Returns what to put into every view of a pipeline, for `request_view`; call it once for each pipeline.

    Whoever else uses the tokenizers or the VAE while requests run must use these.
    """
    shared: dict[str, Any] = {"_all_hooks": []}
    tokenizers = threading.Lock()
    for name, component in pipeline.components.items():
        if component is not None and name.startswith(("tokenizer", "processor")):
            shared[name] = Locked(component, tokenizers)
    vae = pipeline.components.get("vae")
    if vae is not None:
        shared["vae"] = Locked(_upcast(vae), threading.Lock(), _WORK_OF_A_VAE)
    return shared


class Locked:
    """Passes for a component, but runs its methods one at a time.

    Args:
        component: The real one.
        lock: Held while a method runs; may be shared with others.
        methods: Names of the methods to guard; None for every public one.
    """

    def __init__(self, component: Any, lock: threading.Lock, methods: frozenset[str] | None = None) -> None:
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
        """The component's, so that it passes where a pipeline looks at types."""
        return type(self._component)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._component, name)
        guarded = not name.startswith("_") if self._methods is None else name in self._methods
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

    Pipelines raise a float16 VAE that overflows to float32, decode, and lower it again: under the feet of another
    request. With this one in its place they see float32 from the start, and leave it alone.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = copy.deepcopy(vae).to(torch.float32)

    def decode(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Decodes in float32."""
        return self._vae.decode(latents.to(torch.float32), *args, **kwargs)

    @property  # type: ignore[misc]  # typeshed gives it a setter
    def __class__(self) -> Any:
        return type(self._vae)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)


def _upcast(vae: Any) -> Any:
    overflows = getattr(vae, "dtype", None) == torch.float16 and getattr(vae.config, "force_upcast", False)
    return _UpcastVae(vae) if overflows else vae
