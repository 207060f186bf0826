"""Loads components that replace those of the model: `--vae` and `--text-encoder`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file

from calotype_server.engine.capabilities.components import DECODERS
from calotype_server.engine.loading.checks.pickles import refuse_pickle
from calotype_server.engine.loading.explain import explain_hub, first_line
from calotype_server.engine.loading.index import read_json
from calotype_server.engine.loading.sources import is_path
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from calotype_server.engine.loading.index import PipelineIndex
    from calotype_server.engine.loading.options import LoadOptions

__all__ = ["load_component", "load_weights", "replaced_components"]


def replaced_components(index: PipelineIndex, options: LoadOptions) -> dict[str, Any]:
    """Returns the components that the operator loads from elsewhere, by name.

    Args:
        index: The index of the pipeline; it says which classes the components have.
        options: The operator's options.

    Raises:
        ModelUnavailable: The pipeline has no such component, or it cannot be loaded.
    """
    wanted = dict(options.text_encoders)
    if options.vae is not None:
        wanted[next((name for name in DECODERS if name in index.components()), "vae")] = options.vae
    return {name: _load(index, name, source, options) for name, source in wanted.items()}


def load_component(
    name: str, kind: Any, source: Path | str, options: LoadOptions, *, revision: str | None = None
) -> Any:
    """Loads a component from its own folder or hub id, or from that of a whole pipeline.

    Args:
        name: The component, such as "vae".
        kind: Its class. If it is one of diffusers, its config may name another.
        source: The folder or hub id.
        options: The operator's options.
        revision: Branch, tag or commit of a hub id.
    """
    arguments = options.pretrained_arguments(source) | {"revision": None if isinstance(source, Path) else revision}
    del arguments["trust_remote_code"]
    try:
        config = read_json(source, f"{name}/config.json", options, revision=revision)
        arguments["subfolder"] = name
    except (FileNotFoundError, EntryNotFoundError):
        config = read_json(source, "config.json", options, revision=revision)
    if issubclass(kind, diffusers.ModelMixin):
        # A decoder of another class is welcome if it decodes the same latents, such as an `AutoencoderTiny`.
        kind = getattr(diffusers, str(config.get("_class_name")), kind)
        return kind.from_pretrained(source, **arguments)
    return _checked(kind, source, **arguments)


def _checked(kind: Any, source: Path | str | None, **arguments: Any) -> Any:
    """Loads a component of transformers, which fills weights that it does not find with random numbers."""
    component, report = kind.from_pretrained(source, **arguments, output_loading_info=True)
    absent = sorted(report["missing_keys"])
    if absent:
        raise ModelUnavailable(
            f"The weights are not those of a {kind.__name__}: there are none for {absent[0]}. Name others."
        )
    return component


def load_weights(name: str, kind: Any, file: Path, configs: Path | str, options: LoadOptions, **others: Any) -> Any:
    """Loads a component of diffusers from a single file.

    Args:
        name: The component, such as "vae".
        kind: Its class.
        file: The file.
        configs: The folder or hub id with its config.
        options: The operator's options.
        others: More arguments of `from_single_file`.

    Raises:
        ModelUnavailable: The file lacks some weights, which would be random.
    """
    lacking = f"{str(file)!r} lacks some weights of a {kind.__name__}"
    try:
        component = kind.from_single_file(
            str(file),
            config=str(configs),
            subfolder=name,
            dtype=options.dtype,
            local_files_only=isinstance(configs, Path) or not options.download,
            **others,
        )
    except NotImplementedError as error:
        # Weights that are not in the file have no memory, and cannot be converted.
        raise ModelUnavailable(f"{lacking}. Is it made for this model?") from error
    absent = [weight for weight, value in component.state_dict().items() if value.is_meta]
    if absent:
        raise ModelUnavailable(f"{lacking}, such as {absent[0]}. Is it made for this model?")
    return component


def _load(index: PipelineIndex, name: str, source: str, options: LoadOptions) -> Any:
    option = "--vae" if name in DECODERS else "--text-encoder"
    if name not in index.components():
        others = [each for each in index.components() if each.startswith("text_encoder")]
        raise ModelUnavailable(
            f"{option}: the model has no component {name!r}. Its text encoders: {', '.join(others) or 'none'}."
        )
    kind = index.component_class(name)
    path = Path(source).expanduser()
    local = is_path(source)
    if local and not path.is_dir():
        refuse_pickle(source)
        if not path.is_file():
            raise ModelUnavailable(f"{option}: there is no file or folder {source!r}.")
        if path.suffix != ".safetensors":
            raise ModelUnavailable(f"{option} {source!r} is neither a folder, a hub id nor a .safetensors file.")
    try:
        if local and path.is_file():
            return _load_file(index, name, kind, path, options)
        return load_component(name, kind, path if local else source, options)
    except ModelUnavailable as error:
        raise ModelUnavailable(f"{option} {source!r} cannot be used. {error}") from error
    except Exception as error:
        message = None if local else explain_hub(source, error)
        if message is not None:
            raise ModelUnavailable(f"{option} {source!r} cannot be used. {message}") from error
        raise ModelUnavailable(
            f"{option} {source!r} cannot be used for the model's {kind.__name__} ({first_line(error)})."
        ) from error


def _load_file(index: PipelineIndex, name: str, kind: Any, file: Path, options: LoadOptions) -> Any:
    """Loads a component from its weights; the config is that of the model's own component."""
    if hasattr(kind, "from_single_file"):
        return load_weights(name, kind, file, index.source, options)
    config = kind.config_class.from_pretrained(
        index.source, subfolder=name, local_files_only=isinstance(index.source, Path) or not options.download
    )
    return _checked(kind, None, config=config, state_dict=load_file(file), dtype=options.dtype)
