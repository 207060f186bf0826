"""OpenVinoRuntime: computes the denoiser on the CPU with OpenVINO.

The denoiser is traced once for each structure of calls that occurs while the model loads, for any size and any number
of rows. A trace fixes the Python branches that the model took, so the first answer for each image size is compared with
the model's own; sizes with other branches, such as latents that a UNet cannot halve often enough, run eagerly.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import structlog
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from calotype_server.engine.runtime.collate import TIMESTEPS, Collator
from calotype_server.engine.runtime.compare import compare
from calotype_server.engine.runtime.openvino_cache import load_traced, save_traced, traced_path

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from pathlib import Path

    from calotype_server.engine.runtime.collate import Call

# OpenVINO reports its use to Google when it is imported and for each conversion, unless this package is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino  # noqa: E402

__all__ = ["OpenVinoRuntime"]

_log = structlog.get_logger(__name__)

_FIXED_BYTES = 512 * 2**20
"""Memory for models that are compiled for one shape, which are up to a fifth faster than the one for all shapes."""
_COPIES = 2
"""A compiled model of the bundled UNet takes about twice the memory of its weights."""
_MAX_CHECKED = 256
"""Image sizes whose first answer is remembered as right or wrong."""

_MAX_MESSAGE = 300
"""Characters of an error of OpenVINO that are logged; some quote half the model."""


class OpenVinoRuntime:
    """Computes calls with OpenVINO in float32; see `DenoiserRuntime`.

    Calls of other structures than those at load run eagerly, and so do sizes for which the traced model is wrong.

    Args:
        module: The denoiser, in float32 on the CPU.
        exact: Join only rows that need no padding; see `Collator`.
        cache_dir: Folder of all caches; traced models are in `openvino` below it.

    Raises:
        ValueError: The denoiser is not in float32.
    """

    name = "openvino"

    def __init__(self, module: Any, *, exact: bool, cache_dir: Path) -> None:
        if any(parameter.dtype != torch.float32 for parameter in module.parameters()):
            raise ValueError("the denoiser is not in float32")
        self.module = module
        self.collator = Collator(module, exact=exact)
        self._cache_dir = cache_dir
        self._core = openvino.Core()
        self._loading = True
        self._structures: dict[Hashable, _Structure] = {}
        size = _COPIES * sum(parameter.nbytes for parameter in module.parameters())
        self._fixed_models = _FIXED_BYTES // max(1, size)

    def start(self) -> None:
        """Does nothing: OpenVINO has its own threads."""

    def end_loading(self) -> None:
        """From now on, calls of a new structure run eagerly: tracing them would delay all requests."""
        self._loading = False

    def run(self, calls: Sequence[Call], padded_rows: int) -> Any:
        """Joins the calls and computes them with as many threads as torch would use."""
        inputs = self._inputs(calls, padded_rows)
        structure = None if inputs is None else self._structure(inputs)
        if inputs is None or structure is None:
            return self._eager(calls, padded_rows)
        right = structure.checked.get(inputs.sizes)
        if right:
            return structure.compute(inputs, padded_rows)
        expected = self._eager(calls, padded_rows)
        if right is False:
            return expected
        return self._first_answer(structure, inputs, padded_rows, expected)

    def clear(self) -> None:
        """Drops the models that are compiled for one shape."""
        self.free_memory()

    def free_memory(self) -> bool:
        """Drops the models that are compiled for one shape; they are compiled again when they are used."""
        freed = [each.drop_compiled() for each in self._structures.values()]
        return any(freed)

    def _eager(self, calls: Sequence[Call], padded_rows: int) -> Any:
        args, kwargs = self.collator.join(calls, padded_rows)
        return self.module(*args, **kwargs)

    def _inputs(self, calls: Sequence[Call], padded_rows: int) -> _Inputs | None:
        """Returns the joined arguments, or None if they are not a batch in one tensor."""
        main = next(iter(calls[0].named.values()))
        if not isinstance(main, torch.Tensor) or not main.ndim:
            return None
        named = self.collator.join_named(calls, padded_rows)
        for name in TIMESTEPS:
            # Schedulers give whole numbers or floats, and models convert them. One structure serves both.
            if isinstance(named.get(name), torch.Tensor):
                named[name] = named[name].to(torch.float32)
        return _Inputs(named)

    def _structure(self, inputs: _Inputs) -> _Structure | None:
        """Returns the traced model for a structure of arguments, or None if there is none."""
        try:
            found = self._structures.get(inputs.structure)
        except TypeError:  # an argument that cannot be compared
            return None
        if found is None and self._loading:
            found = _Structure(self._core, self.module, inputs, self._cache_dir, self._fixed_models)
            self._structures[inputs.structure] = found
        return found

    def _first_answer(self, structure: _Structure, inputs: _Inputs, rows: int, expected: Any) -> Any:
        """Returns the answer for a new size, after comparing it with the expected one."""
        try:
            answer = structure.compute(inputs, rows)
            error, tolerance = compare(answer, expected)
            right, reason = error <= tolerance, f"error {error:.1e}"
        except Exception as failure:
            answer, right, reason = expected, False, repr(failure)
        structure.remember(inputs.sizes, right)
        if right:
            return answer
        shapes = [tuple(tensor.shape) for tensor in inputs.tensors]
        _log.warning(
            "OpenVINO cannot compute this size, which runs eagerly", shapes=shapes, reason=reason[:_MAX_MESSAGE]
        )
        return expected


class _Inputs:
    """Arguments of a joined call, as tensors and the rest.

    Attributes:
        tensors: The tensors, in order.
        structure: Everything that a trace fixes: the rest, and the number format and the features of each tensor.
        sizes: Everything else but the number of rows.
    """

    def __init__(self, named: dict[str, Any]) -> None:
        leaves, self._spec = tree_flatten(dict(sorted(named.items())))
        self._leaves = leaves
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.structure = (
            self._spec,
            tuple(
                (leaf.dtype, leaf.ndim, _features(leaf)) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf)
                for leaf in leaves
            ),
        )
        self.sizes = tuple(tensor.shape[1:] for tensor in self.tensors)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Returns the arguments by name, with these tensors in place of their own."""
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._spec)


