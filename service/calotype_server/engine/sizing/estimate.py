"""Estimates for the choices that an operator has: formats of the weights, and where they are kept.

A server needs its weights, the tensors of denoising or of decoding, and the memory that a GPU's libraries take for a
process. The weights are exact, apart from buffers: they come from the headers of the files. The rest is an
estimate; see `activations`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from calotype_server.engine.sizing.activations import decoding_bytes, denoising_bytes, native_edge

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from calotype_server.engine.sizing.files import Component

__all__ = ["Estimate", "estimates"]

_CONTEXT = 600 * 10**6
"""Bytes of a GPU that its libraries take for a process. On a CPU, the process has them already."""

_BLOCK = re.compile(r"\w+\.\d+\.")
"""Start of the name of a weight in a block that `--offload group` moves on its own."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The memory of the device that a server needs with one choice of settings, for one image at a time.

    Attributes:
        quantize: Value of `--quantize`; empty for none.
        offload: Value of `--offload`; empty for none.
        edge: Width and height of the image, in pixels.
        weights: Bytes of weights on the device when it needs most memory.
        working: Bytes of denoising or decoding then; None if one of them is unknown.
        total: All bytes that the device needs then.
        host: Bytes of weights that ordinary memory holds, because they move.
    """

    quantize: str
    offload: str
    edge: int
    weights: int
    working: int | None
    total: int
    host: int


class _Moment(NamedTuple):
    """The content of the device at one time: bytes of weights, and of other tensors."""

    weights: int
    working: int = 0


def estimates(
    components: Sequence[Component], device: torch.device, dtype: torch.dtype, edge: int | None = None
) -> Iterator[Estimate]:
    """Yields an estimate for each choice that there is for this device; the one without options first.

    Args:
        components: Of the model; see `find_components`.
        device: Where the model runs.
        dtype: Number format of weights and computations.
        edge: Width and height of an image in pixels; None for the model's default.
    """
    denoiser = next((each.config for each in components if each.is_denoiser), {})
    vae = next((each.config for each in components if each.name == "vae"), {})
    edge = edge or native_edge(denoiser, vae)
    known = bool(denoiser and vae)
    denoising = denoising_bytes(denoiser, vae, edge, dtype) if known else None
    decoding = decoding_bytes(vae, edge, dtype) if known else None
    has_memory = device.type in ("cuda", "xpu")
    formats = ["", "int8", "fp8", *(["nf4"] if has_memory else [])]
    for quantize in formats if any(each.quantizable for each in components) else [""]:
        whole = sum(each.bytes(dtype.itemsize, quantize) for each in components)
        for offload in ("", "model", "group") if has_memory else ("",):
            if (quantize, offload) == ("nf4", "group"):
                continue  # Rejected; see `loading.offload`.
            moments = _moments(components, dtype.itemsize, quantize, offload, denoising or 0, decoding or 0)
            most = max(moments, key=sum)
            yield Estimate(
                quantize,
                offload,
                edge,
                most.weights,
                None if denoising is None or decoding is None else most.working,
                sum(most) + (_CONTEXT if has_memory else 0),
                whole if offload else 0,
            )


def _moments(
    components: Sequence[Component], value_bytes: int, quantize: str, offload: str, denoising: int, decoding: int
) -> list[_Moment]:
    sizes = {each.name: each.bytes(value_bytes, quantize) for each in components}
    if not offload:
        whole = sum(sizes.values())
        return [_Moment(whole, denoising), _Moment(whole, decoding)]
    working = {
        each.name: denoising if each.is_denoiser else decoding if each.name == "vae" else 0 for each in components
    }
    if offload == "model":
        return [_Moment(sizes[name], working[name]) for name in sizes]
    moving = [each for each in components if each.is_denoiser or each.name.startswith("text_encoder")]
    staying = sum(sizes.values()) - sum(sizes[each.name] for each in moving)
    moments = [_Moment(staying, decoding)]
    for each in moving:
        parts = defaultdict[str, int](int)
        for tensor in each.tensors:
            block = _BLOCK.match(tensor.name) if each.is_denoiser else None
            # Layers of text encoders move one by one. Weights of a denoiser outside of its blocks stay for each call.
            key = block[0] if block else "" if each.is_denoiser else tensor.name
            parts[key] += each.tensor_bytes(tensor, value_bytes, quantize)
        outside = parts.pop("", 0)
        moments.append(_Moment(staying + outside + max(parts.values(), default=0), working[each.name]))
    return moments
