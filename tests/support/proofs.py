"""A pytest plugin that notes what the tests prove about the clients, for `support.client_table`.

`@pytest.mark.proves("go", "streams")` says that the test, if it passes, shows that the Go client streams. A name in
braces is that of a parameter: `@pytest.mark.proves("{example}", "streams")`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from support.client_table import ABILITIES, CLIENTS, PYTEST_RESULTS, Outcomes, worst

if TYPE_CHECKING:
    from pathlib import Path

_PROPERTY = "proves"
"""Of a report, so that it reaches the process that writes the results."""


def pytest_configure(config: pytest.Config) -> None:
    """Notes results in the process that has all of them."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config, PYTEST_RESULTS))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Checks and attaches what an item proves."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for mark in item.iter_markers("proves"):
        client, ability = mark.args
        client = client.format(**parameters)
        if client not in CLIENTS or ability not in ABILITIES:
            raise pytest.UsageError(f"{item.nodeid}: the table of clients has no cell for {client!r}, {ability!r}")
        item.user_properties.append((_PROPERTY, f"{client} {ability}"))


class Recorder:
    """Gathers the outcomes of a session and writes them down.

    Args:
        config: Of the session.
        path: A JSON file. A session of all tests replaces it, one of some tests changes their cells.
    """

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._path = path
        self._cells: dict[str, list[str]] = {}
        chosen = config.option.keyword or config.option.markexpr not in ("", "proves")
        self._replaces = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not chosen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes the outcome of one phase of a test."""
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