class _Structure:
    """A traced denoiser, compiled for all shapes and for the commonest ones.

    Args:
        core: OpenVINO's runtime.
        module: The denoiser.
        inputs: Arguments of a real call.
        cache_dir: Folder of all caches.
        fixed_models: Most models to compile for one shape.

    Attributes:
        checked: Whether the answers are right, by size.
    """

    def __init__(self, core: openvino.Core, module: Any, inputs: _Inputs, cache_dir: Path, fixed_models: int) -> None:
        self.checked: OrderedDict[Hashable, bool] = OrderedDict()
        self._core = core
        self._fixed_models = fixed_models
        self._compiled: dict[tuple[int, Hashable], Any] = {}
        self._sizes = inputs.sizes
        expected = module(**inputs.with_tensors(inputs.tensors))
        _, self._output_spec = tree_flatten(expected)
        path = traced_path(cache_dir, module, repr(inputs.structure), version("openvino"))
        loaded = load_traced(core, path)
        if loaded is not None and self._gives(loaded, inputs, expected):
            return
        self._compiled.clear()
        self._traced = _trace(module, inputs)
        save_traced(path, self._traced)

    def compute(self, inputs: _Inputs, rows: int) -> Any:
        """Returns the denoiser's answer; no later call overwrites it."""
        request = self._request(inputs, rows)
        results = request.infer([tensor.contiguous().numpy() for tensor in inputs.tensors], share_inputs=True)
        answers = [torch.from_numpy(results[number]) for number in range(len(results))]
        return tree_unflatten(answers, self._output_spec)

    def remember(self, sizes: Hashable, right: bool) -> None:
        """Records whether the answers for a size are right."""
        self.checked[sizes] = right
        if len(self.checked) > _MAX_CHECKED:
            self.checked.popitem(last=False)

    def drop_compiled(self) -> bool:
        """Drops all compiled models. Returns whether there were any."""
        dropped = bool(self._compiled)
        self._compiled.clear()
        return dropped

    def _gives(self, traced: openvino.Model, inputs: _Inputs, expected: Any) -> bool:
        """Uses a traced model if its answer is right: a file may be damaged."""
        self._traced = traced
        try:
            error, tolerance = compare(self.compute(inputs, inputs.tensors[0].shape[0]), expected)
        except Exception as failure:
            _log.warning("cannot use the cached OpenVINO model, tracing again", error=repr(failure))
            return False
        return error <= tolerance

    def _request(self, inputs: _Inputs, rows: int) -> Any:
        """Returns an inference request for these shapes, compiled before or now."""
        threads = torch.get_num_threads()
        fixed = inputs.sizes == self._sizes and rows & (rows - 1) == 0
        shapes = tuple(tuple(tensor.shape) for tensor in inputs.tensors)
        key = (threads, shapes if fixed else None)
        if key not in self._compiled:
            if fixed and sum(shape is not None for _, shape in self._compiled) >= self._fixed_models:
                key, fixed = (threads, None), False
            if key not in self._compiled:
                self._compiled[key] = self._compile(inputs.tensors, threads, fixed)
        return self._compiled[key]

    def _compile(self, tensors: Sequence[torch.Tensor], threads: int, fixed: bool) -> Any:
        model = self._traced.clone()
        shapes = [list(tensor.shape) if fixed else _any_shape(tensor) for tensor in tensors]
        model.reshape({number: openvino.PartialShape(shape) for number, shape in enumerate(shapes)})
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            # Processors with bfloat16 would use it by default.
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            # Pinned threads would compete with torch's for the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        return self._core.compile_model(model, "CPU", settings).create_infer_request()


def _trace(module: Any, inputs: _Inputs) -> openvino.Model:
    """Converts the denoiser for any number of rows and any size."""
    example = tuple(_two_rows(tensor) for tensor in inputs.tensors)
    with warnings.catch_warnings():
        # Of the branches that the trace fixes. The answers are compared instead.
        warnings.simplefilter("ignore")
        traced = openvino.convert_model(_Positional(module, inputs), example_input=example)
    if len(traced.inputs) != len(example):
        raise ValueError("the traced model lacks some of the arguments")
    return traced


class _Positional(torch.nn.Module):
    """Calls the denoiser with tensors only, and returns tensors only, as tracing needs it."""

    def __init__(self, module: Any, inputs: _Inputs) -> None:
        super().__init__()
        self.module = module
        self._inputs = inputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves, _ = tree_flatten(self.module(**self._inputs.with_tensors(tensors)))
        return tuple(leaves)


def _two_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Doubles a tensor of one row: a trace would take a length of 1 for a dimension to broadcast."""
    return torch.cat([tensor, tensor]) if tensor.ndim and tensor.shape[0] == 1 else tensor


def _features(tensor: torch.Tensor) -> int | None:
    """Returns the length of the dimension that does not depend on the image's size: channels, or features of tokens."""
    return tensor.shape[1] if tensor.ndim == 4 else tensor.shape[2] if tensor.ndim == 3 else None


def _any_shape(tensor: torch.Tensor) -> list[int]:
    shape = [-1] * tensor.ndim
    if tensor.ndim in (3, 4):
        shape[1 if tensor.ndim == 4 else 2] = _features(tensor) or -1
    return shape
