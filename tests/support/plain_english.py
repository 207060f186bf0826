"""A lint for prose: `python -m support.plain_english [PATH ...]`, part of `make lint`.

Finds words and phrases that make text hard to read for people who do not know the project, in comments and docstrings
of Python, comments of TypeScript, JavaScript, protos and Makefiles, the help of Makefiles, and Markdown. Prints
`FILE:LINE: WORD -> ADVICE` for each and exits with code 1 if there are any. Code, URLs and quoted text are not checked.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["RULES", "Block", "Finding", "check_file", "main"]

ROOT = Path(__file__).parents[2]

RULES: tuple[tuple[str, str], ...] = (
    (r"anew", "again, from the start"),
    (r"begun", "started"),
    (r"told|tells", "programs return, report, send, show; for 'told apart': distinguish"),
    (r"farewell", "the name of the last message"),
    (r"likewise", "also, or repeat the fact"),
    (r"shall", "must, will, or the present tense"),
    (r"besides", "in addition to, also, except"),
    (r"in\s+vain", "without success"),
    (r"for\s+want\s+of", "because there is no ..."),
    (r"(?:who|whom|what)so?ever|whoever|whomever", "name the thing: the client, any caller"),
    (r"everybody|nobody|anybody", "name the thing: every caller, no client"),
    (r"as\s+if\s+it\s+were", "as a, like a"),
    (r"(?:go|goes|went|gone|going)\s+on", "continue"),
    (r"(?:hear|hears|heard)\s+of", "receive, learn"),
    (r"in\s+(?:its|their)\s+place", "instead"),
)
"""Regular expressions of whole words, ignoring case, and how to replace them."""

_OPENING = re.compile(
    # At the start of a text, a sentence, a list item, a table cell or a heading. Questions are fine, and so are
    # "What happens ..." and "What to do ...".
    r"(?:\A|[.!?:;]\s+|(?:\A|\n)\s*(?:[-*]|\d+\.)\s|\||#\s)[\s*_]*(?P<word>What|Who|Whom|Whose)\s(?!happens\b|to\b|[^.!?|]*\?)"
)
_OPENING_ADVICE = "start with the subject: name the thing"
_FRAGMENT_ADVICE = "write a sentence"

_COMPILED = [(re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE), advice) for pattern, advice in RULES]

_NOT_PROSE = re.compile(
    r"```.*?```|``[^`]+``|`[^`]*`"  # code
    r"|https?://\S+|\]\([^)]*\)"  # addresses
    r"|<!--.*?-->|<[A-Za-z/][^<>]*>"  # comments and elements of HTML
    r'|"[^"\n]{1,120}"|“[^”]{1,120}”',  # quotations
    re.DOTALL,
)

_GENERATED = ("client/python/calotype/v1/", "client/typescript/src/gen/", "service/calotype_server/page/")

_SCRIPT_TOKEN = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`)"""
    r"|(?P<regex>(?<=[(,=:\[!&|?{};\s])/(?![/*])(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n\[])+/)"
    r"|(?P<comment>//[^\n]*(?:\n[ \t]*//[^\n]*)*|/\*.*?\*/)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of prose: its text, the line on which it starts, and whether it is a docstring."""

    line: int
    text: str
    is_docstring: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """A word to replace; `line` starts at 1."""

    line: int
    word: str
    advice: str


def _blank(match: re.Match[str]) -> str:
    """Replaces all but line ends with spaces, so that lines keep their numbers."""
    return re.sub(r"[^\n]", " ", match[0])


def _python(source: str) -> Iterator[Block]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for number, statement in enumerate(node.body):
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    value = statement.value.value
                    if isinstance(value, str):
                        # Later ones describe attributes, often by nothing but a unit.
                        yield Block(statement.lineno, value, is_docstring=number == 0)
    comments = [
        token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT
    ]
    yield from _joined([(token.start[0], token.string.lstrip("#!")) for token in comments])


