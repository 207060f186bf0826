"""A pytest plugin that records which abilities of clients the tests prove, for `support.client_table`.

`@pytest.mark.proves("go", "streams")` means that the Go client streams if the test passes. A name in braces is a
parameter of the test: `@pytest.mark.proves("{example}", "streams")`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from support.client_table import ABILITIES, CLIENTS, PYTEST_RESULTS, Outcomes, worst

if TYPE_CHECKING:
    from pathlib import Path

_PROPERTY = "proves"
"""Property of a test report, which xdist sends to the process that writes the results."""


def pytest_configure(config: pytest.Config) -> None:
    """Registers the recorder in the main process, which receives all reports."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config, PYTEST_RESULTS))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Validates the marks of a test and attaches their cells to it."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for mark in item.iter_markers("proves"):
        client, ability = mark.args
        client = client.format(**parameters)
        if client not in CLIENTS or ability not in ABILITIES:
            raise pytest.UsageError(f"{item.nodeid}: the table of clients has no cell for {client!r}, {ability!r}")
        item.user_properties.append((_PROPERTY, f"{client} {ability}"))


class Recorder:
    """Collects the outcomes of a session and writes them to a file.

    Args:
        config: Configuration of the session.
        path: A JSON file. A run of all tests, or of all that are not slow, replaces it; a run of some tests updates
            their cells.
    """

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._path = path
        self._cells: dict[str, list[str]] = {}
        chosen = config.option.keyword or config.option.markexpr not in ("", "proves", "not slow")
        self._replaces = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not chosen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds the outcome of one phase of a test."""
        for name, cell in report.user_properties:
            if name == _PROPERTY:
                self._cells.setdefault(str(cell), []).append(report.outcome)

    def pytest_sessionfinish(self) -> None:
        """Writes the results."""
        if not self._cells:
            return
        kept: Outcomes = {}
        if self._path.exists() and not self._replaces:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = {cell: worst(outcomes) for cell, outcomes in self._cells.items()}
        self._path.write_text(json.dumps(kept | new, indent=1, sort_keys=True), encoding="utf-8")
