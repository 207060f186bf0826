"""Files that change while the server runs."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

import pytest
import structlog

from calotype_server import file_watcher
from calotype_server.auth import keys
from calotype_server.auth.access import Access
from calotype_server.errors import KeyInvalid, KeysUnusable
from calotype_server.file_watcher import FileWatcher
from support.keyring import Keyring, notice_change

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Panic(BaseException):
    """Like the exception that Rust's pyo3 raises for a panic."""


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
    failures: list[BaseException] = [
        RuntimeError("bug"),
        KeysUnusable("invalid"),
        Panic("panic"),
        SystemExit(1),
        StopIteration(),
        asyncio.CancelledError(),
    ]
    raised: list[BaseException | None] = []

    def reload() -> None:
        if raised[-1] is not None:
            raise raised[-1]

    watcher = FileWatcher([path], reload, interval=0.001)
    watcher.start()
    try:
        for number, failure in enumerate([*failures, None]):
            raised.append(failure)
            path.write_text("x" * (number + 2))
            async with asyncio.timeout(20):
                while len(log.calls) == number:  # noqa: ASYNC110 - the log has no event
                    await asyncio.sleep(0.001)
    finally:
        await watcher.stop()
    assert [call.method_name for call in log.calls] == ["exception", "warning", *["exception"] * 4, "info"]


async def test_watching_continues_when_the_log_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log on a full disk raises, too; the next change is still noticed."""
    path = tmp_path / "keys.toml"
    path.write_text("0")
    loaded = threading.Semaphore(0)

    class FullDisk:
        def info(self, *_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        exception = info

    monkeypatch.setattr(file_watcher, "_log", FullDisk())
    watcher = FileWatcher([path], loaded.release, interval=0.001)
    watcher.start()
    try:
        for text in ("one", "three"):
            path.write_text(text)
            assert await asyncio.to_thread(loaded.acquire, timeout=20)
    finally:
        await watcher.stop()


def test_a_failure_is_logged_once_and_retried_until_it_ends(tmp_path: Path, log) -> None:
    """A cause that leaves no trace on the file, such as a permission, ends without another change of the file."""
    path = tmp_path / "keys.toml"
    path.write_text("0")
    allowed = False

    def reload() -> None:
        if not allowed:
            raise KeysUnusable("cannot be read")

    watcher = FileWatcher([path], reload)
    path.write_text("new")
    for _ in range(3):
        notice_change(watcher)
    assert [call.method_name for call in log.calls] == ["warning"]
    allowed = True
    notice_change(watcher)
    assert [call.method_name for call in log.calls] == ["warning", "info"]


def test_files_are_read_when_they_rest(tmp_path: Path, log) -> None:
    """A file that is still being written is not read yet; one that always changes is read at every third check."""
    path = tmp_path / "keys.toml"
    path.write_text("0")
    read: list[str] = []
    watcher = FileWatcher([path], lambda: read.append(path.read_text()))
    for text in ("", "half"):
        path.write_text(text)
        watcher.check()
    assert read == []
    path.write_text("complete")
    notice_change(watcher)
    assert read == ["complete"]
    for number in range(6):
        path.write_text("x" * number)
        watcher.check()
    assert read == ["complete", "xx", "xxxxx"]


def same_size(path: Path) -> None:
    """Writes other text of the same size, with the old time of modification."""
    found = path.stat()
    path.write_text("1")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def older(path: Path) -> None:
    """Sets the time of modification back, as a restored backup does."""
    os.utime(path, ns=(0, 0))


def replace(path: Path) -> None:
    """Replaces the file by another of the same size, as editors do."""
    path.with_name("other").write_text("1")
    path.with_name("other").rename(path)


def make_folder(path: Path) -> None:
    """Replaces the file by a folder."""
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [same_size, older, replace, make_folder, os.unlink])
def test_every_change_is_noticed(change: Callable[[Path], object], tmp_path: Path, log) -> None:
    """Neither the size nor the time of modification has to change."""
    path = tmp_path / "keys.toml"
    path.write_text("0")
    calls = []
    watcher = FileWatcher([path], lambda: calls.append(1))
    change(path)
    notice_change(watcher)
    assert calls == [1]


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
    notice_change(watcher)
    watcher.check()
    assert calls == [1]


@pytest.mark.parametrize(
    "lose",
    [
        lambda path: path.write_text(""),
        lambda path: path.write_text("# all keys were here\n"),
        lambda path: path.write_text(path.read_text()[:-20]),
        lambda path: path.unlink(),
        make_folder,
    ],
    ids=["emptied", "only a comment", "cut off", "deleted", "a folder"],
)
def test_a_lost_key_file_keeps_the_keys_until_it_is_valid_again(lose: Callable[[Path], object], tmp_path, log) -> None:
    """The keys stay in force with one warning. The next valid file applies."""
    keyring = Keyring(tmp_path / "keys.toml")
    alice = f"Bearer {keyring.add('alice')}"
    access = keyring.access()
    watcher = FileWatcher(access.files, access.reload)
    lose(keyring.path)
    for _ in range(2):
        notice_change(watcher)
        assert access.authenticate(alice, "").id == "key:alice"
    assert [call.method_name for call in log.calls] == ["warning"]
    if keyring.path.is_dir():
        keyring.path.rmdir()
    keyring.path.write_text("")
    bob = f"Bearer {keyring.add('bob')}"
    notice_change(watcher)
    assert access.authenticate(bob, "").id == "key:bob"
    with pytest.raises(KeyInvalid):
        access.authenticate(alice, "")


def test_all_keys_can_be_removed_on_purpose(tmp_path: Path, log) -> None:
    """`key = []` rejects every caller. A key can be added only after this line is removed."""
    keyring = Keyring(tmp_path / "keys.toml")
    alice = f"Bearer {keyring.add('alice')}"
    access = keyring.access()
    watcher = FileWatcher(access.files, access.reload)
    keyring.path.write_text("key = []\n")
    notice_change(watcher)
    with pytest.raises(KeyInvalid):
        access.authenticate(alice, "")
    with pytest.raises(KeysUnusable, match=r"remove this line"):
        keyring.add("bob")
    assert keys.read(keyring.path) == {}


def test_a_server_does_not_start_with_an_empty_key_file(tmp_path: Path) -> None:
    """The error says how to reject every caller on purpose."""
    path = tmp_path / "keys.toml"
    path.touch()
    with pytest.raises(KeysUnusable, match=r"keys\.toml contains no keys.*`key = \[\]`"):
        Access(path)


async def test_a_hanging_file_system_does_not_delay_the_exit(
    tmp_path: Path, log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopping does not wait for a `reload` that hangs, and its thread does not keep the process alive."""
    monkeypatch.setattr(file_watcher, "_STOP_SECONDS", 0)
    path = tmp_path / "keys.toml"
    path.write_text("0")
    hangs, thawed = threading.Event(), threading.Event()

    def reload() -> None:
        hangs.set()
        thawed.wait()

    watcher = FileWatcher([path], reload, interval=0.001)
    watcher.start()
    try:
        path.write_text("1 changed")
        assert await asyncio.to_thread(hangs.wait, 20)
        await watcher.stop()
        [thread] = [each for each in threading.enumerate() if each.name == "calotype-files"]
        assert thread.daemon
    finally:
        thawed.set()
    await asyncio.to_thread(thread.join, 20)


async def test_a_watcher_without_files_does_nothing(log) -> None:
    """It can be started and stopped, and stopped without a start."""
    watcher = FileWatcher([], lambda: None)
    await watcher.stop()
    watcher.start()
    await watcher.stop()
    assert log.calls == []
