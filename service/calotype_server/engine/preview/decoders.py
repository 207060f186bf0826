"""Decoders for previews: each turns predicted x0 into images, several at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from calotype_server.engine.capabilities import decoder_name
from calotype_server.engine.preview.pipeline_tail import PipelineTail

if TYPE_CHECKING:
    import torch

    from calotype_server.engine.preview.head import PreviewHead

__all__ = ["Decoder", "HeadDecoder", "VaeDecoder"]


class Decoder(Protocol):
    """Decodes latents to images. Only one thread calls it."""

    def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """Returns images of any resolution, (batch, 3, rows, columns), 0 to 1, with the aspect ratio of the final one.

        Args:
            latents: Predicted x0 in the scheduler's sample space, any layout, batch first.
            width: Of the final image, in pixels.
            height: Of the final image, in pixels.
        """
        ...


class HeadDecoder:
    """Decodes with the fitted head, which can be replaced by a better one while in use."""

    def __init__(self, head: PreviewHead) -> None:
        self._head = head

    @property
    def head(self) -> PreviewHead:
        """The current head."""
        return self._head

    def replace(self, head: PreviewHead) -> None:
        """Uses another head from now on."""
        self._head = head

    def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """See `Decoder`."""
        return self._head.decode(latents, width, height)


class VaeDecoder:
    """Decodes with a VAE at the end of the pipeline's own call: the full one, or an `AutoencoderTiny` instead of it.

    Args:
        pipeline: Not changed.
        vae: The VAE; its `decode` must be safe to call while other threads decode.
    """

    def __init__(self, pipeline: Any, vae: Any) -> None:
        self._tail = PipelineTail(pipeline, **{decoder_name(pipeline): vae})

    def shape(self, width: int, height: int) -> tuple[int, ...]:
        """Returns the shape of the latents of an image of that size in pixels."""
        return self._tail.shape(width, height)

    def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """See `Decoder`."""
        return self._tail.decode(latents, width, height)
