"""Reads a pipeline's index, `model_index.json`: its class, and the class of each component."""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import diffusers
import huggingface_hub
import transformers

from calotype_server.engine.loading.checks.packages import needs_packages, unavailable_backends
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calotype_server.engine.loading.options import LoadOptions

__all__ = ["PipelineIndex", "read_json"]

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


@dataclass(frozen=True, slots=True)
class PipelineIndex:
    """The index of a folder or of a model on the hub.

    Attributes:
        source: The folder or the hub id.
        values: The content of `model_index.json`.
    """

    source: Path | str
    values: Mapping[str, Any]

    @classmethod
    def read(cls, source: Path | str, options: LoadOptions) -> Self:
        """Reads the index, from the hub if necessary.

        Raises:
            ValueError: The index is damaged.
            Exception: Any kind that the hub's library raises; `explain` knows them.
        """
        return cls(source, read_json(source, "model_index.json", options, revision=options.revision))

    def components(self) -> dict[str, tuple[str, str]]:
        """Returns the library and the class of each component that the pipeline has."""
        return {
            name: (value[0], value[1])
            for name, value in self.values.items()
            # Other lists are settings of the pipeline.
            if not name.startswith("_") and isinstance(value, list) and [type(each) for each in value] == [str, str]
        }

    def pipeline_class(self) -> Any:
        """Returns the class of the pipeline.

        Raises:
            ModelUnavailable: It is code of the model, unknown, or needs a package that is not installed.
        """
        name = self.values.get("_class_name")
        if isinstance(name, list | tuple):
            raise self._custom(f"its pipeline, {name[-1]}")
        return self._known(diffusers, "diffusers", str(name), "pipeline")

    def component_class(self, component: str) -> Any:
        """Returns the class of a component; see `pipeline_class`."""
        library, name = self.components()[component]
        module = _LIBRARIES.get(library) or getattr(diffusers.pipelines, library, None)
        if module is None:
            raise self._custom(f"its {component}, {name}")
        return self._known(module, library if library in _LIBRARIES else "diffusers", name, component)

    def check_components(self, kind: Any) -> None:
        """Looks up the classes of all components that a pipeline class takes.

        Raises:
            ModelUnavailable: See `pipeline_class`.
        """
        for component in self.components().keys() & inspect.signature(kind.__init__).parameters.keys():
            self.component_class(component)

    def _known(self, module: Any, library: str, name: str, part: str) -> Any:
        kind = getattr(module, name, None)
        if kind is None and library == "transformers":
            # Indexes name classes of older versions, such as CLIPFeatureExtractor.
            kind = getattr(module, str(_renamed(name)), None)
        if kind is None:
            saved = self.values.get("_diffusers_version")
            version = f" The model was saved by diffusers {saved}." if saved else ""
            raise ModelUnavailable(
                f"{str(self.source)!r} names {name} as its {part}, which {library} {_version(library)} does not have."
                f"{version} Try a newer version: pip install -U {library}"
            )
        missing = unavailable_backends(kind)
        if missing:
            raise ModelUnavailable(needs_packages(f"{str(self.source)!r} is a model whose {part}, {name},", missing))
        return kind

    def _custom(self, part: str) -> ModelUnavailable:
        return ModelUnavailable(
            f"{str(self.source)!r} brings its own code for {part}. Calotype never runs code that comes with a model; "
            "use a copy of the model whose classes are part of diffusers or transformers."
        )


def read_json(source: Path | str, name: str, options: LoadOptions, *, revision: str | None = None) -> dict[str, Any]:
    """Returns the content of a JSON file of a model, from the hub if necessary.

    Args:
        source: The folder or hub id.
        name: Path of the file below the folder.
        options: The operator's options.
        revision: Branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: The folder has no such file.
        ValueError: The file is damaged.
        Exception: Any kind that the hub's library raises.
    """
    file: str | Path
    if isinstance(source, Path):
        file = source / name
    else:
        file = huggingface_hub.hf_hub_download(source, name, revision=revision, local_files_only=not options.download)
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} is not a JSON object")
    return values


def _renamed(name: str) -> str | None:
    from diffusers.pipelines.pipeline_loading_utils import _maybe_remap_transformers_class

    return _maybe_remap_transformers_class(name)


def _version(library: str) -> str:
    return str(importlib.import_module(library).__version__)
