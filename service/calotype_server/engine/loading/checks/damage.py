"""Finds out, from the names of its files, why a folder or a model on the hub cannot be loaded."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch

from calotype_server.engine.loading.checks.pickles import PICKLES
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Collection

    from calotype_server.engine.loading.index import PipelineIndex
    from calotype_server.engine.loading.options import LoadOptions

__all__ = ["damage", "files_of"]

_WEIGHTS = re.compile(r"(?P<base>[\w-]+?)(?:\.(?P<variant>[\w-]+?))?(?:-(?P<part>\d+)-of-(?P<parts>\d+))?\.safetensors")
"""Names such as `model.safetensors`, `model.fp16.safetensors` and `model.fp16-00001-of-00002.safetensors`."""


def files_of(source: Path | str, options: LoadOptions) -> list[str] | None:
    """Returns the paths of a model's files below its folder, with slashes, or None if they cannot be listed."""
    if isinstance(source, Path):
        return [file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()]
    if not options.download:
        return None
    try:
        return huggingface_hub.list_repo_files(source, revision=options.revision)
    except Exception:  # The reason that loading failed with is the better one.
        return None


def damage(
    index: PipelineIndex, files: Collection[str], variant: str | None, *, given: Collection[str] = ()
) -> str | None:
    """Returns the problem of a model's files and its remedy, as a sentence for operators, or None if none is found.

    Args:
        index: The model's index.
        files: Paths of all files below its folder.
        variant: The variant of the weights that the operator asked for.
        given: Components that come from elsewhere.
    """
    absent = _missing_variant(files, variant)
    if absent is not None:
        return absent
    for component in (name for name in index.components() if name not in given):
        own = {PurePosixPath(file).name for file in files if PurePosixPath(file).parts[:-1] == (component,)}
        try:
            kind = index.component_class(component)
        except ModelUnavailable:
            continue
        found = _damage(component, own, _has_weights(kind), variant)
        if found is not None:
            return found
    return None


def _damage(component: str, own: set[str], has_weights: bool, variant: str | None) -> str | None:
    if component == "safety_checker" and not own:
        return (
            "It lists a safety checker, but has no files of it. Add the folder safety_checker, or start with "
            "--no-safety-checker; images are then not checked"
        )
    if not own:
        return f"It has no files of the {component}, which model_index.json lists"
    if not has_weights:
        return None
    if "config.json" not in own:
        return f"{component} has no config.json"
    weights = [match for match in map(_WEIGHTS.fullmatch, sorted(own)) if match is not None]
    if not weights:
        pickled = sorted(name for name in own if PurePosixPath(name).suffix in PICKLES)
        if pickled:
            return (
                f"{component} has its weights only as {pickled[0]}, a pickle, which can run code when it is read. Load "
                "the model with diffusers on a machine that may run such code, and save it with save_pretrained"
            )
        return f"{component} has no weights as .safetensors"
    variants = sorted({match["variant"] or "" for match in weights})
    if variant is None and "" not in variants:
        return f"Only the {variants[0]} variant of {component} exists: add --variant {variants[0]}"
    chosen = variant if variant in variants else ""
    parts = [match for match in weights if (match["variant"] or "") == chosen and match["parts"]]
    absent = int(parts[0]["parts"]) - len(parts) if parts else 0
    if absent > 0:
        return f"{component} lacks {absent} of its {parts[0]['parts']} files of weights"
    return None


def _missing_variant(files: Collection[str], variant: str | None) -> str | None:
    matches = (_WEIGHTS.fullmatch(PurePosixPath(file).name) for file in files)
    variants = sorted({match["variant"] or "" for match in matches if match is not None})
    if variant is None or not variants or variant in variants:
        return None
    others = [name for name in variants if name]
    advice = f"it has {', '.join(others)}" if others else "leave --variant out"
    return f"It has no weights of the variant {variant}: {advice}"


def _has_weights(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.nn.Module)
