"""Environment and plugins of all tests."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import hypothesis
import pytest
import structlog

if TYPE_CHECKING:
    from collections.abc import Iterator

# The server sets this, too. Tests share cores, and spinning OpenMP threads slow the others down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest_plugins = ["support.proofs"]

# More examples than by default, for `make test-all`.
hypothesis.settings.register_profile("thorough", max_examples=300)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests first that start servers: a file runs in one process, and one of many seconds must not come last.

    It runs after pytest-randomly. `--no-loadscope-reorder` makes pytest-xdist keep the order.
    """
    items.sort(key=lambda item: item.path.parent.name not in ("e2e", "faults"))


@pytest.fixture(autouse=True)
def _logging_restored() -> Iterator[None]:
    """Restores the configuration of logging after each test, and logs exceptions with Python's own tracebacks.

    The default of structlog takes seconds to format a traceback.
    """
    root, server = logging.getLogger(), logging.getLogger("calotype_server")
    handlers, level, server_level = root.handlers, root.level, server.level
    *processors, _ = structlog.get_config()["processors"]
    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*processors, plain])
    yield
    # Otherwise the next call of captureWarnings(True) would do nothing.
    logging.captureWarnings(False)
    root.handlers = handlers
    root.setLevel(level)
    server.setLevel(server_level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
