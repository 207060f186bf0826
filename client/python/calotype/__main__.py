"""The `calotype` script: the commands of the client and, where its extra is installed, those of the server."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]


def main() -> None:
    """Runs the command line."""
    if any(find_spec(name) is None for name in ("typer", "rich", "textual_image", "PIL")):
        sys.stderr.write("The command line needs an extra: pip install 'calotype[cli]'\n")
        raise SystemExit(2)

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
