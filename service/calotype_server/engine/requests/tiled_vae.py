"""Decodes an image in tiles if memory runs out, so that its denoising was not for nothing."""

from __future__ import annotations

import contextlib
import traceback
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import structlog

from calotype_server.engine.memory import is_out_of_memory, release_cached_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

__all__ = ["TilingVae", "when_tiled"]

_log = structlog.get_logger(__name__)

_SMALLEST_TILE = 4
"""Latents along an edge of a tile, and the factor of all edges: a quarter of a tile overlaps the next one."""

_TILE_SETTINGS = (
    "use_tiling",
    *(f"tile_{space}_min_{edge}" for space in ("sample", "latent") for edge in ("size", "height", "width")),
    *(f"tile_sample_stride_{edge}" for edge in ("height", "width")),
)
"""The names of diffusers' settings, of which each VAE has some."""

_listener: ContextVar[Callable[[], None] | None] = ContextVar("calotype_when_tiled", default=None)


@contextlib.contextmanager
def when_tiled(listener: Callable[[], None]) -> Iterator[None]:
    """Opens a block in which the thread calls `listener` after it decoded an image in tiles."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class TilingVae:
    """Looks like a VAE, but decodes in tiles when memory runs out. Tiles overlap; the pixels differ slightly.

    Args:
        vae: The VAE. Its settings for tiles change during a call, so only one thread at a time may use it.
    """

    def __init__(self, vae: Any) -> None:
        self.__dict__["_vae"] = vae

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the VAE."""
        return self._vae(*args, **kwargs)

    def decode(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Decodes latents, with two last dimensions for rows and columns; in tiles if memory runs out.

        Raises:
            RuntimeError: Memory ran out again, or the VAE has no tiles.
        """
        try:
            return self._vae.decode(latents, *args, **kwargs)
        except Exception as error:
            edge = _tile_edge(self._vae, latents)
            if edge is None or not is_out_of_memory(error):
                raise
            # The frames keep intermediate results alive, which the next try needs the memory of.
            traceback.clear_frames(error.__traceback__)
        if hasattr(self._vae, "clear_cache"):
            self._vae.clear_cache()  # The failed call may have left features there.
        release_cached_memory(latents.device)
        with _tiles(self._vae, edge):
            decoded = self._vae.decode(latents, *args, **kwargs)
        _log.warning("memory ran out; the image was decoded in tiles", tile_edge=edge, latents=tuple(latents.shape))
        if listener := _listener.get():
            listener()
        return decoded

    @property  # type: ignore[misc]  # typeshed gives it a setter
    def __class__(self) -> Any:
        """The class of the VAE, so that type checks of a pipeline succeed."""
        return self._vae.__class__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._vae, name, value)


def _tile_edge(vae: Any, latents: torch.Tensor) -> int | None:
    """Returns the edge of square tiles, in latents: half of the image's longer edge. None if there are no tiles."""
    edge = max(latents.shape[-2:]) // 2 // _SMALLEST_TILE * _SMALLEST_TILE
    return edge if edge >= _SMALLEST_TILE and hasattr(vae, "use_tiling") else None


@contextlib.contextmanager
def _tiles(vae: Any, edge: int) -> Iterator[None]:
    """Opens a block in which a VAE decodes in tiles of at most `edge` latents. Its own tiles may be smaller.

    At the default size of a model its own tiles are often as large as the image, so that they would not save anything.
    """
    before = {name: getattr(vae, name) for name in _TILE_SETTINGS if hasattr(vae, name)}
    pixels = edge * _pixels_per_latent(vae, before)
    changed: dict[str, Any] = {"use_tiling": True}
    if _first(before.get("tile_latent_min_size", 0)) > edge:
        changed |= {"tile_latent_min_size": edge, "tile_sample_min_size": pixels}
    for side in ("height", "width"):
        if _first(before.get(f"tile_sample_min_{side}", 0)) > pixels:
            changed |= {
                f"tile_sample_min_{side}": pixels,
                f"tile_latent_min_{side}": edge,
                f"tile_sample_stride_{side}": pixels * 3 // 4,
            }
    try:
        for name in before.keys() & changed.keys():
            setattr(vae, name, changed[name])
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def _pixels_per_latent(vae: Any, settings: dict[str, Any]) -> int:
    ratio = getattr(vae, "spatial_compression_ratio", None)
    if ratio is None:
        ratio = _first(settings.get("tile_sample_min_size", 8)) / max(1, settings.get("tile_latent_min_size", 1))
    return round(ratio)


def _first(value: Any) -> int:
    """A size that some configurations give for both edges."""
    return int(value[0] if isinstance(value, (list, tuple)) else value)
