"""`calotype state` checks, repairs and empties the folder of a stopped server."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner, Result

from calotype_server.cli.state import state
from calotype_server.generations.state.file import StateFile
from calotype_server.generations.state.folder import Lock
from calotype_server.generations.state.pages import PAGE_BYTES
from support.state.folders import FILE, Contents, fill, opened

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    """Six generations in `tmp_path`."""
    return asyncio.run(fill(tmp_path, 6))


def run(*arguments: object) -> Result:
    """Runs `calotype state`."""
    return CliRunner().invoke(state, [str(each) for each in arguments])


def damage(folder: Path, column: str, generation_id: str) -> None:
    """Overwrites one value."""
    with contextlib.closing(sqlite3.connect(folder / FILE)) as database, database:
        database.execute(f"UPDATE generations SET {column} = x'00' WHERE generation_id = ?", (generation_id,))


def destroy_structure(folder: Path) -> bytes:
    """Overwrites the header; returns the damaged file."""
    damaged = bytes(PAGE_BYTES) + (folder / FILE).read_bytes()[PAGE_BYTES:]
    (folder / FILE).write_bytes(damaged)
    return damaged


async def stored(folder: Path) -> set[str]:
    """Returns the ids of the readable generations."""
    async with opened(folder) as store:
        return {record.generation_id for record in await store.load()}


def test_check_lists_every_damaged_part(tmp_path: Path, contents: Contents) -> None:
    """An intact folder has exit code 0; damaged records, ends, images and attempts are listed with exit code 1."""
    assert (run("check", tmp_path).exit_code, run("check", tmp_path).stdout) == (
        0,
        "6 generations, 0 of them damaged\n",
    )
    ids = list(contents.records)
    for column, index in (("record", 0), ("image", 1), ("ended", 2), ("attempts", 2)):
        damage(tmp_path, column, ids[index])
    result = run("check", tmp_path)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{ids[0]}  damaged: record",
        f"{ids[1]}  damaged: image",
        f"{ids[2]}  damaged: attempts, end",
        "6 generations, 3 of them damaged",
    ]


def test_check_and_repair_handle_a_damaged_structure(tmp_path: Path, contents: Contents) -> None:
    """`check` changes nothing; `repair` keeps the readable generations and the damaged file."""
    damaged = destroy_structure(tmp_path)
    result = run("check", tmp_path)
    assert result.exit_code == 1
    assert "The structure of the file is damaged" in result.stdout
    assert "6 generations, 0 of them damaged" in result.stdout
    assert (tmp_path / FILE).read_bytes() == damaged
    assert run("drop", tmp_path, next(iter(contents.records))).exit_code == 1
    result = run("repair", tmp_path)
    assert result.exit_code == 0
    assert result.stdout.startswith("6 generations kept, 0 of them damaged")
    [aside] = tmp_path.glob("*.damaged-*")
    assert aside.read_bytes() == damaged
    assert run("check", tmp_path).exit_code == 0
    assert "nothing to repair" in run("repair", tmp_path).stdout
    assert asyncio.run(stored(tmp_path)) == set(contents.records)


def test_drop_removes_generations(tmp_path: Path, contents: Contents) -> None:
    """Also a damaged one; if an id is unknown, none is removed."""
    first, second, *others = contents.records
    damage(tmp_path, "record", second)
    result = run("drop", tmp_path, first, "unknown")
    assert result.exit_code == 1
    assert "no generation unknown" in result.stderr
    assert run("drop", tmp_path, first, second).stdout == "2 generations removed\n"
    assert run("check", tmp_path).stdout == "4 generations, 0 of them damaged\n"
    assert asyncio.run(stored(tmp_path)) == set(others)


def test_a_disk_that_cannot_be_written_is_an_error_without_a_traceback(
    tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has SQLite's reason, and nothing was removed."""

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(StateFile, "remove", full)
        result = run("drop", tmp_path, next(iter(contents.records)))
    assert result.exit_code == 1
    assert "database or disk is full" in result.stderr
    assert asyncio.run(stored(tmp_path)) == set(contents.records)


@pytest.mark.parametrize("command", [["check"], ["repair"], ["drop", "id"]])
def test_a_folder_in_use_is_left_alone(tmp_path: Path, contents: Contents, command: list[str]) -> None:
    """The message says that the server must be stopped first."""
    with Lock(tmp_path):
        result = run(command[0], tmp_path, *command[1:])
    assert result.exit_code == 1
    assert f"A server uses {tmp_path}. Stop it first." in result.stderr


@pytest.mark.parametrize("command", [["check"], ["repair"], ["drop", "id"]])
def test_a_missing_folder_is_not_created(tmp_path: Path, command: list[str]) -> None:
    """A mistyped path is an error."""
    result = run(command[0], tmp_path / "other", *command[1:])
    assert result.exit_code == 1
    assert "There is no file" in result.stderr
    assert not (tmp_path / "other").exists()
