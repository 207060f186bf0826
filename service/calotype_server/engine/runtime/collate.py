"""Joins the denoiser calls of several requests into one call, and splits the answer again.

There is no table of models. Each argument is handled by its type and shape:

| argument | in a joined call |
|---|---|
| tensor with one entry per row | concatenated |
| timestep: a number, or a tensor of one or of all rows | one entry per row, because requests are at different steps |
| list with one entry per row (Z-Image; the shapes of Qwen-Image) | concatenated |
| other tensor (FLUX's `img_ids`) | must have equal values; passed once |
| dict, tuple, other list | handled entry by entry |
| anything else | must have equal values; passed once |

The number of rows may differ: a request with classifier-free guidance has two rows, one without has one. Calls can be
joined if their *signatures* are equal. A wrong guess about an unknown model is found by `verify` when it is loaded.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from calotype_server.types import Lora

__all__ = ["TIMESTEPS", "Call", "Collator", "Digests", "Rows", "cut"]

Digests = dict[int, tuple[torch.Tensor, int, bytes]]
"""Maps the `id` of a tensor to the tensor, its version and a hash of its values. Each request's thread has its own."""

TIMESTEPS = ("timestep", "timesteps", "t")
"""Names of the argument with the timestep."""
_POSITIONS = ("img_ids", "txt_ids")
"""Positions of tokens. With two dimensions they have no entry per row, regardless of their length."""
_ROW_LISTS = ("img_shapes", "txt_seq_lens")
"""Lists of plain values with one entry per row."""

_PADDED = {
    "PixArtTransformer2DModel": {"encoder_attention_mask": "encoder_hidden_states"},
    "QwenImageTransformer2DModel": {"encoder_hidden_states_mask": "encoder_hidden_states"},
    "SanaTransformer2DModel": {"encoder_attention_mask": "encoder_hidden_states"},
}
"""Maps a class to its masks, and a mask to embeddings that may be padded: 0 in the mask hides the padding."""

_RAGGED = ("ZImageTransformer2DModel",)
"""Classes that accept rows of different shapes in one list."""

_TRIMMED = {"Lumina2Transformer2DModel": "encoder_attention_mask"}
"""Maps a class to the mask by which it trims the whole batch to the longest prompt. The last bits of an answer depend
on that length."""

_MAX_DIGESTS = 16

_TIME, _ROWS, _PAD, _SHARED, _LIST, _DICT, _EACH, _SAME = range(8)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the denoiser.

    Attributes:
        args: Positional arguments from the pipeline.
        kwargs: Keyword arguments from the pipeline.
        named: Both, by name.
        rows: Length of the batch dimension.
        signature: Calls with equal signatures can be joined.
        loras: LoRAs to apply to all its rows; see `LoraRuntime`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, Any]
    rows: int
    signature: tuple[Any, ...]
    loras: tuple[Lora, ...] = ()

    @property
    def kind(self) -> Hashable:
        """Equal for calls of one request whose answers have the same meaning, at different steps."""
        return self.rows, self.signature


@dataclass(frozen=True, slots=True)
class Rows:
    """Tensors that are yet to be concatenated along the first dimension.

    Attributes:
        parts: At least one tensor. They may be on different devices, and may have different number formats.
    """

    parts: list[torch.Tensor]


