"""Capabilities of a loaded pipeline, read from the pipeline itself."""

from calotype_server.engine.capabilities.components import decoder, decoder_name, denoiser_name, tokenizers
from calotype_server.engine.capabilities.defaults import Defaults, read_defaults
from calotype_server.engine.capabilities.guidance import read_guidance
from calotype_server.engine.capabilities.model_info import describe
from calotype_server.engine.capabilities.weights import moves_layers

__all__ = [
    "Defaults",
    "decoder",
    "decoder_name",
    "denoiser_name",
    "describe",
    "moves_layers",
    "read_defaults",
    "read_guidance",
    "tokenizers",
]
