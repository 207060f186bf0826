"""Finds the model that the operator names: `bundled`, a folder, a single file or a hub id."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from calotype_server.engine.loading.checks.pickles import refuse_pickle
from calotype_server.errors import ModelUnavailable

__all__ = ["BUNDLED", "SINGLE_FILES", "display_name", "is_hub_id", "is_path", "locate"]

BUNDLED = "bundled"

SINGLE_FILES = frozenset({".gguf", ".safetensors"})
"""Suffixes of single files with the weights of a model, in lower case: diffusers unpickles files with any other."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def display_name(model: str) -> str:
    """Returns the name that callers see: of a folder or file its name without path and suffix, else the setting."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.is_file() else model


def is_path(name: str) -> bool:
    """Returns whether a name is a path of this machine and not a hub id."""
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~"))


def is_hub_id(name: str) -> bool:
    """Returns whether a name has the form of a hub id, org/name."""
    return _HUB_ID.fullmatch(name) is not None


def locate(model: str) -> Path | str:
    """Returns the folder of a local or bundled model, its single file, or the unchanged hub id.

    Raises:
        ModelUnavailable: It is neither, or a file that is not read because it can run code.
    """
    if model == BUNDLED:
        if importlib.util.find_spec("calotype_bundled_model") is None:
            raise ModelUnavailable("The bundled model is not installed: pip install calotype-bundled-model")
        from calotype_bundled_model import PATH

        return Path(PATH)
    path = Path(model).expanduser()
    if is_path(model):
        return _local(model, path)
    if path.suffix in SINGLE_FILES and model.count("/") != 1:
        raise ModelUnavailable(f"There is no file {model!r}.")
    if not is_hub_id(model):
        raise ModelUnavailable(f"{model!r} is neither a folder nor a file nor a hub id (org/name) nor {BUNDLED!r}.")
    return model


def _local(model: str, path: Path) -> Path:
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelUnavailable(f"{model!r} is not a diffusers folder: it has no model_index.json.")
        return path
    refuse_pickle(model)
    suffix = path.suffix
    if not path.exists():
        raise ModelUnavailable(f"There is no {'file' if suffix in SINGLE_FILES else 'folder'} {model!r}.")
    if suffix not in SINGLE_FILES:
        raise ModelUnavailable(f"{model!r} is not a model: single files end in .safetensors or .gguf.")
    return path
