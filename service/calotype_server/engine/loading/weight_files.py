"""Finds the files of LoRAs and embeddings, each named by the operator as NAME=PATH_OR_HUB_ID[:FILE]."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from calotype_server.engine.loading.checks.pickles import refuse_pickle
from calotype_server.engine.loading.explain import explain_hub, first_line, is_unreachable
from calotype_server.engine.loading.sources import is_hub_id, is_path
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["load_weight_files"]

_SUFFIX = ".safetensors"


def load_weight_files(
    option: str,
    sources: Mapping[str, str],
    load: Callable[[str, Path], None],
    *,
    kind: str,
    usual: str = "",
    download: bool = True,
) -> None:
    """Loads each file that an option names.

    Args:
        option: Name of the option, such as "--lora".
        sources: Maps the name of each file to `PATH_OR_HUB_ID[:FILE]`.
        load: Called with the name and the path of each file.
        kind: Name of the pipeline's class, for messages.
        usual: Name of the file that most repositories have, if there is such a name.
        download: Whether files may be downloaded; otherwise they must be in the local cache.

    Raises:
        ModelUnavailable: At least one file is missing, or `load` raised this error. The message names each of them and
            the reason.
    """
    errors, messages = [], []
    for name, source in sources.items():
        try:
            load(name, _find(source, usual, download))
        except ModelUnavailable as error:
            errors.append(error)
            messages.append(f"{option} {name}={source} cannot be used with this {kind}: {error}")
    if errors:
        raise ModelUnavailable(" ".join(messages)) from errors[0]


def _find(source: str, usual: str, download: bool) -> Path:
    """Returns the path of a .safetensors file; one on the hub is downloaded, unless it is in the local cache.

    Args:
        source: `PATH_OR_HUB_ID[:FILE]`. Without FILE, a folder or repository needs the file `usual`, or exactly one
            file in the safetensors format.
        usual: Name of a file, or empty.
        download: Whether the file may be downloaded; otherwise it must be in the local cache.

    Raises:
        ModelUnavailable: There is no such file, it is of another format, or the choice is ambiguous.
    """
    place, file = (source, "") if Path(source).expanduser().exists() else _split(source)
    if is_path(place):
        return _local_file(Path(place).expanduser(), file, usual)
    if not is_hub_id(place) or place.endswith(_SUFFIX):
        _check_suffix(source)
        raise ModelUnavailable(f"There is no file {source!r}.")
    return _hub_file(place, file, usual, download)


def _split(source: str) -> tuple[str, str]:
    place, colon, file = source.rpartition(":")
    return (place, file) if colon and place else (source, "")


def _local_file(path: Path, file: str, usual: str) -> Path:
    if path.is_dir():
        names = (each.name for each in path.iterdir() if each.suffix == _SUFFIX)
        path = path / (file or _chosen(names, str(path), usual))
    elif not path.exists():
        refuse_pickle(str(path))
        raise ModelUnavailable(f"There is no file or folder {str(path)!r}.")
    elif file:
        raise ModelUnavailable(f"{str(path)!r} is a file, so no file name can follow it.")
    _check_suffix(str(path))
    if not path.is_file():
        raise ModelUnavailable(f"There is no file {str(path)!r}.")
    return path


def _hub_file(repository: str, file: str, usual: str, download: bool) -> Path:
    if file:
        _check_suffix(file)
    try:
        name = file or _chosen(_hub_names(repository, download), repository, usual)
        return Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=not download))
    except ModelUnavailable:
        raise
    except Exception as error:
        # Without the network, a file that is not in the cache is such an error too.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ModelUnavailable(f"The hub has {repository!r}, but it has no file {file!r}.") from error
        raise ModelUnavailable(
            explain_hub(repository, error) or f"{repository!r} cannot be downloaded ({first_line(error)})."
        ) from error


def _hub_names(repository: str, download: bool) -> list[str]:
    """Returns the safetensors files of a repository; those in the local cache if the hub cannot be reached."""
    if download:
        try:
            return [name for name in huggingface_hub.list_repo_files(repository) if name.endswith(_SUFFIX)]
        except Exception as error:
            if not is_unreachable(error):
                raise
    folder = Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
    return [path.relative_to(folder).as_posix() for path in folder.rglob(f"*{_SUFFIX}")]


def _chosen(names: Iterable[str], place: str, usual: str) -> str:
    names = sorted(names)
    if usual in names:
        return usual
    if not names:
        raise ModelUnavailable(f"{place!r} has no {_SUFFIX} file.")
    if len(names) > 1:
        raise ModelUnavailable(f"{place!r} has several files; name one of them after a colon: {', '.join(names[:20])}.")
    return names[0]


def _check_suffix(name: str) -> None:
    refuse_pickle(name)
    if not name.endswith(_SUFFIX):
        raise ModelUnavailable(f"{name!r} is not a {_SUFFIX} file.")