class Collator:
    """Joins and splits calls of one module.

    Args:
        module: The denoiser; only its signature and its class are used.
        exact: Join only rows that need no padding, so that no row's length depends on other rows in the batch.
    """

    def __init__(self, module: Any, *, exact: bool = False) -> None:
        original = getattr(module, "_orig_mod", module)  # the module inside `torch.compile`'s wrapper
        kind = type(original).__name__
        self._masks = {} if exact else _PADDED.get(kind, {})
        self._padded = {*self._masks, *self._masks.values()}
        self._decisive = _TRIMMED.get(kind) if exact else None
        self._ragged = not exact and kind in _RAGGED
        self._names = tuple(inspect.signature(original.forward).parameters)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], digests: Digests) -> Call:
        """Names a call's arguments and computes its signature.

        A call whose first argument is not a batch gets a unique signature, so that it runs alone.
        """
        named = dict(zip(self._names, args, strict=False)) | kwargs
        main = named.get(self._names[0])
        if isinstance(main, torch.Tensor) and main.ndim:
            rows, lists = main.shape[0], False
        elif isinstance(main, (list, tuple)):
            rows, lists = len(main), True
        else:
            return Call(args, kwargs, named, 1, (object(),))
        # The mask of given embeddings may be missing, which means that every token counts.
        skipped = {mask for mask, embeddings in self._masks.items() if named.get(embeddings) is not None}
        signature = tuple(
            (name, self._sign(name, named[name], rows, lists, digests)) for name in sorted(named) if name not in skipped
        )
        return Call(args, kwargs, named, rows, signature)

    def join(self, calls: Sequence[Call], padded_rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of one call for calls of one signature.

        Args:
            calls: The calls, in the order of their rows.
            padded_rows: Rows to pad to by repeating the last one; at least the rows of the calls.
        """
        if len(calls) == 1 and calls[0].rows == padded_rows:
            return calls[0].args, calls[0].kwargs
        return (), self.join_named(calls, padded_rows)

    def join_named(self, calls: Sequence[Call], padded_rows: int) -> dict[str, Any]:
        """Returns the arguments of one call, all by name and with one timestep per row, even for a single call.

        Args:
            calls: The calls, in the order of their rows. The first argument of each is a batch.
            padded_rows: Rows to pad to by repeating the last one; at least the rows of the calls.
        """
        main = calls[0].named[self._names[0]]
        device = main.device if isinstance(main, torch.Tensor) else main[0].device
        return self._join(calls, padded_rows, device, torch.cat)

    def gather(self, calls: Sequence[Call], padded_rows: int) -> dict[str, Any] | None:
        """Returns what `join_named` would, but with `Rows` in place of every tensor that it would concatenate.

        The timestep is on whatever device the call has it: nothing waits for a GPU.

        Returns:
            The arguments; None if the first argument is not a batch.
        """
        if not isinstance(calls[0].signature[0], tuple):
            return None
        return self._join(calls, padded_rows, None, Rows)

    def _join(
        self,
        calls: Sequence[Call],
        padded_rows: int,
        device: torch.device | None,
        concatenate: Callable[[list[torch.Tensor]], Any],
    ) -> dict[str, Any]:
        rows = [call.rows for call in calls]
        named = self._with_masks([call.named for call in calls])
        joiner = _Joiner(rows, padded_rows - sum(rows), device, concatenate)
        joined = {name: joiner.join(signed, [each[name] for each in named]) for name, signed in calls[0].signature}
        for mask in self._masks:
            if mask in named[0] and mask not in joined:
                values = [each[mask] for each in named]
                joined[mask] = None if values[0] is None else joiner.join((_PAD,), values)
        return joined

    def split(self, output: Any, calls: Sequence[Call], padded_rows: int) -> list[Any]:
        """Splits the answer to a joined call into the answers to each call, which are views of it."""
        if len(calls) == 1 and calls[0].rows == padded_rows:
            return [output]
        ends = list(itertools.accumulate(call.rows for call in calls))
        return [cut(output, start, end, padded_rows) for start, end in itertools.pairwise([0, *ends])]

    def _sign(self, name: str, value: Any, rows: int, lists: bool, digests: Digests) -> Hashable:
        """Returns the signature of an argument: how to join it, and what must be equal for that."""
        if name in TIMESTEPS and _is_timestep(value, rows):
            return (_TIME,)
        if isinstance(value, torch.Tensor):
            if value.ndim and value.shape[0] == rows and not (name in _POSITIONS and value.ndim == 2):
                if name in self._padded:
                    return (_PAD, value.shape[2:], value.dtype)
                decisive = _digest(value, digests) if name == self._decisive else None
                return (_ROWS, value.shape[1:], value.dtype, decisive)
            return (_SHARED, value.shape, value.dtype, _digest(value, digests))
        if isinstance(value, dict):
            return (_DICT, tuple((key, self._sign(key, value[key], rows, lists, digests)) for key in value))
        if isinstance(value, (list, tuple)):
            if lists and len(value) == rows and isinstance(value[0], torch.Tensor):
                shapes = value[0].ndim if self._ragged else tuple(each.shape for each in value)
                return (_LIST, shapes, value[0].dtype)
            if name in _ROW_LISTS and len(value) == rows:
                return (_LIST, *dict.fromkeys(map(repr, value)))
            return (_EACH, type(value), tuple(self._sign("", each, rows, lists, digests) for each in value))
        return (_SAME, type(value), _by_value(value))

    def _with_masks(self, named: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Adds missing masks if they are needed: lengths differ, or another call has one.

        Otherwise they stay missing, because models are faster without them.
        """
        for mask, embeddings in self._masks.items():
            if named[0].get(embeddings) is None:
                continue
            given = [each[mask] for each in named if each.get(mask) is not None]
            if not given and len({each[embeddings].shape[1] for each in named}) == 1:
                continue
            dtype = given[0].dtype if given else torch.bool
            named = [
                each if each.get(mask) is not None else {**each, mask: _all_ones(each[embeddings], dtype)}
                for each in named
            ]
        return named


@dataclass(frozen=True, slots=True)
class _Joiner:
    """Joins values of one signature: `rows` of each, then the last row `extra` more times.

    Attributes:
        rows: Rows of each value.
        extra: Rows to add.
        device: Where timesteps belong; None leaves them where they are.
        concatenate: Joins tensors along the rows.
    """

    rows: list[int]
    extra: int
    device: torch.device | None
    concatenate: Callable[[list[torch.Tensor]], Any]

    def join(self, signed: Any, values: list[Any]) -> Any:
        kind, first = signed[0], values[0]
        if kind == _TIME:
            return self._tensors(
                [
                    torch.as_tensor(value, device=self.device).reshape(-1).expand(rows)
                    for value, rows in zip(values, self.rows, strict=True)
                ]
            )
        if kind == _ROWS:
            return self._tensors(values)
        if kind == _PAD:
            length = max(value.shape[1] for value in values)
            return self._tensors([_padded(value, length) for value in values])
        if kind == _LIST:
            joined = list(itertools.chain.from_iterable(values))
            return joined + joined[-1:] * self.extra
        if kind == _DICT:
            return {key: self.join(entry, [value[key] for value in values]) for key, entry in signed[1]}
        if kind == _EACH:
            entries = [self.join(entry, list(column)) for entry, *column in zip(signed[2], *values, strict=True)]
            # The constructor of a named tuple has one parameter per field.
            return type(first)(*entries) if hasattr(first, "_fields") else type(first)(entries)
        return first

    def _tensors(self, parts: list[torch.Tensor]) -> Any:
        if self.extra:
            last = parts[-1]
            parts = [*parts, last[-1:].expand(self.extra, *last.shape[1:])]
        return self.concatenate(parts)


def cut(output: Any, start: int, end: int, rows: int) -> Any:
    """Returns the rows from `start` to `end` of an answer, in the structure of the answer."""
    if isinstance(output, torch.Tensor):
        return output[start:end] if output.ndim and output.shape[0] == rows else output
    if isinstance(output, dict):  # diffusers' output classes are dicts whose constructors take keywords
        return type(output)(**{key: cut(value, start, end, rows) for key, value in output.items()})
    if isinstance(output, list) and len(output) == rows:
        return output[start:end]
    if isinstance(output, (list, tuple)):
        return type(output)(cut(value, start, end, rows) for value in output)
    return output


def _is_timestep(value: Any, rows: int) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 or (value.ndim == 1 and value.shape[0] in (1, rows))
    return isinstance(value, (int, float))


def _digest(tensor: torch.Tensor, digests: Digests) -> bytes:
    """Returns a hash of a tensor's values. It is cached until they change, because reading them from a GPU waits."""
    known = digests.get(id(tensor))
    if known is not None and known[1] == tensor._version:
        return known[2]
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.blake2b(values.numpy().tobytes(), digest_size=16).digest()
    while len(digests) >= _MAX_DIGESTS:
        del digests[next(iter(digests))]
    # A reference to the tensor is kept, so that its `id` cannot be reused.
    digests[id(tensor)] = (tensor, tensor._version, digest)
    return digest


def _by_value(value: Any) -> Hashable:
    """Returns a key that is equal for equal values; for unhashable values, only for the same object."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the tensor with zeros added along the second dimension."""
    if tensor.shape[1] == length:
        return tensor
    return torch.nn.functional.pad(tensor, (*(0, 0) * (tensor.ndim - 2), 0, length - tensor.shape[1]))


def _all_ones(embeddings: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(embeddings.shape[:2], dtype=dtype, device=embeddings.device)
