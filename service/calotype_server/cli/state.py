"""The command `calotype state`: checks and repairs the folder of `calotype serve --state`."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from calotype_server.errors import StateUnusable
from calotype_server.generations.state.file import FileDamaged, StateFile
from calotype_server.generations.state.folder import FILE, FolderInUse, Lock, unusable
from calotype_server.generations.state.inspection import inspect
from calotype_server.generations.state.repair import repair as repair_file

__all__ = ["state"]

state = typer.Typer(help="Check and repair the state folder of a stopped server.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of `calotype serve --state`.")]
Ids = Annotated[
    list[str], typer.Argument(metavar="ID...", help="Ids of generations, as `check` and the log show them.")
]


@state.command()
def check(folder: Folder) -> None:
    """Read everything in DIR and list the damage. Exits with code 1 if there is any."""
    with _locked(folder) as path:
        found = inspect(path)
    if found.structure is not None:
        typer.echo(f"The structure of the file is damaged: {found.structure}")
    for generation_id, parts in found.damage:
        typer.echo(f"{generation_id or '(unknown id)'}  damaged: {', '.join(parts)}")
    typer.echo(f"{found.count} generations, {len(found.damage)} of them damaged")
    if found.structure is not None or found.damage:
        raise typer.Exit(1)


@state.command()
def repair(folder: Folder) -> None:
    """Copy all readable generations in DIR to a new file if the structure is damaged. The old file is kept.

    A server does the same when it starts.
    """
    with _locked(folder) as path:
        with contextlib.suppress(FileDamaged):
            StateFile(path).close()
            typer.echo("The structure of the file is intact; there is nothing to repair.")
            return
        done = repair_file(path)
    typer.echo(f"{done.kept} generations kept, {len(done.damaged)} of them damaged; the old file is {done.set_aside}")


@state.command()
def drop(folder: Folder, ids: Ids) -> None:
    """Remove generations from DIR, such as damaged ones, or one that ends the server's process."""
    with _locked(folder) as path:
        try:
            file = StateFile(path)
        except FileDamaged:
            _fail(f"The structure of {path} is damaged. Run: calotype state repair {folder}")
        try:
            rows = {row.generation_id: row.ordinal for row in file.rows()}
            unknown = [each for each in ids if each not in rows]
            if unknown:
                _fail(f"There is no generation {', '.join(unknown)} in {path}. Nothing was removed.")
            file.remove([rows[each] for each in ids])
        finally:
            file.close()
    typer.echo(f"{len(ids)} generations removed")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Locks the folder for the duration of the block and yields the path of its file."""
    path = folder.expanduser() / FILE
    if not path.is_file():
        _fail(f"There is no file {path}.")
    try:
        with Lock(path.parent):
            yield path
    except FolderInUse:
        _fail(f"A server uses {folder}. Stop it first.")
    except StateUnusable as error:
        _fail(str(error).removeprefix("--state: "))
    except sqlite3.Error as error:
        _fail(str(unusable(path, error)).removeprefix("--state: "))


def _fail(message: str) -> NoReturn:
    typer.secho(f"calotype: {message}", fg="red", err=True)
    raise typer.Exit(1)
