"""One real server with the bundled model, shared by tests that do not disturb it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from support.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of all servers, empty at first: the first server calibrates, and the others load the result."""
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have a folder each, in one that they share.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerProcess, "cache_dir", folder)
        yield folder


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """`calotype serve` with the bundled model."""
    with ServerProcess() as server:
        yield server
