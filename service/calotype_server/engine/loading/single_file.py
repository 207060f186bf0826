"""Loads a pipeline from a single file: all of its weights, or only those of the denoiser."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import huggingface_hub
from diffusers.loaders.single_file_utils import SingleFileComponentError

from calotype_server.engine.capabilities.components import DECODERS, DENOISERS
from calotype_server.engine.loading.checks.damage import damage, files_of
from calotype_server.engine.loading.checks.supported import check_class
from calotype_server.engine.loading.explain import explain, is_unreachable
from calotype_server.engine.loading.index import PipelineIndex
from calotype_server.engine.loading.kinds import PIPELINES, has_only_denoiser, recognised_kind, usual_source
from calotype_server.engine.loading.overrides import load_component, load_weights, replaced_components
from calotype_server.engine.loading.shapes import read_shapes
from calotype_server.engine.loading.sources import is_path
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from calotype_server.engine.loading.options import LoadOptions

__all__ = ["load_single_file"]

_CONFIGS = ["**/*.json", "*.json", "**/*.txt", "*.txt", "**/*.model", "*.model", "**/*.jinja", "*.jinja"]
"""Files of a model on the hub that are not weights."""


def load_single_file(file: Path, options: LoadOptions) -> Any:
    """Loads a pipeline from a .safetensors or .gguf file.

    The classes, configs and tokenizers come from `options.config`, or else from the hub's model on which this kind of
    file is based. Components that a file with only a denoiser lacks come from there too.

    Raises:
        ModelUnavailable: The file is damaged, unknown, incomplete, or not text-to-image; or the configs are missing.
        Exception: Any kind that diffusers raises; `explain` knows them.
    """
    shapes = read_shapes(file)
    kind = recognised_kind(file, shapes)
    source = _config_source(file, kind, options)
    index = _read_index(file, source, options)
    pipeline_class = index.pipeline_class()
    check_class(str(file), pipeline_class)
    if kind is not None and options.config is not None:
        _check_same_family(file, kind, pipeline_class)
    replaced = replaced_components(index, options)
    if file.suffix == ".gguf" or has_only_denoiser(shapes) or not hasattr(pipeline_class, "from_single_file"):
        return _load_denoiser(file, index, options, replaced)
    return _load_checkpoint(file, index, options, replaced)


def _load_checkpoint(file: Path, index: PipelineIndex, options: LoadOptions, replaced: dict[str, Any]) -> Any:
    """Loads all components that the file has, and the others from the source of the configs."""
    kind, configs = index.pipeline_class(), _config_folder(index.source, options)
    while True:
        try:
            return kind.from_single_file(
                str(file), config=configs, dtype=options.dtype, local_files_only=True, **replaced
            )
        except SingleFileComponentError as error:
            absent = next((name for name in index.components() if f"\n{name} = " in str(error)), None)
            if absent is None or absent in replaced:
                raise
            replaced |= {absent: _absent_component(file, absent, index, options)}
        except NotImplementedError as error:
            # Weights that are not in the file have no memory, and cannot be converted.
            raise ModelUnavailable(
                f"{str(file)!r} lacks some weights of a {kind.__name__}. Is it complete, and do the configs fit it?"
            ) from error


def _absent_component(file: Path, name: str, index: PipelineIndex, options: LoadOptions) -> Any:
    try:
        return load_component(name, index.component_class(name), index.source, options, revision=options.revision)
    except Exception as error:
        option = "--vae PATH" if name in DECODERS else f"--text-encoder {name}=PATH"
        raise ModelUnavailable(
            f"{str(file)!r} has no weights of {name}, and {str(index.source)!r} has none either. Name other weights "
            f"with {option}, or a complete folder with --config."
        ) from error


def _config_source(file: Path, kind: str | None, options: LoadOptions) -> Path | str:
    """Returns the folder or hub id with the configs."""
    if options.config is None:
        if kind is None:
            raise ModelUnavailable(
                f"The kind of model in {str(file)!r} is not recognised. Name a folder or hub id with the configs and "
                "tokenizers of its pipeline: --config."
            )
        return usual_source(kind)
    if not is_path(options.config):
        return options.config
    folder = Path(options.config).expanduser()
    if not (folder / "model_index.json").is_file():
        raise ModelUnavailable(f"--config {options.config!r} is not a diffusers folder: it has no model_index.json.")
    return folder


def _read_index(file: Path, source: Path | str, options: LoadOptions) -> PipelineIndex:
    """Reads the index, and explains which configs are missing if there is no network."""
    try:
        return PipelineIndex.read(source, options)
    except Exception as error:
        if isinstance(source, Path) or not is_unreachable(error):
            raise ModelUnavailable(explain(str(source), source, error)) from error
        raise ModelUnavailable(
            f"{str(file)!r} needs the configs and tokenizers of {source!r}, which are not in the local cache and "
            "cannot be downloaded now. Copy them to this machine and name their folder with --config. It needs "
            "model_index.json, and for each component the folder with its JSON and tokenizer files."
        ) from error


def _config_folder(source: Path | str, options: LoadOptions) -> str:
    """Returns a folder with the configs and tokenizers. `from_single_file` would download them even if forbidden."""
    if isinstance(source, Path):
        return str(source)
    return huggingface_hub.snapshot_download(
        source, revision=options.revision, allow_patterns=_CONFIGS, local_files_only=not options.download
    )


def _load_denoiser(file: Path, index: PipelineIndex, options: LoadOptions, replaced: dict[str, Any]) -> Any:
    name = next((each for each in DENOISERS if each in index.components()), None)
    kind = None if name is None else index.component_class(name)
    if name is None or not hasattr(kind, "from_single_file"):
        raise ModelUnavailable(
            f"diffusers cannot read single files of {'this pipeline' if kind is None else kind.__name__}; use a folder."
        )
    quantization = {}
    if file.suffix == ".gguf":
        if name != "transformer":
            raise ModelUnavailable(f"{str(file)!r} cannot be loaded: GGUF files work for transformers, not for UNets.")
        quantization["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=options.dtype)
    configs = _config_folder(index.source, options)
    denoiser = load_weights(name, kind, file, configs, options, **quantization)
    given = {**replaced, name: denoiser}
    try:
        return diffusers.DiffusionPipeline.from_pretrained(
            index.source, **options.pretrained_arguments(index.source), **given
        )
    except Exception as error:
        problem = damage(index, files_of(index.source, options) or (), options.variant, given=given)
        if problem is None:
            raise
        raise ModelUnavailable(
            f"{str(file)!r} has only the {name}; the other components come from {str(index.source)!r}, where some are "
            f"missing. {problem}."
        ) from error


def _check_same_family(file: Path, kind: str, pipeline_class: Any) -> None:
    """Rejects configs of another family, with which the weights would not fit."""
    usual = getattr(diffusers, PIPELINES[kind])
    if _parts(usual) != _parts(pipeline_class):
        raise ModelUnavailable(
            f"{str(file)!r} has a model of the kind {kind!r}, a {usual.__name__}, but --config has the configs of a "
            f"{pipeline_class.__name__}."
        )


def _parts(kind: Any) -> set[str]:
    parameters = inspect.signature(kind.__init__).parameters
    return {name for name in parameters if name.startswith((*DENOISERS, "text_encoder"))}
