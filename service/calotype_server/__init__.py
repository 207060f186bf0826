"""The Calotype server: runs a diffusers pipeline and streams its previews and images. `calotype serve` starts it."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("calotype")
