"""The command `calotype keys`: makes and lists API keys."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import pydantic
import typer

from calotype_server.auth.keys import KeyRecord, Role, append, digest, make, read
from calotype_server.errors import KeysUnusable

__all__ = ["keys"]

keys = typer.Typer(help="Create and list API keys.", no_args_is_help=True)

File = Annotated[
    Path,
    typer.Option(metavar="FILE", help="The file that `calotype serve --api-keys` reads.", envvar="CALOTYPE_API_KEYS"),
]


@keys.command()
def add(
    name: Annotated[
        str, typer.Option(help="Name of the owner: 1 to 64 letters, digits, dots, dashes and underscores.")
    ],
    file: File,
    role: Annotated[Role, typer.Option(help="A user sees their own generations, an operator sees all.")] = Role.USER,
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="DAYS|TIME", help="Days from now, or a time such as 2027-01-01T00:00:00Z. Default: never."
        ),
    ] = None,
    requests_per_minute: Annotated[
        float | None, typer.Option(help="Maximum generations started per minute. Default: no limit.")
    ] = None,
    pixel_steps_per_minute: Annotated[
        float | None, typer.Option(help="Maximum pixels times steps per minute. Default: no limit.")
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option(help="Maximum queued and running generations. Default: no limit.")
    ] = None,
) -> None:
    """Create a key, add its hash to FILE, and print the key. It cannot be shown again.

    A running server accepts the key within two seconds.
    """
    try:
        key = make(name)
        record = KeyRecord(
            id=name,
            sha256=digest(key),
            role=role,
            expires=_parse_time(expires),
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
    typer.echo(
        f"Store the key now: {file} contains only its hash. Clients send it as `authorization: Bearer KEY`.", err=True
    )


@keys.command("list")
def list_keys(file: File) -> None:
    """List the keys in FILE: name, role and expiry."""
    try:
        records = read(file)
    except KeysUnusable as error:
        typer.secho(f"calotype: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    for record in records.values():
        expired = record.expires is not None and record.expires <= datetime.now(UTC)
        until = "" if record.expires is None else f"{'expired' if expired else 'until'} {record.expires.isoformat()}"
        typer.echo(f"{record.id:<24} {record.role:<10} {until}".rstrip())


def _parse_time(given: str | None) -> datetime | None:
    if given is None:
        return None
    try:
        return datetime.now(UTC) + timedelta(days=float(given))
    except (ValueError, OverflowError):
        pass
    try:
        return datetime.fromisoformat(given)
    except ValueError:
        raise typer.BadParameter(
            f"{given!r} is neither a number of days nor a time such as 2027-01-01T00:00:00Z", param_hint="--expires"
        ) from None
