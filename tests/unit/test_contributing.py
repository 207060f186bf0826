"""The documents for contributors name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "service" / "calotype_server"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "service" / "README.md").read_text(encoding="utf-8")

PATHS = sorted(set(re.findall(r"`([\w./-]+(?:\.(?:py|md|ts|proto)|/))`", CONTRIBUTING)))
"""Files and folders in backticks, relative to the repository or to the server's package."""

ROWS = re.findall(r"^\| (?:\*\*)?(\[.*)", ARCHITECTURE.partition("## The mechanisms")[0], re.MULTILINE)
"""Rows of the module table, without the leading bar."""


def linked(row: str) -> list[str]:
    """The targets of a row's links into the server's package, relative to `service/`."""
    return [link for link in re.findall(r"\]\(([^)]+)\)", row) if link.startswith("calotype_server")]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_in_contributing_exists(path: str) -> None:
    """CONTRIBUTING.md names no file that was moved or removed."""
    assert (ROOT / path).exists() or (SERVER / path).exists()


def test_every_make_target_in_contributing_exists() -> None:
    """CONTRIBUTING.md names no target that the Makefile lacks."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", CONTRIBUTING, re.MULTILINE))
    assert named - targets == set()


@pytest.mark.parametrize("link", sorted({link for row in ROWS for link in linked(row)}))
def test_every_link_in_the_module_table_exists(link: str) -> None:
    """The module table in service/README.md links to no file that was moved or removed."""
    assert (ROOT / "service" / link).exists()


@pytest.mark.parametrize("row", [row for row in ROWS if "(`" in row], ids=lambda row: linked(row)[0])
def test_every_module_named_in_a_row_belongs_to_its_package(row: str) -> None:
    """A row about a package names modules of that package by their file name without `.py`."""
    folder = ROOT / "service" / linked(row)[0]
    names = re.findall(r"`(\w+)`", row.partition(" | ")[2])
    assert [name for name in names if not (folder / f"{name}.py").exists()] == []


def test_the_module_table_covers_every_package() -> None:
    """Each package and each top-level module of the server has a row."""
    covered = {SERVER.parent / link for row in ROWS for link in linked(row)}
    modules = [path for path in SERVER.iterdir() if path.suffix == ".py" and not path.name.startswith("__")]
    packages = [path.parent for path in SERVER.rglob("__init__.py") if path.parent != SERVER]
    assert [path for path in (*modules, *packages) if path not in covered] == []


def test_the_questions_of_newcomers_are_answered() -> None:
    """CONTRIBUTING.md answers the questions that newcomers ask first, each with at least one file."""
    table = re.findall(r"^\| (Where [^|]*\?) \| ([^|]*) \|", CONTRIBUTING, re.MULTILINE)
    answers = {question: re.findall(r"`([\w/]+\.py)`", answer) for question, answer in table}
    for question in ("a slow reader handled", "a batch formed", "a cancel arrive", "restarts handled"):
        assert any(question in asked and files for asked, files in answers.items()), question
    for thing in ("A preview method", "A transport", "A request field"):
        assert f"**{thing}**" in CONTRIBUTING
