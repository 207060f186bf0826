"""The weights of Calotype's bundled model, as data: an ordinary diffusers folder and nothing else."""

from pathlib import Path

__all__ = ["PATH"]

PATH = Path(__file__).parent / "model"
"""The diffusers folder; load it with `DiffusionPipeline.from_pretrained(PATH)`."""
