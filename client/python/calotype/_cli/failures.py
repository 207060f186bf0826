"""Messages and exit codes of commands."""

import sys
from typing import NoReturn

import typer

from .._errors import CalotypeError, InvalidRequest, Unauthenticated, Unavailable
from .options import option_name
from .server_options import Server

__all__ = [
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_UNAVAILABLE",
    "EXIT_USAGE",
    "exit_code",
    "exit_with",
    "explain",
]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_INTERRUPTED = 130


def exit_with(text: str, code: int) -> NoReturn:
    """Prints a message on stderr and ends the program."""
    sys.stderr.write(text + "\n")
    raise typer.Exit(code)


def exit_code(error: CalotypeError) -> int:
    """Returns 2 for a request that can never succeed, 3 for an unreachable server, and 1 for anything else."""
    if isinstance(error, InvalidRequest):
        return EXIT_USAGE
    return EXIT_UNAVAILABLE if isinstance(error, Unavailable) else EXIT_FAILED


def explain(error: CalotypeError, server: Server) -> str:
    """Describes an error and, where there is one, the remedy."""
    # Only a server sets a reason: without one, no server answered.
    if isinstance(error, Unavailable) and not error.reason:
        return _explain_unreachable(error, server)
    if isinstance(error, Unauthenticated):
        return f"{error} Pass a key with --api-key KEY or the environment variable CALOTYPE_API_KEY."
    if isinstance(error, InvalidRequest) and error.violations:
        lines = [f"  {option_name(field)}: {text}" for field, text in error.violations]
        return "\n".join(["The request is not valid:", *lines])
    text = str(error)
    if error.retry_after is not None:
        text += f" Try again in {error.retry_after:.0f} s."
    return text


def _explain_unreachable(error: CalotypeError, server: Server) -> str:
    if server.encrypts:
        return f"No Calotype server with a trusted certificate answers at {server.address}; see --ca-file"
    if "Socket closed" in error.message or "reset" in error.message:
        return f"The server at {server.address} closed the connection; if it uses TLS, add --tls"
    return f"No Calotype server answers at {server.address}; start one with: calotype serve"
