"""The command `calotype keys`: makes API keys, whose secrets nobody else ever sees."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import pydantic
import typer

from calotype_server.auth.keys import KeyRecord, Role, append, digest, make, read
from calotype_server.errors import KeysUnusable

__all__ = ["keys"]

keys = typer.Typer(help="Make and list the API keys of a server.", no_args_is_help=True)

File = Annotated[
    Path, typer.Option(metavar="FILE", help="The file that `serve --api-keys` reads.", envvar="CALOTYPE_API_KEYS")
]


@keys.command()
def add(
    name: Annotated[str, typer.Option(help="Whose it is: letters, digits, dots, dashes, underscores.")],
    file: File,
    role: Annotated[Role, typer.Option(help="A user sees its own generations, an operator everybody's.")] = Role.USER,
    expires: Annotated[
        str | None, typer.Option(metavar="DAYS|TIME", help="Days from now, or a time such as 2027-01-01T00:00:00Z.")
    ] = None,
    requests_per_minute: Annotated[float | None, typer.Option(help="Generations begun in a minute.")] = None,
    pixel_steps_per_minute: Annotated[float | None, typer.Option(help="Pixels times steps in a minute.")] = None,
    concurrent: Annotated[int | None, typer.Option(help="Generations that wait or run at once.")] = None,
) -> None:
    """Make a key, add what the server must know of it to FILE, and print the key, which nobody can tell again.

    A server that runs takes it up within a second or two.
    """
    try:
        key = make(name)
        record = KeyRecord(
            id=name,
            sha256=digest(key),
            role=role,
            expires=_time(expires),
            requests_per_minute=requests_per_minute,
            pixel_steps_per_minute=pixel_steps_per_minute,
            concurrent=concurrent,
        )
        append(file, record)
    except pydantic.ValidationError as error:
        for problem in error.errors(include_input=False):
            option = str(problem["loc"][0]).replace("_", "-").replace("id", "name")
            typer.secho(f"calotype: --{option}: {problem['msg'].removeprefix('Value error, ')}", fg="red", err=True)
        raise typer.Exit(2) from None
    except KeysUnusable as error:
        typer.secho(f"calotype: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    typer.echo(key)
    typer.echo(f"Keep it: {file} holds only its hash. Callers send it as `authorization: Bearer KEY`.", err=True)


@keys.command("list")
def list_keys(file: File) -> None:
    """List the keys in FILE: names, roles, expiry."""
    try:
        records = read(file)
    except KeysUnusable as error:
        typer.secho(f"calotype: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    for record in records.values():
        over = record.expires is not None and record.expires <= datetime.now(UTC)
        until = "" if record.expires is None else f"{'expired' if over else 'until'} {record.expires.isoformat()}"
        typer.echo(f"{record.id:<24} {record.role:<10} {until}".rstrip())


def _time(given: str | None) -> datetime | None:
    if given is None:
        return None
    try:
        return datetime.now(UTC) + timedelta(days=float(given))
    except (ValueError, OverflowError):
        pass
    try:
        return datetime.fromisoformat(given)
    except ValueError:
        raise typer.BadParameter(f"{given!r} is neither a number of days nor a time", param_hint="--expires") from None
