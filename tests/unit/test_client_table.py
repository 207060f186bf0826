"""The README's table of clients is generated from test results."""

import json

import pytest

from support import client_table
from support.client_table import BEGIN, CLIENTS, END, NO, rewrite, worst

pytest_plugins = ["pytester"]

PLUGINS = "-p", "support.proofs", "-p", "no:asyncio", "-p", "no:randomly"


def table(outcomes, before=f"# Title\n{BEGIN}{END}after\n"):
    """Returns the cells of the table in a README, by client."""
    text = rewrite(before, outcomes)
    assert text.startswith("# Title\n")
    assert text.endswith("after\n")
    rows = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|"))
    return {row[0]: row[2:] for row in rows}


def test_a_cell_shows_the_result_of_its_tests():
    """Passed, failed and untested cells have different marks, and every client has a row."""
    cells = table({"go streams": "passed", "go cancels": "failed", "java errors": "passed"})
    assert cells["Go"] == ["✓", "✗", NO, NO]
    assert cells["Java"] == [NO, NO, NO, "✓"]
    assert {name for name, _ in CLIENTS.values()} <= set(cells)


def test_a_skipped_test_keeps_its_cell():
    """A missing toolchain does not change the table."""
    committed = rewrite(f"# Title\n{BEGIN}{END}after\n", {"go streams": "passed"})
    cells = table({"go streams": "skipped", "go cancels": "skipped"}, committed)
    assert cells["Go"] == ["✓", NO, NO, NO]


def test_one_failure_fails_the_cell():
    """A cell with several tests passes only if all of them pass."""
    assert worst(["passed", "failed", "skipped"]) == "failed"
    assert worst(["passed", "skipped"]) == "skipped"


@pytest.mark.parametrize("committed", [True, False])
def test_the_check_fails_when_the_table_is_outdated(tmp_path, monkeypatch, capsys, committed):
    """With --check, the command prints the difference and writes nothing; without it, it writes the table."""
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


@pytest.mark.parametrize("fast", [True, False])
def test_a_fast_run_keeps_the_cells_of_slow_tests(tmp_path, monkeypatch, fast):
    """With --fast, a cell without a result keeps its mark; without it, the check fails."""
    readme, results = tmp_path / "README.md", tmp_path / "pytest.json"
    outcomes = {"go streams": "passed", "cpp streams": "passed"}
    readme.write_text(rewrite(f"{BEGIN}{END}", outcomes), encoding="utf-8")
    results.write_text(json.dumps({"go streams": "passed"}), encoding="utf-8")
    monkeypatch.setattr(client_table, "README", readme)
    monkeypatch.setattr(client_table, "PYTEST_RESULTS", results)
    assert client_table.main(["--check", *(["--fast"] if fast else [])]) == (0 if fast else 1)


def test_a_missing_test_of_vitest_is_an_error(tmp_path, monkeypatch):
    """Renaming a test that the table relies on is an error."""
    (tmp_path / "pytest.json").write_text("{}", encoding="utf-8")
    (tmp_path / "web.json").write_text('{"testResults": []}', encoding="utf-8")
    monkeypatch.setattr(client_table, "PYTEST_RESULTS", tmp_path / "pytest.json")
    with pytest.raises(SystemExit, match="cancelling on the page ends the work on the server"):
        client_table.main(["--check"])


def test_results_are_recorded_per_cell(pytester, monkeypatch):
    """The results file has the result of every cell, including parameters and skipped tests."""
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


def test_an_unknown_cell_is_an_error(pytester):
    """A mark for a client that does not exist stops the session."""
    pytester.makepyfile("import pytest\n@pytest.mark.proves('cobol', 'streams')\ndef test_it(): pass")
    result = pytester.runpytest_inprocess(*PLUGINS)
    assert "no cell for 'cobol'" in "".join(result.outlines + result.errlines)
    assert result.ret != 0
