"""One real server with the bundled model, shared by tests that do not disturb it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder, empty at first: the first server calibrates, and the others load the result."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def server(cache_dir: Path) -> Iterator[ServerProcess]:
    """`calotype serve` with the bundled model."""
    with ServerProcess("--cache-dir", str(cache_dir)) as server:
        yield server