def _joined(lines: list[tuple[int, str]]) -> Iterator[Block]:
    """Joins comments on consecutive lines, because sentences continue on the next line."""
    start, texts = 0, list[str]()
    for line, text in lines:
        if texts and line != start + len(texts):
            yield Block(start, "\n".join(texts))
            texts = []
        if not texts:
            start = line
        texts.append(text)
    if texts:
        yield Block(start, "\n".join(texts))


def _script(source: str) -> Iterator[Block]:
    """Comments of TypeScript, JavaScript and protos."""
    for match in _SCRIPT_TOKEN.finditer(source):
        if match["comment"] is not None:
            text = re.sub(r"^[ \t]*(?://+|/?\*+/?)|\*/$", "", match[0], flags=re.MULTILINE)
            yield Block(source.count("\n", 0, match.start()) + 1, text)


def _markdown(source: str) -> Iterator[Block]:
    # Quotations, indented code and tables of contents are not ours to reword; fences are blanked with other code.
    source = re.sub(r"^```.*?^```|^[ ]*>[^\n]*", _blank, source, flags=re.MULTILINE | re.DOTALL)
    for match in re.finditer(r"(?:[^\n]*\S[^\n]*(?:\n|\Z))+", source):
        yield Block(source.count("\n", 0, match.start()) + 1, match[0])


def _changelog(source: str) -> Iterator[Block]:
    """Only the newest section: older ones are history."""
    sections = [match.start() for match in re.finditer(r"^## ", source, re.MULTILINE)]
    return _markdown(source[: sections[1]] if len(sections) > 1 else source)


def _makefile(source: str) -> Iterator[Block]:
    lines = enumerate(source.splitlines(), 1)
    found = [(number, re.match(r"\s*#+(.*)|\S+:.*## (.*)", line)) for number, line in lines]
    yield from _joined([(number, match[1] or match[2] or "") for number, match in found if match])


def _reader(name: str) -> Callable[[str], Iterator[Block]] | None:
    """Returns the function that finds the prose in a file; None for files that are not checked."""
    path = Path(name)
    if name.startswith(_GENERATED) or "node_modules" in path.parts:
        return None
    if path.name == "CHANGELOG.md":
        return _changelog
    if path.name == "Makefile":
        return _makefile
    suffixes = {".py": _python, ".ts": _script, ".js": _script, ".mjs": _script, ".proto": _script, ".md": _markdown}
    return suffixes.get(path.suffix)


def _check(block: Block) -> Iterator[Finding]:
    text = _NOT_PROSE.sub(_blank, block.text)
    for pattern, advice in _COMPILED:
        for match in pattern.finditer(text):
            word = " ".join(match[0].split())
            yield Finding(block.line + text.count("\n", 0, match.start()), word, advice)
    for match in _OPENING.finditer(text):
        yield Finding(block.line + text.count("\n", 0, match.start("word")), f"{match['word']} ...", _OPENING_ADVICE)
    words = block.text.split()
    if block.is_docstring and len(words) == 1:
        yield Finding(block.line, words[0], _FRAGMENT_ADVICE)


def check_file(name: str, source: str) -> list[Finding]:
    """Returns the findings of a file in the order of its lines; none for kinds of files that are not checked.

    Args:
        name: Path from the root of the repository; decides how prose is found.
        source: Content of the file.
    """
    reader = _reader(name)
    if reader is None:
        return []
    return sorted((each for block in reader(source) for each in _check(block)), key=lambda each: each.line)


def main(paths: Sequence[str]) -> int:
    """Checks all files of the repository, or those below `paths`, and returns the exit code."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *paths]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = 0
    for name in names:
        path = ROOT / name
        if _reader(name) is None or not path.is_file():
            continue
        for each in check_file(name, path.read_text(encoding="utf-8")):
            found += 1
            sys.stdout.write(f"{name}:{each.line}: {each.word} -> {each.advice}\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
