"""Loads models as a server on a CPU does."""

from __future__ import annotations

import re
from typing import Any

import pytest

from calotype_server.engine.loading import LoadOptions, load_pipeline
from calotype_server.errors import ModelUnavailable

__all__ = ["checked", "load", "rejection"]


def load(model: Any, **options: Any) -> Any:
    """Loads a model with the defaults of a server on a CPU."""
    return load_pipeline(LoadOptions(model=str(model), **options))


def rejection(model: Any, **options: Any) -> str:
    """Returns the message for the operator when a model is rejected, after checking that it has no internals."""
    with pytest.raises(ModelUnavailable) as caught:
        load(model, **options)
    return checked(str(caught.value))


def checked(text: str) -> str:
    """Returns a message for operators after checking that it is one line without internals."""
    assert "Traceback" not in text
    assert "\n" not in text
    assert not re.search(r"line \d+, in ", text)
    assert 20 < len(text) < 700
    return text
