"""The weights of Calotype's bundled model, as data: ordinary diffusers folders and nothing else."""

from pathlib import Path

__all__ = ["PATH", "TINY_VAE"]

PATH = Path(__file__).parent / "model"
"""The diffusers folder; load it with `DiffusionPipeline.from_pretrained(PATH)`."""

TINY_VAE = Path(__file__).parent / "tiny_vae"
"""A small, fast decoder for previews, in place of the model's `vae`; load it with `AutoencoderTiny.from_pretrained`."""
