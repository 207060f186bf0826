"""The `calotype` command: the client's commands and, if they are installed, the server's."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

__all__ = ["main"]


def main() -> None:
    """Runs the command line. Exits with 2 when the packages that it needs are not installed."""
    if any(find_spec(name) is None for name in ("typer", "rich", "textual_image", "PIL")):
        sys.stderr.write("The command line needs an extra: pip install 'calotype[cli]'\n")
        raise SystemExit(2)

    for name, value in os.environ.items():
        # An empty variable counts as unset, and so does one that only looks empty.
        if name.startswith("CALOTYPE_") and value.isspace():
            os.environ[name] = ""

    from ._cli.main import app, register_missing_server

    try:
        from calotype_server.cli.main import register
    except ImportError as error:
        register_missing_server(str(error))
    else:
        register(app)
    app()


if __name__ == "__main__":
    main()
