"""Runs `calotype` with faults: `python -m support.faults.server store.end=exit@2 -- serve --state DIR`.

`support.faults` describes the faults. `--control FILE` reads other ones from a file whenever it changes, and `--seed N`
sets the seed of their probabilities.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from calotype.__main__ import main as calotype
from support.faults import Fault, Faults


def main(arguments: list[str]) -> None:
    """Runs the command after `--` with the faults before it."""
    separator = arguments.index("--")
    parser = argparse.ArgumentParser("failing_server")
    parser.add_argument("faults", nargs="*", type=Fault.parse)
    parser.add_argument("--control", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments[:separator])
    sys.argv[1:] = arguments[separator + 1 :]
    with Faults(options.faults, seed=options.seed, control=options.control):
        calotype()


if __name__ == "__main__":
    main(sys.argv[1:])
