"""Files that change while the server runs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import structlog

from calotype_server import file_watcher
from calotype_server.errors import KeysUnusable
from calotype_server.file_watcher import FileWatcher

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> structlog.testing.CapturingLogger:
    """Captures the log lines of the module."""
    log = structlog.testing.CapturingLogger()
    monkeypatch.setattr(file_watcher, "_log", log)
    return log


async def test_watching_continues_after_any_exception(tmp_path: Path, log) -> None:
    """Any exception of `reload` is logged, and the next change is still noticed."""
    path = tmp_path / "keys.toml"
    path.write_text("0")
    results = iter([RuntimeError("bug"), KeysUnusable("invalid"), None])

    def reload() -> None:
        if (error := next(results)) is not None:
            raise error

    watcher = FileWatcher([path], reload, interval=0.01)
    watcher.start()
    try:
        for number in range(3):
            path.write_text("x" * (number + 2))
            async with asyncio.timeout(20):
                while len(log.calls) == number:  # noqa: ASYNC110 - the log has no event
                    await asyncio.sleep(0.01)
    finally:
        await watcher.stop()
    assert [call.method_name for call in log.calls] == ["exception", "warning", "info"]


def test_a_switched_link_is_a_change(tmp_path: Path, log) -> None:
    """Kubernetes replaces a secret by switching a link in the parent folder."""
    calls = []
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "tls.key").write_text(version)
    link = tmp_path / "current"
    link.symlink_to("one")
    watcher = FileWatcher([link / "tls.key"], lambda: calls.append(1))
    watcher.check()
    assert calls == []
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").rename(link)
    watcher.check()
    watcher.check()
    assert calls == [1]


async def test_a_watcher_without_files_does_nothing(log) -> None:
    """It can be started and stopped, and stopped without a start."""
    watcher = FileWatcher([], lambda: None)
    await watcher.stop()
    watcher.start()
    await watcher.stop()
    assert log.calls == []
