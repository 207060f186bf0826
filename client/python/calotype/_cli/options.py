"""Options of `generate` and `watch`, and which option sets which argument of `Client.generate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .._options import Lora

__all__ = [
    "FILES",
    "OPTION_NAMES",
    "PREVIEWS",
    "Filmstrip",
    "GenerationId",
    "Json",
    "OutputFile",
    "PreviewFolder",
    "Retries",
    "Timeout",
    "option_name",
    "parse_loras",
]

PREVIEWS, FILES = "Previews", "Files"

OPTION_NAMES = {
    "prompt": "prompt",
    "loras": "--lora",
    "prompt_syntax": "--weighted",
    "n": "--count",
    "previews.every_steps": "--preview-every",
    "previews.min_interval": "--preview-interval",
    "previews.max_edge": "--preview-edge",
    "previews.quality": "--preview-quality",
    "previews.method": "--preview-method",
    "output.format": "--format",
    "output.quality": "--quality",
    "output.metadata": "--no-metadata",
}
"""Options that are not named after their argument."""


def option_name(argument: str) -> str:
    """Returns the option that sets an argument of `Client.generate`, such as "--guidance-scale"."""
    if argument.startswith("loras"):
        argument = "loras"  # of all LoRAs, such as loras[0].name
    return OPTION_NAMES.get(argument, f"--{argument.replace('_', '-')}")


def parse_loras(given: Sequence[str]) -> list[Lora] | None:
    """Returns the LoRAs of options such as "pixel-art:0.8"; without a number, the scale is 1. None for no options."""
    return [_parse_lora(each) for each in given] or None


def _parse_lora(text: str) -> Lora:
    name, colon, scale = text.rpartition(":")
    try:
        return Lora(name, float(scale)) if colon else Lora(text)
    except ValueError:
        return Lora(text)


GenerationId = Annotated[str, typer.Argument(help="A generation_id from `list` or `generate --json`.")]
Timeout = Annotated[
    float | None, typer.Option(help="Maximum seconds to wait for the image, including time in the queue.")
]
Retries = Annotated[int, typer.Option(help="Maximum number of consecutive attempts to reconnect.")]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="File for the image. The suffix .jpg, .png or .webp sets the format.",
        show_default="calotype-SEED.png",
        rich_help_panel=FILES,
    ),
]
PreviewFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Save every preview in this folder.", rich_help_panel=FILES)
]
Filmstrip = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Save previews and image side by side, as a PNG.", rich_help_panel=FILES),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
