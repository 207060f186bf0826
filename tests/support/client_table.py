"""Generates the README's table of clients from test results: `python -m support.client_table [--check] [--fast]`.

A cell is ✓ when all of its tests passed. Python tests name their cell with `@pytest.mark.proves(client, ability)`, see
`support.proofs`; the tests of the TypeScript client and the page are listed here. A cell whose tests were skipped,
because a toolchain is missing, keeps its mark. So does one whose tests did not run, with `--fast`, as in `make test`.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from pathlib import Path
from typing import TypeAlias

__all__ = ["ABILITIES", "CLIENTS", "PYTEST_RESULTS", "Outcomes", "main", "rewrite", "worst"]

Outcomes: TypeAlias = dict[str, str]
"""The result of each cell, "client ability": passed, skipped or failed."""

ABILITIES = {"streams": "streams", "cancels": "cancels", "resumes": "resumes", "errors": "errors with details"}
CLIENTS = {
    "python": ("Python", "`pip install calotype`, `Client`"),
    "python-async": ("Python, asyncio", "the same, `AsyncClient`"),
    "cli": ("command line", "`calotype generate`, `watch`, `list`, `finish`"),
    "notebook": ("notebook", "[`calotype.notebook.show`](client/python/examples/notebook.ipynb)"),
    "typescript": ("TypeScript, `<calotype-view>`", "[client/typescript](client/typescript/README.md)"),
    "page": ("browser", "the page of the service"),
    "openai": ("OpenAI's SDK for Python", "[HTTP](service/HTTP.md): only `base_url` changes"),
    "openai-node": ("OpenAI's SDK for Node", "the same"),
    "sse": ("EventSource, `curl -N`", "[HTTP](service/HTTP.md): server-sent events"),
    "websocket": ("WebSocket", "[HTTP](service/HTTP.md): several generations per socket"),
    "node": ("Node, grpc-js", "[client/node](client/node/generate.js)"),
    "connect": ("TypeScript, connect-node", "[client/connect](client/connect/generate.ts)"),
    "go": ("Go", "[client/go](client/go/generate.go)"),
    "cpp": ("C++", "[client/cpp](client/cpp/generate.cc)"),
    "ruby": ("Ruby", "[client/ruby](client/ruby/generate.rb)"),
    "java": ("Java", "[client/java](client/java/Generate.java)"),
}
"""The name of each client in the table, and how to get it."""

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BEGIN, END = "<!-- client table: made by `make client-table` -->\n", "<!-- end of the client table -->\n"
PYTEST_RESULTS = ROOT / "build" / "proofs" / "pytest.json"

_NODE_SDK = "over HTTP OpenAI's SDK raises its own errors, and leaving its stream cancels"

VITEST = {
    "typescript.json": {
        "typescript cancels": ["leaving a generation by cancel() aborts a quiet call and throws CANCELLED"],
        "typescript resumes": [
            "a lost connection is resumed after the last message, with the same request id if the server lost the "
            "generation"
        ],
    },
    "web.json": {
        "typescript streams": [
            "with the bundled model the client streams progress, previews and the final picture in Node"
        ],
        "typescript errors": ["with the bundled model the client lists every violation"],
        "page streams": [
            "with the bundled model the page generates a picture: distinct previews in order, full progress, download "
            "and filmstrip"
        ],
        "page cancels": ["with the bundled model cancelling on the page ends the work on the server"],
        "page resumes": [
            "the page resumes and shows the same picture after the service is killed and replaced by a new process",
            "with the bundled model a picture continues after a reload, and is the same as without one",
        ],
        "openai-node streams": ["over HTTP OpenAI's SDK streams partial images"],
        "openai-node cancels": [_NODE_SDK],
        "openai-node errors": [_NODE_SDK],
        "sse resumes": [
            "over HTTP an EventSource resumes after a lost connection, and does not reconnect after the end"
        ],
        "page errors": ["the page, if something goes wrong, lists every invalid field with the label of the form"],
    },
}
"""Full names of the tests behind the cells, by the file of vitest's JSON."""

NO = "-"
"""Mark of a cell that has no test."""

_SEVERITY = ("passed", "skipped", "failed")


def worst(outcomes: list[str]) -> str:
    """Returns the result of a cell that has several tests."""
    return max(outcomes, key=_SEVERITY.index)


def rewrite(readme: str, outcomes: Outcomes) -> str:
    """Returns the README with a table generated from these outcomes."""
    before, _, rest = readme.partition(BEGIN)
    committed, end, after = rest.partition(END)
    if not end:
        raise SystemExit("README.md has no markers for the table of clients.")
    rows = ["client", "how", *ABILITIES.values()], ["---"] * (2 + len(ABILITIES)), *_cells(committed, outcomes)
    return "".join([before, BEGIN, *(f"| {' | '.join(row)} |\n" for row in rows), END, after])


def _cells(committed: str, outcomes: Outcomes) -> list[list[str]]:
    marks = {"passed": "✓", "failed": "✗"}
    split = (re.split(r" *\| *", line.strip("| ")) for line in committed.splitlines())
    old = {(row[0], ability): mark for row in split for ability, mark in zip(ABILITIES, row[2:], strict=False)}
    marked = []
    for client, (name, how) in CLIENTS.items():
        results = {ability: outcomes.get(f"{client} {ability}") for ability in ABILITIES}
        marked.append(
            [
                name,
                how,
                *(
                    old.get((name, ability), NO) if outcome == "skipped" else marks.get(outcome or "", NO)
                    for ability, outcome in results.items()
                ),
            ]
        )
    return marked


def _from_vitest(file: str, claims: dict[str, list[str]]) -> Outcomes:
    """Returns the outcomes of a run of vitest; empty if it was not run."""
    path = PYTEST_RESULTS.with_name(file)
    if not path.exists():
        return {}
    suites = json.loads(path.read_text(encoding="utf-8"))["testResults"]
    results = {test["fullName"]: test["status"] for suite in suites for test in suite["assertionResults"]}
    if missing := [name for names in claims.values() for name in names if name not in results]:
        raise SystemExit(f"No test has the name that the table of clients relies on: {missing}")
    return {
        cell: "passed" if {results[name] for name in names} == {"passed"} else "failed"
        for cell, names in claims.items()
    }


def main(arguments: list[str]) -> int:
    """Writes the table, or with --check prints the difference and returns 1 if it is outdated.

    Args:
        arguments: `--check`, and `--fast` if slow tests did not run.
    """
    if not PYTEST_RESULTS.exists():
        raise SystemExit("There are no test results: run `make client-table`.")
    outcomes: Outcomes = json.loads(PYTEST_RESULTS.read_text(encoding="utf-8"))
    for file, claims in VITEST.items():
        outcomes |= _from_vitest(file, claims) or dict.fromkeys(claims, "skipped")
    if "--fast" in arguments:
        outcomes = {f"{client} {ability}": "skipped" for client in CLIENTS for ability in ABILITIES} | outcomes
    readme = README.read_text(encoding="utf-8")
    new = rewrite(readme, outcomes)
    if "--check" not in arguments:
        README.write_text(new, encoding="utf-8")
    elif new != readme:
        lines = difflib.unified_diff(
            readme.splitlines(), new.splitlines(), "README.md", "the test results", lineterm=""
        )
        sys.stdout.write("\n".join([*lines, "", "Run `make client-table` to update it.", ""]))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
