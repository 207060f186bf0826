"""The final image as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from calotype_server.engine.generation_run import to_pixels
from calotype_server.errors import NumericalFailure

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def some_image(dtype: torch.dtype, width: int = 40, height: int = 24) -> torch.Tensor:
    """Returns an image with values below 0, above 1 and exactly between two levels."""
    image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 1.4 - 0.2
    image[0, :, 0] = (torch.arange(3 * width).reshape(3, width) + 0.5) / 255
    return image.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_are_those_of_diffusers(dtype: torch.dtype) -> None:
    """The pixels of the first image are the same bit for bit as in the PIL image that diffusers returns."""
    images = some_image(dtype)
    before = images.clone()
    pixels = to_pixels(images)
    expected = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images[:1].clamp(0, 1)))[0]
    assert (pixels.width, pixels.height) == expected.size == (40, 24)
    assert pixels.data == expected.tobytes()
    assert torch.equal(images, before)


@given(st.integers(0, 3 * 5 * 7 - 1), st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_invalid_numbers_anywhere_fail(place: int, value: float) -> None:
    """A single NaN or infinity ends the generation with a typed error; large numbers do not."""
    images = torch.full((1, 3, 5, 7), 1e30)
    assert set(to_pixels(images).data) == {255}
    images.view(-1)[place] = value
    with pytest.raises(NumericalFailure):
        to_pixels(images)


class Operations(TorchDispatchMode):
    """Records the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_before_the_copy() -> None:
    """No operation reads a value from the device, and the last one makes the bytes that leave it."""
    with Operations() as operations:
        to_pixels(some_image(torch.float32))
    assert not [name for name in operations.names if "_local_scalar_dense" in name or "nonzero" in name]
    assert [name for name in operations.names if name != "aten.detach.default"][-1] == "aten.cat.default"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_gives_the_same_bytes(dtype: torch.dtype) -> None:
    """Conversion on the device rounds as on the CPU, and finds NaN."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    images = some_image(dtype)
    assert to_pixels(images.cuda()) == to_pixels(images)
    images[0, 1, 2, 3] = np.nan
    with pytest.raises(NumericalFailure):
        to_pixels(images.cuda())
