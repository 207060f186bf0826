"""The commands `serve`, `bridge` and `doctor`, which the server adds to the client's `calotype` script."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import pydantic
import typer

from calotype_server.apps import bridge
from calotype_server.apps import server as application
from calotype_server.apps.loading import LOADING_THREAD
from calotype_server.cli.doctor import doctor
from calotype_server.cli.keys import keys
from calotype_server.errors import StartupError
from calotype_server.settings import BridgeSettings, Settings, WebSettings

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["default_text", "flag_text", "register"]

S = TypeVar("S", bound=WebSettings)


def register(app: typer.Typer) -> None:
    """Adds the server's commands to `app`."""
    app.command("serve")(_with_settings(_serve, Settings))
    app.command("bridge")(_with_settings(_bridge, BridgeSettings))
    app.command("doctor")(_with_settings(doctor, Settings))
    app.add_typer(keys, name="keys")


def _serve(settings: Settings) -> None:
    """Serve a model over gRPC. Every option has a variable: CALOTYPE_MAX_QUEUE is --max-queue. Options win."""
    try:
        code = asyncio.run(application.serve(settings, partial(_announce, settings)))
    except StartupError as error:
        typer.secho(f"calotype: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    if any(thread.name == LOADING_THREAD for thread in threading.enumerate()):
        # Stopped while loading: torch aborts the process when the interpreter ends under it.
        os._exit(code)
    raise typer.Exit(code)


def _bridge(settings: BridgeSettings) -> None:
    """Let browsers reach a server elsewhere: grpc-web and the page, without a model."""
    try:
        asyncio.run(bridge.serve(settings, partial(_announce_bridge, settings)))
    except StartupError as error:
        typer.secho(f"calotype: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


def _announce_bridge(settings: BridgeSettings, address: str) -> None:
    typer.echo(
        f"""
  Calotype bridges browsers to {", ".join(settings.upstream)}

  page     {_scheme(settings)}://{address}
  stop     Ctrl-C
"""
    )
    sys.stdout.flush()


def _announce(settings: Settings, ready: application.Ready) -> None:
    model = ready.model
    typer.echo(
        f"""
  Calotype serves {model.name} ({model.pipeline}, {model.width}x{model.height}, {model.step_count} steps)
  on {model.device} as {model.dtype}, loaded in {ready.load_seconds:.1f} s

  page     {_scheme(settings)}://{ready.web_address}
  gRPC     {ready.address}
  try      calotype generate "a red apple" -o apple.png{_options(settings, ready.address)}
  stop     Ctrl-C
"""
    )
    sys.stdout.flush()


def _scheme(settings: WebSettings) -> str:
    return "http" if settings.tls_certificate is None else "https"


def _options(settings: Settings, address: str) -> str:
    """What `calotype generate` needs besides, to reach this server."""
    options = "" if address in ("127.0.0.1:50051", "localhost:50051") else f" --address {address}"
    if settings.tls_certificate is not None:
        options += " --tls"
    if settings.tls_client_ca is not None:
        options += " --client-certificate FILE --client-key FILE"
    return options + (" --api-key KEY" if settings.checks_keys else "")


def _with_settings(command: Callable[[S], None], kind: type[S]) -> Callable[..., None]:
    """Returns `command` with one option for each field of its settings, whose sources are then options, environment."""

    def run(**options: Any) -> None:
        given = {name: value for name, value in options.items() if value is not None}
        try:
            settings = kind(**given)
        except pydantic.ValidationError as error:
            for problem in error.errors():
                # A problem of two settings together has no place of its own, and its text names them.
                flag = f"{flag_text(str(problem['loc'][0]))}: " if problem["loc"] else ""
                typer.secho(f"calotype: {flag}{problem['msg'].removeprefix('Value error, ')}", fg="red", err=True)
            raise typer.Exit(2) from None
        command(settings)

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__.strip("_")
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(name, field))
            for name, field in kind.model_fields.items()
        ]
    )
    return run


def _option(name: str, field: pydantic.fields.FieldInfo) -> Any:
    default = default_text(field)
    text = f"{field.description} Default: {default}." if default else field.description
    if field.annotation in (bool, bool | None):
        no = f"/--no-{name.replace('_', '-')}"
        return Annotated[bool | None, typer.Option(flag_text(name) + no, help=text, show_default=False)]
    # As text: pydantic does the parsing, for options and environment alike.
    return Annotated[str | None, typer.Option(flag_text(name), help=text, show_default=False, metavar="VALUE")]


def flag_text(name: str) -> str:
    """Returns the option of a setting."""
    return f"--{name.replace('_', '-')}"


def default_text(field: pydantic.fields.FieldInfo) -> str:
    """Returns the default of a setting, empty when there is none or its description tells."""
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    return "" if default in (None, "") else str(default)
