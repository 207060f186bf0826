"""Explains to operators why a model cannot be loaded."""

from __future__ import annotations

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

from calotype_server.engine.loading.sources import BUNDLED

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["explain", "first_line"]


def explain(model: str, local: bool, error: Exception) -> str:
    """Returns a message for operators: the problem and a remedy. The exception's cause keeps the library's message."""
    chain = list(_chain(error))
    first = first_line(error)
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


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's message, or its class name if it has none."""
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
