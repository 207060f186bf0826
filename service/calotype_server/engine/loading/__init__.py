"""Loading: from the operator's settings to a pipeline on a device."""

from calotype_server.engine.loading.devices import pick_device, pick_dtype
from calotype_server.engine.loading.options import LoadOptions
from calotype_server.engine.loading.pipelines import load_pipeline
from calotype_server.engine.loading.sources import BUNDLED, display_name, locate
from calotype_server.engine.loading.tiny_vae import load_tiny_vae

__all__ = [
    "BUNDLED",
    "LoadOptions",
    "display_name",
    "load_pipeline",
    "load_tiny_vae",
    "locate",
    "pick_device",
    "pick_dtype",
]
