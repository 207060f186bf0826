"""The weights of Calotype's bundled model: plain diffusers folders without code."""

from pathlib import Path

__all__ = ["PATH", "TINY_VAE"]

PATH = Path(__file__).parent / "model"
"""The diffusers folder; load it with `DiffusionPipeline.from_pretrained(PATH)`."""

TINY_VAE = Path(__file__).parent / "tiny_vae"
"""A small, fast preview decoder that replaces the model's `vae`; load it with `AutoencoderTiny.from_pretrained`."""
