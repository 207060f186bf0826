"""Finds out which Python packages a model needs that are not installed."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

import diffusers
import transformers

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["needs_packages", "package_missing_in", "unavailable_backends"]

_PACKAGES = {
    "accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python",
    "ftfy": "ftfy",
    "gguf": "gguf",
    "google.protobuf": "protobuf",
    "imwatermark": "invisible-watermark",
    "peft": "peft",
    "scipy": "scipy",
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
    "torchao": "torchao",
    "torchsde": "torchsde",
    "torchvision": "torchvision",
}
"""Packages that diffusers and transformers need for some models, by the module that they import."""

_BACKENDS = {
    "bs4": "beautifulsoup4",
    "invisible_watermark": "invisible-watermark",
    "note_seq": "note-seq",
    "onnx": "onnxruntime",
    "opencv": "opencv-python",
    "quanto": "optimum-quanto",
    "vision": "pillow",
}
"""Packages of the libraries' backends that have another name than the backend."""


def needs_packages(subject: str, packages: Iterable[str]) -> str:
    """Returns a message for operators: the packages that a model needs, and the command that installs them."""
    names = sorted(packages)
    noun = "the package" if len(names) == 1 else "the packages"
    return f"{subject} needs {noun} {', '.join(names)}, not installed here: pip install {' '.join(names)}"


def unavailable_backends(kind: Any) -> list[str]:
    """Returns the packages that a class of diffusers or transformers needs and that are not installed.

    A class without its packages is replaced by a placeholder that lists them.
    """
    if type(kind).__name__ != "DummyObject":
        return []
    names = kind._backends
    known = {
        **transformers.utils.import_utils.BACKENDS_MAPPING,
        **diffusers.utils.import_utils.BACKENDS_MAPPING,
    }
    missing = [name for name in names if name not in known or not known[name][0]()]
    return [_BACKENDS.get(name, name) for name in missing or names]


def package_missing_in(chain: Iterable[BaseException]) -> str | None:
    """Returns the package without which an error happened, or None.

    Args:
        chain: The error and its causes.
    """
    for error in chain:
        if isinstance(error, ModuleNotFoundError | NameError) and error.name:
            # Pipelines use `ftfy` without importing it where it is not installed.
            module = next((each for each in _PACKAGES if f"{error.name}.".startswith(f"{each}.")), None)
            if module is not None and not _is_importable(module):
                return _PACKAGES[module]
            if isinstance(error, ModuleNotFoundError) and not _is_importable(error.name):
                return error.name.partition(".")[0]
        if isinstance(error, ImportError | ValueError):
            for module, package in _PACKAGES.items():
                names = "|".join(re.escape(each) for each in {module, package})
                if re.search(rf"\b({names})\b", str(error), re.IGNORECASE) and not _is_importable(module):
                    return package
    return None


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
