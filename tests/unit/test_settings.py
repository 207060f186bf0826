"""What an operator may set, and what contradicts itself."""

from __future__ import annotations

import os

import pydantic
import pytest
import typer
from typer.testing import CliRunner

from calotype_server.cli import main
from calotype_server.settings import Settings
from calotype_server.types import PreviewMethod, PreviewOptions


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("CALOTYPE_"):
            monkeypatch.delenv(name)


def test_limits_are_the_settings() -> None:
    """Every preview setting arrives where requests are held to it."""
    limits = Settings(
        preview_method=PreviewMethod.HEAD,
        preview_methods="head, tiny_vae",
        preview_every_steps=3,
        preview_min_interval=0.5,
        preview_edge=200,
        preview_quality=60,
        max_preview_edge=300,
        max_preview_quality=70,
    ).limits
    assert limits.preview == PreviewOptions(3, 0.5, 200, 60, PreviewMethod.HEAD)
    assert (limits.max_preview_edge, limits.max_preview_quality) == (300, 70)
    assert limits.preview_methods == {PreviewMethod.HEAD, PreviewMethod.TINY_VAE}


def test_defaults_allow_everything() -> None:
    """Out of the box, any method may be asked for, and the budget chooses."""
    limits = Settings().limits
    assert limits.preview == PreviewOptions()
    assert limits.preview_methods == {PreviewMethod.HEAD, PreviewMethod.TINY_VAE, PreviewMethod.FULL_VAE}


def test_a_default_that_was_not_chosen_follows_the_ceiling() -> None:
    """Lowering the ceilings alone is enough."""
    limits = Settings(max_preview_edge=100, max_preview_quality=40).limits
    assert (limits.preview.max_edge, limits.preview.quality) == (100, 40)


def test_the_environment_is_a_choice_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default from a variable above a ceiling from a flag is a contradiction, not one that gives way."""
    monkeypatch.setenv("CALOTYPE_PREVIEW_EDGE", "512")
    with pytest.raises(pydantic.ValidationError, match="preview_edge is above max_preview_edge"):
        Settings(max_preview_edge=256)


def test_no_method_at_all_may_be_allowed() -> None:
    """Previews can be switched off for good."""
    assert Settings(preview_methods="").limits.preview_methods == frozenset()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preview-edge", "900", "--max-preview-edge", "800"], ["preview_edge is above max_preview_edge"]),
        (["--preview-quality", "90", "--max-preview-quality", "80"], ["preview_quality is above max_preview_quality"]),
        (
            ["--preview-method", "full_vae", "--preview-methods", "head,tiny_vae"],
            ["preview_method full_vae is not among preview_methods"],
        ),
        (["--preview-methods", "head,taesd"], ["--preview-methods", "'head,taesd'", "full_vae, head, tiny_vae"]),
        (["--preview-methods", "none"], ["--preview-methods", "'none'"]),
        (["--preview-method", "best"], ["--preview-method", "'auto'"]),
        (["--preview-every-steps", "0"], ["--preview-every-steps", "greater than or equal to 1"]),
        (["--preview-min-interval", "61"], ["--preview-min-interval", "60"]),
        (["--preview-budget", "0"], ["--preview-budget", "greater than 0"]),
        (["--max-preview-quality", "96"], ["--max-preview-quality", "95"]),
        (["--max-preview-edge", "15"], ["--max-preview-edge", "16"]),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(options: list[str], words: list[str]) -> None:
    """Exit code 2, one line, no traceback; settings that contradict each other are both named."""
    app = typer.Typer()
    app.callback()(lambda: None)
    main.register(app)
    result = CliRunner().invoke(app, ["serve", *options])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("calotype: ")
    assert all(word in line for word in words)
