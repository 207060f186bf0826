"""The cache folder of server processes, as in the end-to-end tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of all servers: the first server calibrates, and the others load the result."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerProcess, "cache_dir", folder)
        yield folder
