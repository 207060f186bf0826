"""Finds the file of a LoRA: a local file or folder, or a hub id, each with an optional file name after a colon."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from calotype_server.engine.loading.explain import explain
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["find_file"]

_SUFFIX = ".safetensors"


def find_file(source: str) -> Path:
    """Returns the path of a LoRA's file; one on the hub is downloaded, unless it is in the local cache.

    Args:
        source: `PATH_OR_HUB_ID[:FILE]` from the operator. Without FILE, a folder or repository needs exactly one file
            in the safetensors format.

    Raises:
        ModelUnavailable: There is no such file, it is of another format, or the choice is ambiguous.
    """
    whole = Path(source).expanduser()
    place, file = (source, "") if whole.exists() else _split(source)
    path = Path(place).expanduser()
    if path.exists() or place.startswith((".", "/", "~")):
        return _local_file(path, file)
    return _hub_file(place, file)


def _split(source: str) -> tuple[str, str]:
    place, colon, file = source.rpartition(":")
    return (place, file) if colon and place else (source, "")


def _local_file(path: Path, file: str) -> Path:
    if not path.exists():
        raise ModelUnavailable(f"There is no file or folder '{path}'.")
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if each.suffix == _SUFFIX)
        path = path / (file or _only(names, f"'{path}'"))
    elif file:
        raise ModelUnavailable(f"'{path}' is a file, so no file name can follow it.")
    if not path.is_file():
        raise ModelUnavailable(f"There is no file '{path}'.")
    return _checked(path)


def _hub_file(repository: str, file: str) -> Path:
    if file:
        _checked(Path(file))
    try:
        name = file or _only(_hub_names(repository), repr(repository))
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except ModelUnavailable:
        raise
    except LocalEntryNotFoundError as error:
        raise ModelUnavailable(explain(repository, repository, error)) from error
    except EntryNotFoundError as error:
        raise ModelUnavailable(f"The hub has {repository!r}, but it has no file {file!r}.") from error
    except Exception as error:
        raise ModelUnavailable(explain(repository, repository, error)) from error


def _hub_names(repository: str) -> list[str]:
    """Returns the safetensors files of a repository; those in the local cache if the hub cannot be reached."""
    try:
        return [name for name in huggingface_hub.list_repo_files(repository) if name.endswith(_SUFFIX)]
    except HfHubHTTPError:
        raise  # The hub's answer. Its client's own errors are not.
    except (HTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError):
        pass
    folder = Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
    return [str(path.relative_to(folder)) for path in folder.rglob(f"*{_SUFFIX}")]


def _only(names: Iterable[str], place: str) -> str:
    names = sorted(names)
    if len(names) == 1:
        return names[0]
    if not names:
        raise ModelUnavailable(f"{place} has no {_SUFFIX} file.")
    raise ModelUnavailable(f"{place} has several files; name one of them after a colon: {', '.join(names[:20])}.")


def _checked(path: Path) -> Path:
    if path.suffix != _SUFFIX:
        raise ModelUnavailable(
            f"'{path}' is not a {_SUFFIX} file. Other formats can contain code, so Calotype does not open them."
        )
    return path
