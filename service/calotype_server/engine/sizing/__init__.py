"""Estimates the memory that a model needs from its files, without loading its weights."""

from calotype_server.engine.sizing.estimate import Estimate, estimates
from calotype_server.engine.sizing.files import Component, find_components, find_source

__all__ = ["Component", "Estimate", "estimates", "find_components", "find_source"]
