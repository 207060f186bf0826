"""Options of every command: where the server is and how to connect to it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .._channel import TLS

__all__ = ["Server", "with_server_options"]

_PANEL = "Server"


@dataclass(frozen=True)
class Server:
    """Where the server is and how to connect to it. Each field is an option."""

    address: Annotated[
        str,
        typer.Option(
            help="Address of the server.", metavar="HOST:PORT", envvar="CALOTYPE_GRPC_ADDRESS", rich_help_panel=_PANEL
        ),
    ] = "localhost:50051"
    api_key: Annotated[
        str | None,
        typer.Option(
            help="API key, for a server that requires one. The variable keeps it out of the shell history.",
            metavar="KEY",
            envvar="CALOTYPE_API_KEY",
            show_envvar=True,
            rich_help_panel=_PANEL,
        ),
    ] = None
    tls: Annotated[
        bool,
        typer.Option("--tls", help="Encrypt, and trust public CAs.", envvar="CALOTYPE_TLS", rich_help_panel=_PANEL),
    ] = False
    ca_file: Annotated[
        Path | None,
        typer.Option(
            help="Encrypt, and trust the CAs in this PEM file.",
            metavar="FILE",
            envvar="CALOTYPE_CA_FILE",
            rich_help_panel=_PANEL,
        ),
    ] = None
    client_certificate: Annotated[
        Path | None,
        typer.Option(
            help="Encrypt, and present the certificate in this PEM file.",
            metavar="FILE",
            envvar="CALOTYPE_CLIENT_CERTIFICATE",
            rich_help_panel=_PANEL,
        ),
    ] = None
    client_key: Annotated[
        Path | None,
        typer.Option(
            help="PEM file with the private key of the client certificate.",
            metavar="FILE",
            envvar="CALOTYPE_CLIENT_KEY",
            rich_help_panel=_PANEL,
        ),
    ] = None

    @property
    def encrypts(self) -> bool:
        """Whether the connection is encrypted."""
        return self.tls or any((self.ca_file, self.client_certificate, self.client_key))

    def credentials(self) -> TLS | None:
        """Returns the argument `tls` of `Client`.

        Raises:
            ValueError: A file cannot be read, or the client certificate lacks its key.
        """
        if not self.encrypts:
            return None
        if (self.client_certificate is None) != (self.client_key is None):
            raise ValueError("--client-certificate and --client-key go together")
        try:
            ca, chain, key = (
                None if path is None else path.read_bytes()
                for path in (self.ca_file, self.client_certificate, self.client_key)
            )
        except OSError as error:
            raise ValueError(f"Cannot read {error.filename}: {error.strerror}") from None
        return TLS(root_certificates=ca, private_key=key, certificate_chain=chain)


def with_server_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces the argument `server` of a command by the options."""
    options = inspect.signature(Server).parameters

    def run(**given: Any) -> None:
        command(server=Server(**{name: given.pop(name) for name in options}), **given)

    own = inspect.signature(command).parameters.values()
    ours = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *options.values())]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([each for each in ours if each.name != "server"])  # type: ignore[attr-defined]
    return run
