"""Options of loading a model, so that a new option needs no change where the pipeline is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from calotype_server.engine.loading.devices import pick_dtype
from calotype_server.engine.loading.offload import check_offload
from calotype_server.engine.loading.quantize import check_quantize
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calotype_server.settings import Settings

__all__ = ["LoadOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The model to load, and how.

    Attributes:
        model: "bundled", the path of a folder or of a single file, or a hub id.
        device: Where the model runs.
        dtype: Number format of the weights.
        revision: Branch, tag or commit of a hub id; ignored for local folders.
        variant: Weight variant, such as "fp16".
        config: For a single file: a folder or hub id with the configs and tokenizers, and with the components that the
            file lacks. None: the hub's model that the file's kind is based on.
        vae: A folder, hub id or single file to load the decoder from, instead of the model's own, or None.
        text_encoders: The same for text encoders, by the name of the component.
        safety_checker: Whether to load the safety checker of a model that has one.
        download: Whether a hub id may be downloaded; otherwise it must be in the local cache.
        quantize: Format for weights of linear layers: "int8", "fp8", "nf4", or empty for none.
        offload: "model" or "group" to keep weights in ordinary memory until the device needs them, or empty.
    """

    model: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    vae: str | None = None
    text_encoders: Mapping[str, str] = field(default_factory=dict)
    safety_checker: bool = True
    download: bool = True
    quantize: str = ""
    offload: str = ""

    def check(self) -> None:
        """Checks that the device and the installed packages can do what the options say, before anything is read.

        Raises:
            ModelUnavailable: They cannot. The message names the remedy.
        """
        check_quantize(self.quantize, self.device)
        if self.quantize and Path(self.model).expanduser().is_file():
            raise ModelUnavailable(
                f"--quantize {self.quantize} needs a diffusers folder or a hub id, and {self.model!r} is a single "
                "file. Start without it."
            )
        check_offload(self.offload, self.device, self.quantize)

    @classmethod
    def of(cls, settings: Settings, device: torch.device, *, download: bool = True) -> Self:
        """Returns the options that the operator's settings name.

        Args:
            settings: The operator's settings.
            device: The device that `pick_device` chose.
            download: Whether a hub id may be downloaded.
        """
        return cls(
            model=settings.model,
            device=device,
            dtype=pick_dtype(settings.dtype, device),
            revision=settings.revision,
            variant=settings.variant,
            config=settings.config,
            vae=settings.vae,
            text_encoders=settings.text_encoders,
            safety_checker=settings.safety_checker,
            download=download,
            quantize=settings.quantize or "",
            offload=settings.offload or "",
        )

    def pretrained_arguments(self, source: Path | str) -> dict[str, Any]:
        """Returns arguments with which `from_pretrained` reads only safetensors and runs no code of the model.

        Args:
            source: The folder or hub id of a pipeline or component.
        """
        local = isinstance(source, Path)
        return {
            "revision": None if local else self.revision,
            "variant": self.variant,
            "dtype": self.dtype,
            "use_safetensors": True,
            "trust_remote_code": False,
            "local_files_only": local or not self.download,
        }
