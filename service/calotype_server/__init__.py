"""The Calotype server: drives a diffusers pipeline and streams what forms. `calotype serve` starts it."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("calotype")
