"""Explains to operators why a model cannot be loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

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

from calotype_server.engine.loading.checks.packages import needs_packages, package_missing_in

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["causes", "explain", "explain_hub", "first_line", "is_unreachable"]


def explain(model: str, source: Path | str, error: Exception, problem: str | None = None) -> str:
    """Returns a message for operators: the problem and a remedy. The exception's cause keeps the library's message.

    Args:
        model: The operator's setting.
        source: The folder, file or hub id that it means.
        error: Raised while the model was loaded.
        problem: The problem that the names of the model's files show, if any.
    """
    chain = list(causes(error))
    package = package_missing_in(chain)
    if package is not None:
        return needs_packages(repr(model), [package])
    if isinstance(source, Path):
        if source.is_file():
            return f"The file {model!r} cannot be loaded: {_file_problem(error)}."
        if problem is not None:
            return f"The model folder {model!r} cannot be loaded. {problem}."
        return (
            f"The model folder {model!r} is incomplete or damaged ({first_line(error)}). It needs model_index.json, "
            "the configs, and weights as .safetensors."
        )
    message = explain_hub(model, error)
    if message is None:
        message = f"The model {model!r} cannot be loaded" + (f". {problem}." if problem else f" ({first_line(error)}).")
    return message


def explain_hub(name: str, error: Exception) -> str | None:
    """Returns a message for operators if the hub or the network is the reason of an error, else None.

    Args:
        name: The hub id of a model, a LoRA or an embedding.
        error: Raised while it was downloaded, or looked up in the local cache.
    """
    chain = list(causes(error))
    if any(isinstance(each, GatedRepoError) for each in chain):
        return f"The hub requires that you accept the terms of {name!r} and log in: hf auth login"
    if any(isinstance(each, RevisionNotFoundError) for each in chain):
        return f"The hub has {name!r}, but not the requested revision."
    if any(isinstance(each, RepositoryNotFoundError | HFValidationError) for each in chain):
        return f"The hub has no repository {name!r}, or it is private and you are not logged in."
    if any(map(_shows_no_hub, chain)):
        return (
            f"The hub cannot be reached, and {name!r} is neither a local path nor complete in the local cache. "
            "Check the path and the network."
        )
    return None


def _file_problem(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks the weights {error.args[0]!r}"
    mismatch = re.search(r"(\S+) expected shape\s+\S+?(\[[^]]*\])\S*\s+but got \S+?(\[[^]]*\])", str(error))
    if mismatch is not None:
        name, expected, found = mismatch.groups()
        return f"{name} has the shape {found}, but the configs say {expected}. Name others with --config"
    return first_line(error)


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's message, or its class name if it has none, without a full stop."""
    words = str(error).strip().splitlines()
    return words[0][:300].rstrip(".") if words else type(error).__name__


def is_unreachable(error: Exception) -> bool:
    """Returns whether something failed because the hub cannot be reached and the local cache does not suffice."""
    return any(map(_shows_no_hub, causes(error)))


def _shows_no_hub(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError | ConnectionError | TimeoutError):
        return True
    # `HTTPError` belongs to the HTTP client of the hub's library. An answer of the hub is an `HfHubHTTPError`.
    return isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and its causes, the last cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
