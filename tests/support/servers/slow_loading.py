"""Runs `calotype` with a model that loads only after another process has opened the named pipe LOAD_WHEN to write."""

from __future__ import annotations

import os
from pathlib import Path

from calotype.__main__ import main
from calotype_server.engine import factory

_load_engine = factory.load_engine


def _load_when_allowed(*arguments):
    # Opening a named pipe waits for the other end.
    Path(os.environ["LOAD_WHEN"]).open("rb").close()
    return _load_engine(*arguments)


factory.load_engine = _load_when_allowed

if __name__ == "__main__":
    main()
