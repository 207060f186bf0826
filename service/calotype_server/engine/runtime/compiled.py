"""CompiledRuntime: computes the denoiser with `torch.compile`."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import structlog
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._pytree import tree_leaves

from calotype_server.engine.runtime.collate import Collator

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from calotype_server.engine.runtime.collate import Call

__all__ = ["CompiledRuntime"]

_log = structlog.get_logger(__name__)

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

_LEAST_SHARE = 0.5
"""Of the weights. If the repeated blocks have less, the whole denoiser is compiled."""


class CompiledRuntime:
    """Compiles the repeated blocks of a transformer, or a whole UNet; see `DenoiserRuntime`.

    The number of rows stays free, except that calls of one row are compiled apart. Compiling takes seconds to minutes
    and is done while the model loads; its results are cached on disk. Afterwards nothing is compiled: calls of other
    sizes run eagerly.

    CUDA graphs of the compiler are never used: they would belong to the thread that captured them.

    Args:
        module: The denoiser; not changed.
        exact: Join only rows that need no padding; see `Collator`. Also, choose no kernels by their speed.
        cache_dir: Folder of all caches; compiled code is in `inductor` below it, unless the variable
            `TORCHINDUCTOR_CACHE_DIR` names another one.
        backend: Backend of `torch.compile`.
    """

    name = "compile"

    def __init__(
        self, module: Any, *, exact: bool, cache_dir: Path, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        _cache_below(cache_dir.expanduser())
        self.module = module
        self.collator = Collator(module, exact=exact)
        self._rows = 0
        self._loading = True
        options = {"deterministic": True} if exact and backend == "inductor" else None
        self._compute = _compile(module, self._mark_rows, backend=backend, options=options)

    def start(self) -> None:
        """Does nothing: compiled code belongs to no thread."""

    def end_loading(self) -> None:
        """From now on, nothing is compiled: that would delay all requests."""
        self._loading = False

    def run(self, calls: Sequence[Call], padded_rows: int) -> Any:
        """Joins the calls and computes them."""
        if not isinstance(next(iter(calls[0].named.values())), torch.Tensor):
            # The number of tensors in a list is the number of rows, which compiled code cannot leave free.
            args, kwargs = self.collator.join(calls, padded_rows)
            return self.module(*args, **kwargs)
        named = self.collator.join_named(calls, padded_rows)
        self._rows = padded_rows
        with _failing_when_compiled_too_often() if self._loading else torch.compiler.set_stance("eager_on_recompile"):
            return self._compute(**named)

    def clear(self) -> None:
        """Keeps the compiled code, which serves all numbers of rows."""

    def free_memory(self) -> bool:
        """Has no memory to free."""
        return False

    def _mark_rows(self, *arguments: Any) -> None:
        """Lets the compiler know that the number of rows varies."""
        for leaf in tree_leaves(arguments):
            if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == self._rows > 1:
                torch._dynamo.maybe_mark_dynamic(leaf, 0)


def _cache_below(folder: Path) -> None:
    """Sets the folder for compiled code, unless the operator did."""
    # Importing diffusers already sets the variable to torch's default, which is among the temporary files.
    if os.environ.get(_CACHE_VARIABLE) in (None, default_cache_dir()):
        os.environ[_CACHE_VARIABLE] = str(folder / "inductor")


def _failing_when_compiled_too_often() -> contextlib.AbstractContextManager[Any]:
    """Makes code raise that would otherwise run eagerly, because it was compiled for too many kinds of arguments."""
    return torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)


def _compile(module: Any, mark: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """Returns a compiled form of the module. `mark` receives the arguments of each compiled part before its calls."""
    blocks = _repeated_blocks(module)
    if not blocks:
        return _marking(torch.compile(module, **options), mark)
    # A copy of the structure that shares the weights, so that the module itself stays as it is.
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    compiled = copy.deepcopy(module, shared)
    compiled.compile_repeated_blocks(fullgraph=True, **options)
    for block in compiled.modules():
        if type(block).__name__ in blocks:
            block._compiled_call_impl = _marking(block._compiled_call_impl, mark)
    return compiled


def _repeated_blocks(module: Any) -> Sequence[str]:
    """Returns the classes of the blocks to compile; none if compiling them alone gains too little."""
    # The list of a UNet names its transformers only. Its other layers would still be launched one by one.
    names = getattr(module, "_repeated_blocks", None) or ()
    if type(module).__name__.startswith("UNet"):
        return ()
    covered = {
        id(parameter): parameter.numel()
        for part in module.modules()
        if type(part).__name__ in names
        for parameter in part.parameters()
    }
    total = sum(parameter.numel() for parameter in module.parameters())
    return names if sum(covered.values()) >= _LEAST_SHARE * total else ()


def _marking(compiled: Callable[..., Any], mark: Callable[..., None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        mark(args, kwargs)
        return compiled(*args, **kwargs)

    return call
