"""The README's table of clients says what the tests say."""

import json

import pytest

from support import client_table
from support.client_table import BEGIN, CLIENTS, END, NO, rewrite, worst

pytest_plugins = ["pytester"]

PLUGINS = "-p", "support.proofs", "-p", "no:asyncio", "-p", "no:randomly"


def table(outcomes, before=f"# Title\n{BEGIN}{END}after\n"):
    """The cells of a README, by client."""
    text = rewrite(before, outcomes)
    assert text.startswith("# Title\n")
    assert text.endswith("after\n")
    rows = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|"))
    return {row[0]: row[2:] for row in rows}


def test_a_cell_is_what_its_tests_say():
    """Passed, failed and unproven cells differ, and every client has a row."""
    cells = table({"go streams": "passed", "go cancels": "failed", "java errors": "passed"})
    assert cells["Go"] == ["✓", "✗", NO, NO]
    assert cells["Java"] == [NO, NO, NO, "✓"]
    assert {name for name, _ in CLIENTS.values()} <= set(cells)


def test_a_skipped_cell_stays_as_it_was():
    """Who lacks a toolchain neither adds nor takes away."""
    committed = rewrite(f"# Title\n{BEGIN}{END}after\n", {"go streams": "passed"})
    cells = table({"go streams": "skipped", "go cancels": "skipped"}, committed)
    assert cells["Go"] == ["✓", NO, NO, NO]


def test_one_failure_outweighs_what_passed():
    """A cell that several tests prove needs all of them."""
    assert worst(["passed", "failed", "skipped"]) == "failed"
    assert worst(["passed", "skipped"]) == "skipped"


@pytest.mark.parametrize("committed", [True, False])
def test_the_check_fails_when_the_table_is_not_what_the_tests_say(tmp_path, monkeypatch, capsys, committed):
    """The difference is shown, and nothing is written; the command without --check writes the table."""
    readme, results = tmp_path / "README.md", tmp_path / "pytest.json"
    readme.write_text(f"{BEGIN}{END}", encoding="utf-8")
    results.write_text(json.dumps({"go streams": "passed"}), encoding="utf-8")
    monkeypatch.setattr(client_table, "README", readme)
    monkeypatch.setattr(client_table, "PYTEST_RESULTS", results)
    if committed:
        assert client_table.main([]) == 0
    before = readme.read_text(encoding="utf-8")
    assert client_table.main(["--check"]) == (0 if committed else 1)
    assert readme.read_text(encoding="utf-8") == before
    assert ("+| Go |" in capsys.readouterr().out) != committed


def test_a_vanished_test_of_vitest_is_told(tmp_path, monkeypatch):
    """A test that the table relies on and that was renamed does not go unnoticed."""
    (tmp_path / "pytest.json").write_text("{}", encoding="utf-8")
    (tmp_path / "web.json").write_text('{"testResults": []}', encoding="utf-8")
    monkeypatch.setattr(client_table, "PYTEST_RESULTS", tmp_path / "pytest.json")
    with pytest.raises(SystemExit, match="cancelling on the page ends the work on the server"):
        client_table.main(["--check"])


def test_marks_are_recorded_also_of_parameters_and_skips(pytester, monkeypatch):
    """What passed, failed and was skipped is written down by cell."""
    monkeypatch.setattr("support.proofs.PYTEST_RESULTS", pytester.path / "results.json")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.proves("{language}", "streams")
        @pytest.mark.parametrize("language", ["go", "java", "ruby"])
        def test_language(language):
            if language == "java":
                pytest.skip("no toolchain")
            assert language == "go"

        @pytest.mark.proves("go", "streams")
        def test_another():
            pass
        """
    )
    pytester.runpytest_inprocess(*PLUGINS).assert_outcomes(passed=2, failed=1, skipped=1)
    results = json.loads((pytester.path / "results.json").read_text(encoding="utf-8"))
    assert results == {"go streams": "passed", "java streams": "skipped", "ruby streams": "failed"}


def test_a_cell_that_does_not_exist_is_an_error(pytester):
    """A slip of the pen in a mark stops the session."""
    pytester.makepyfile("import pytest\n@pytest.mark.proves('cobol', 'streams')\ndef test_it(): pass")
    result = pytester.runpytest_inprocess(*PLUGINS)
    assert "no cell for 'cobol'" in "".join(result.outlines + result.errlines)
    assert result.ret != 0
