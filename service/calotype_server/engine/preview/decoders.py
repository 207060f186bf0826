"""What draws previews: each decoder turns predicted x0 into pictures, several at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from calotype_server.engine.preview.pipeline_tail import PipelineTail

if TYPE_CHECKING:
    import torch

    from calotype_server.engine.preview.head import PreviewHead

__all__ = ["Decoder", "HeadDecoder", "VaeDecoder"]


class Decoder(Protocol):
    """Draws pictures from latents. Called by one thread only."""

    def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """Returns pictures of any size, (batch, 3, rows, columns) from 0 to 1, of the shape asked for.

        Args:
            latents: Predicted x0 in the scheduler's sample space, any layout, batch first.
            width: Of the final image, in pixels.
            height: Of the final image, in pixels.
        """
        ...


class HeadDecoder:
    """The fitted head, which can be exchanged for a better one while in use."""

    def __init__(self, head: PreviewHead) -> None:
        self.head = head

    def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """See `Decoder`."""
        return self.head.decode(latents, width, height)


class VaeDecoder:
    """A VAE at the end of the pipeline's own call: the full one, or an `AutoencoderTiny` in its place.

    Args:
        pipeline: Not changed.
        vae: What decodes; safe to be called while others decode.
    """

    def __init__(self, pipeline: Any, vae: Any) -> None:
        self._tail = PipelineTail(pipeline, vae=vae)

    def shape(self, width: int, height: int) -> tuple[int, ...]:
        """Returns the shape of the latents of a picture of that size in pixels."""
        return self._tail.shape(width, height)

    def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """See `Decoder`."""
        return self._tail.decode(latents, width, height)
