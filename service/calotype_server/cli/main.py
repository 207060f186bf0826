"""The commands that the server adds to the client's `calotype` script."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING

import typer

from calotype_server.apps import bridge
from calotype_server.apps import server as application
from calotype_server.apps.loading import LOADING_THREAD
from calotype_server.cli.doctor import doctor
from calotype_server.cli.keys import keys
from calotype_server.cli.options import with_settings
from calotype_server.cli.state import state
from calotype_server.errors import StartupError
from calotype_server.settings import BridgeSettings, Settings

if TYPE_CHECKING:
    from calotype_server.settings import WebSettings

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the server's commands to `app`."""
    app.command("serve")(with_settings(_serve, Settings))
    app.command("bridge")(with_settings(_bridge, BridgeSettings))
    app.command("doctor")(with_settings(doctor, Settings))
    app.add_typer(keys, name="keys")
    app.add_typer(state, name="state")


def _serve(settings: Settings) -> None:
    """Serve a model over gRPC.

    Each option has an environment variable: --max-queue is CALOTYPE_MAX_QUEUE. Options override variables.
    """
    try:
        code = asyncio.run(application.serve(settings, partial(_announce, settings)))
    except StartupError as error:
        typer.secho(f"calotype: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    if any(thread.name == LOADING_THREAD for thread in threading.enumerate()):
        # Stopped while loading: torch aborts the process when the interpreter exits while a thread still uses it.
        os._exit(code)
    raise typer.Exit(code)


def _bridge(settings: BridgeSettings) -> None:
    """Serve the web page and grpc-web in front of servers on other machines. Needs no model."""
    try:
        asyncio.run(bridge.serve(settings, partial(_announce_bridge, settings)))
    except StartupError as error:
        typer.secho(f"calotype: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


def _announce_bridge(settings: BridgeSettings, address: str) -> None:
    typer.echo(
        f"""
  Calotype connects browsers to {", ".join(settings.upstream)}

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
  try      calotype generate "a red apple" -o apple.png{_client_options(settings, ready.address)}
  stop     Ctrl-C
"""
    )
    sys.stdout.flush()


def _scheme(settings: WebSettings) -> str:
    return "http" if settings.tls_certificate is None else "https"


def _client_options(settings: Settings, address: str) -> str:
    """Returns the options that `calotype generate` needs to reach this server, each after a space."""
    options = "" if address in ("127.0.0.1:50051", "localhost:50051") else f" --address {address}"
    if settings.tls_certificate is not None:
        options += " --tls"
    if settings.tls_client_ca is not None:
        options += " --client-certificate FILE --client-key FILE"
    return options + (" --api-key KEY" if settings.checks_keys else "")
