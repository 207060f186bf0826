"""The lint for prose."""

from __future__ import annotations

import subprocess

import pytest

from support import plain_english
from support.plain_english import RULES, check_file

EXAMPLES = [
    "It starts anew.",
    "It has begun.",
    "The client is told.",
    "It tells the client.",
    "It sends a farewell.",
    "The other one likewise.",
    "It shall stop.",
    "Besides, it stops.",
    "It waits in vain.",
    "It fails for want of memory.",
    "It fails, whoever calls.",
    "Nobody waits.",
    "It reads as if it were empty.",
    "The generation goes on.",
    "It hears of the end.",
    "Another starts in its place.",
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_each_example_is_found(text: str) -> None:
    """Each discouraged word or phrase is reported once, with its line and an advice."""
    (finding,) = check_file("a.md", f"# Title\n\nThis is fine.\n{text}\n")
    assert finding.line == 4
    assert finding.advice


def test_every_rule_has_an_example() -> None:
    """No rule is broken: each matches at least one of the examples above."""
    found = {each.advice for text in EXAMPLES for each in check_file("a.md", text)}
    assert found == {advice for _, advice in RULES}


@pytest.mark.parametrize(
    "text",
    [
        "What is left out is the default.",
        "It stops. Who calls again gets the same.",
        "- What a reader sees",
        "| Whose key it is | b |",
        "## What the model knows",
    ],
)
def test_relative_clauses_as_subjects_are_found(text: str) -> None:
    """A sentence, list item, cell or heading must not start with "What ..." or "Who ..." instead of a noun."""
    (finding,) = check_file("a.md", text)
    assert finding.advice.startswith("start with the subject")


@pytest.mark.parametrize(
    "text",
    [
        "The server reports what happened, and who called.",
        "## What is a preview?",
        "What happens after a disconnect depends on the policy.",
        "What to do when memory runs out.",
        "It begins, shallow and ongoing.",
        "Use `told`, ``begun`` or [this](docs/anew-begun.md), see https://example.com/shall/anew.",
        'The prompt "nobody tells whoever goes on" is quoted.',
        "> Nobody is told anew.",
        "```\nNobody is told anew.\n```\n\nFine.\n\n```python\n# Nobody\n```",
        "<!-- begun: told by nobody -->",
    ],
)
def test_clean_text_passes(text: str) -> None:
    """Plain sentences, questions, code, addresses, comments of HTML and quotations are not reported."""
    assert check_file("a.md", text) == []


def test_python_is_checked_in_docstrings_and_comments_only() -> None:
    """Docstrings of modules, classes, functions and attributes, and comments; not names or other strings."""
    source = '''"""Nobody one."""

told = "whoever"  # begun two


class Tells:
    """Fine.

    Anew three.
    """

    shall = 1
    """Likewise four."""

    def goes_on(self):
        """Asks."""
        return f"besides {told}"  # it goes
        # on
'''
    found = [(each.line, each.word) for each in check_file("a.py", source)]
    assert found == [(1, "Nobody"), (3, "begun"), (9, "Anew"), (13, "Likewise"), (16, "Asks."), (17, "goes on")]


def test_a_phrase_is_found_across_lines() -> None:
    """Sentences of comments and docstrings continue on the next line."""
    assert [each.word for each in check_file("a.py", "# It goes\n# on.\n")] == ["goes on"]
    assert [each.word for each in check_file("a.py", '"""It waits in\nvain."""\n')] == ["in vain"]
    assert [each.word for each in check_file("a.ts", "// It goes\n// on.\n")] == ["goes on"]


def test_scripts_are_checked_in_comments_only() -> None:
    """TypeScript, JavaScript and protos are checked in both kinds of comments, not in code, strings or patterns."""
    source = """/**
 * Nobody one.
 */
const told = "// begun", shall = `/* anew */ ${told}`, pattern = /["']\\/\\/ farewell/;
// likewise five
"""
    for name in ("a.ts", "a.js", "a.proto"):
        assert [(each.line, each.word) for each in check_file(name, source)] == [(2, "Nobody"), (5, "likewise")]


def test_makefiles_are_checked_in_help_and_comments() -> None:
    """The text after `##` and lines that are comments are prose; recipes are not."""
    source = "# Nobody.\nrun: $(READY) ## start anew\n\techo begun # told\n"
    assert [(each.line, each.word) for each in check_file("Makefile", source)] == [(1, "Nobody"), (2, "anew")]


def test_the_changelog_is_checked_in_its_newest_section() -> None:
    """Older sections are history."""
    source = "# Changelog\n\n## 2.0\n\n- Nobody.\n\n## 1.0\n\n- Begun.\n"
    assert [each.line for each in check_file("CHANGELOG.md", source)] == [5]


def test_generated_and_other_files_are_not_checked() -> None:
    """Generated code, licences and other kinds of files may contain anything."""
    for name in ("client/python/calotype/v1/calotype_pb2.pyi", "client/typescript/src/gen/a.ts", "LICENSE", "a.txt"):
        assert check_file(name, "// Nobody is told anew.") == []


def test_the_command_prints_findings_and_fails(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each finding is a line, and the exit code is 1; without findings the command prints nothing and returns 0."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(plain_english, "ROOT", tmp_path)
    (tmp_path / "good.md").write_text("The client retries.\n")
    assert plain_english.main([]) == 0
    (tmp_path / "bad.md").write_text("\nThe client is told.\n")
    assert plain_english.main(["good.md"]) == 0
    assert plain_english.main([]) == 1
    assert capsys.readouterr().out.startswith("bad.md:2: told -> ")
