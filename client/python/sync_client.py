"""Generates the sync client, `calotype/_sync`, from the asyncio client, `calotype/_async`.

Usage::

    python sync_client.py           # writes the files
    python sync_client.py --check   # exits with 1 and prints a diff when the files are out of date

The conversion replaces keywords and names, line by line, in code and docstrings alike, and then formats the result with
ruff. Everything that differs in more than names is in `calotype/_backends`.
"""

import difflib
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "calotype"
SOURCE, TARGET = PACKAGE / "_async", PACKAGE / "_sync"
HEADER = "# Generated from calotype/_async/{name} by `make sync-client`; do not edit.\n"

NAMES = [
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsync(?=[A-Z])", ""),
    (r"\b__a(enter|exit|iter)__", r"__\1__"),
    (r"\ba(close|closing|iter|next)\b", r"\1"),
    (r"\b_backends\.aio\b", "_backends.threads"),
    (r"\b_async\b", "_sync"),
]
"""Regular expressions and their replacements."""

SENTENCES = {
    "The asyncio client: the source from which `make sync-client` generates `_sync`.": "The sync client.",
    "The client belongs to the event loop that makes its first call.": "The client is thread-safe.",
    (
        "Cancelling the task that runs the loop also cancels the generation. "
        "After a `break`, the event loop cancels when it\n    next runs; "
        "leaving an `async with` block cancels immediately."
    ): (
        "Python implementations without reference counting, such as PyPy, "
        "may cancel some time after a `break`; leaving\n    a `with` block cancels immediately."
    ),
}
"""Text that is different for threads. Each entry must occur, so that a changed source cannot skip it."""


def convert(code: str) -> str:
    """Converts the source of an asyncio module."""
    for before, after in SENTENCES.items():
        code = code.replace(before, after)
    for pattern, replacement in NAMES:
        code = re.sub(pattern, replacement, code)
    return code


def unused_sentences(codes: list[str]) -> list[str]:
    """Returns the entries of `SENTENCES` that occur in no source."""
    return [before for before in SENTENCES if not any(before in code for code in codes)]


def tidy(code: str, path: Path) -> str:
    """Sorts imports and formats, with the project's settings for `path`."""
    for command in (["check", "--select", "I", "--fix", "--quiet"], ["format", "--quiet"]):
        arguments = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(path), "-"]
        code = subprocess.run(arguments, input=code, capture_output=True, text=True, check=True).stdout
    return code


def generate() -> dict[Path, str]:
    """Returns the content of each file of the sync client.

    Raises:
        ValueError: An entry of `SENTENCES` occurs in no source.
    """
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(SOURCE.glob("*.py"))}
    if unused := unused_sentences(list(sources.values())):
        raise ValueError(f"SENTENCES has text that occurs in no source: {unused}")
    targets = {}
    for path, code in sources.items():
        target = TARGET / path.name
        targets[target] = tidy(HEADER.format(name=path.name) + convert(code), target)
    return targets


def differences(targets: dict[Path, str]) -> str:
    """Returns a diff from the files on disk to `targets`, empty when they are equal."""
    lines: list[str] = []
    for path in sorted({*targets, *TARGET.glob("*.py")}):
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = targets.get(path, "")
        name = str(path.relative_to(PACKAGE.parent))
        lines += difflib.unified_diff(
            old.splitlines(keepends=True), new.splitlines(keepends=True), name, f"{name} (generated)"
        )
    return "".join(lines)


def main(arguments: list[str]) -> int:
    """Writes the files, or checks them. Returns the exit code."""
    targets = generate()
    if arguments == ["--check"]:
        if difference := differences(targets):
            sys.stderr.write(f"{difference}\nThe sync client is out of date. Run: make sync-client\n")
        return int(bool(difference))
    TARGET.mkdir(exist_ok=True)
    for path in set(TARGET.glob("*.py")) - set(targets):
        path.unlink()
    for path, code in targets.items():
        path.write_text(code, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
