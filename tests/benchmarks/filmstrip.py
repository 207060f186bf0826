"""Draws the README's first picture with the product itself: `make filmstrip`."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.process import CALOTYPE, ServerProcess

PROMPT = "a red apple"
SEED = 1
TARGET = Path("service/filmstrip.png")


def main() -> None:
    """Starts a server, generates one image and saves its filmstrip."""
    Path("build").mkdir(exist_ok=True)
    with ServerProcess() as server:
        command = [*CALOTYPE, "generate", PROMPT, "--address", server.address, "--seed", str(SEED)]
        subprocess.run([*command, "-o", "build/apple.png", "--filmstrip", str(TARGET)], check=True)


if __name__ == "__main__":
    main()
