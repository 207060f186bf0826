"""Loads a pipeline by name: `bundled`, a local diffusers folder or a hub id, all with `from_pretrained`."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import structlog
import torch
import transformers
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from calotype_server.engine.memory import is_out_of_memory
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BUNDLED", "display_name", "load_pipeline", "load_tiny_vae", "locate", "pick_device", "pick_dtype"]

_log = structlog.get_logger(__name__)

BUNDLED = "bundled"


def pick_device(device: str | None) -> torch.device:
    """Returns the requested device, or by default the first device of CUDA, XPU or MPS, or else the CPU.

    Raises:
        ModelUnavailable: There is no such device.
    """
    if device is None:
        # Metal has one device, which has no number.
        for backend, first in ((torch.cuda, "cuda:0"), (torch.xpu, "xpu:0"), (torch.backends.mps, "mps")):
            if backend.is_available():
                return torch.device(first)
        return torch.device("cpu")
    try:
        picked = torch.device(device)
        torch.empty(1, device=picked)
    except (RuntimeError, AssertionError):
        raise ModelUnavailable(f"There is no device {device!r} here; try --device cpu.") from None
    return picked


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Returns the requested number format, or the best one for the device.

    On CUDA and XPU that is bfloat16 if the device computes it, or else float16: emulated bfloat16 is slow. On a CPU and
    on MPS it is float32: both have the same memory, and diffusers' guide for MPS uses no other format.
    """
    if dtype is not None:
        return getattr(torch, dtype)
    if device.type not in ("cuda", "xpu"):
        return torch.float32
    backend = getattr(torch, device.type)
    with backend.device(device):  # The question is about the current device.
        native = backend.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def load_pipeline(
    model: str,
    *,
    revision: str | None,
    variant: str | None,
    device: torch.device,
    dtype: torch.dtype,
    download: bool = True,
) -> Any:
    """Loads a text-to-image pipeline from safetensors only; it never runs code that comes with the weights.

    Args:
        model: "bundled", a path, or a hub id.
        revision: Branch, tag or commit of a hub id.
        variant: Weight variant, such as "fp16".
        device: Where the model runs.
        dtype: Number format of the weights.
        download: Whether a hub id may be downloaded; otherwise it must be in the local cache.

    Raises:
        ModelUnavailable: The model is missing, unreachable, incomplete, or not text-to-image.
    """
    source = locate(model)
    local = isinstance(source, Path)
    try:
        with _quiet():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                source,
                revision=None if local else revision,
                variant=variant,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=local or not download,
            )
            pipeline.to(device)
    except Exception as error:
        if is_out_of_memory(error):
            raise ModelUnavailable(f"The model {model!r} does not fit into the memory of {device}.") from None
        _log.debug("the model cannot be loaded", model=model, exc_info=error)
        raise ModelUnavailable(_explain(model, local, error)) from error
    parameters = inspect.signature(type(pipeline).__call__).parameters
    image = parameters.get("image")
    kind = type(pipeline).__name__
    needs_image = image is not None and (image.default is image.empty or "strength" in parameters)
    makes_video = not {"num_frames", "video_length"}.isdisjoint(parameters)
    if needs_image or makes_video or not {"prompt", "width", "height", "num_inference_steps"} <= parameters.keys():
        raise ModelUnavailable(f"{model!r} is a {kind}, which does not turn text into images.")
    if getattr(pipeline, "vae", None) is None or getattr(pipeline, "scheduler", None) is None:
        raise ModelUnavailable(f"{model!r} is a {kind}, which is not a latent diffusion pipeline.")
    return pipeline


def load_tiny_vae(name: str, like: Any) -> Any:
    """Loads an `AutoencoderTiny` for previews, from safetensors only.

    Args:
        name: A hub id or a local folder.
        like: The VAE that it replaces; it gets the same device and number format.

    Raises:
        ModelUnavailable: It is missing, unreachable, not an `AutoencoderTiny`, or has other latent channels.
    """
    folder = Path(name).expanduser()
    local = folder.exists() or name.startswith((".", "/", "~"))
    try:
        with _quiet():
            vae = diffusers.AutoencoderTiny.from_pretrained(
                folder if local else name, torch_dtype=like.dtype, use_safetensors=True, local_files_only=local
            )
    except Exception as error:
        raise ModelUnavailable(f"{name!r} cannot be loaded as an AutoencoderTiny ({_first_line(error)}).") from error
    # VAEs of video models use another name.
    channels = like.config.get("latent_channels", like.config.get("z_dim"))
    if vae.config.latent_channels != channels:
        raise ModelUnavailable(
            f"The tiny VAE {name!r} has {vae.config.latent_channels} latent channels, the model has {channels}."
        )
    # Its convolutions are so small that the memory layout matters: this saves a sixth of the time on a CPU.
    return vae.to(like.device, memory_format=torch.channels_last).eval()


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


def _explain(model: str, local: bool, error: Exception) -> str:
    """Returns a message for operators: the problem and a remedy. The exception's cause keeps the library's message."""
    chain = list(_chain(error))
    first = _first_line(error)
    if local:
        return (
            f"The model folder {model!r} is incomplete or damaged ({first}). It needs model_index.json, "
            "the configs, and weights as .safetensors."
        )
    if any(isinstance(each, GatedRepoError) for each in chain):
        return f"The hub requires that you accept the terms of {model!r} and log in: hf auth login"
    if any(isinstance(each, RevisionNotFoundError) for each in chain):
        return f"The hub has {model!r}, but not the requested revision."
    if any(isinstance(each, RepositoryNotFoundError | HFValidationError) for each in chain):
        return f"The hub has no model {model!r}, or it is private and you are not logged in."
    if any(_is_unreachable(each) for each in chain):
        return (
            f"The hub cannot be reached, and {model!r} is not complete in the local cache. Check the network, or use a "
            f"local folder, or --model {BUNDLED}."
        )
    return f"The model {model!r} cannot be loaded ({first})."


def _first_line(error: Exception) -> str:
    words = str(error).strip().splitlines()
    return words[0][:300] if words else type(error).__name__


def _is_unreachable(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError | ConnectionError | TimeoutError):
        return True
    # `HTTPError` belongs to the HTTP client of the hub's library. An answer of the hub is an `HfHubHTTPError`.
    return isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _quiet() -> Any:
    """Silences progress bars and advice of the libraries, which would break the server's log."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    yield
