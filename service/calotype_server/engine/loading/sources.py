"""Finds the model that the operator names: `bundled`, a local diffusers folder or a hub id."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from calotype_server.errors import ModelUnavailable

__all__ = ["BUNDLED", "display_name", "locate"]

BUNDLED = "bundled"


def display_name(model: str) -> str:
    """Returns the name that callers see: a folder's name without its path, otherwise the operator's setting."""
    return Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model


def locate(model: str) -> Path | str:
    """Returns the folder of a local or bundled model, or the unchanged hub id.

    Raises:
        ModelUnavailable: It is neither.
    """
    if model == BUNDLED:
        if importlib.util.find_spec("calotype_bundled_model") is None:
            raise ModelUnavailable("The bundled model is not installed: pip install calotype-bundled-model")
        from calotype_bundled_model import PATH

        return Path(PATH)
    path = Path(model).expanduser()
    if path.exists() or model.startswith((".", "/", "~")):
        if not path.is_dir():
            raise ModelUnavailable(f"There is no folder {model!r}.")
        if not (path / "model_index.json").is_file():
            raise ModelUnavailable(f"{model!r} is not a diffusers folder: it has no model_index.json.")
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ModelUnavailable(f"{model!r} is neither a folder nor a hub id (org/name) nor {BUNDLED!r}.")
    return model
