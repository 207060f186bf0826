"""Capabilities of a loaded pipeline, read from the pipeline itself."""

from calotype_server.engine.capabilities.components import denoiser_name, tokenizers
from calotype_server.engine.capabilities.defaults import Defaults, read_defaults
from calotype_server.engine.capabilities.guidance import read_guidance
from calotype_server.engine.capabilities.model_info import describe

__all__ = ["Defaults", "denoiser_name", "describe", "read_defaults", "read_guidance", "tokenizers"]
