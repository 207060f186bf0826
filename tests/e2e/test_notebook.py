"""A notebook in a kernel of its own, as Jupyter runs it: what a cell shows, and what interrupting it does."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

import calotype
from calotype.testing import FakeServer

if TYPE_CHECKING:
    from support.process import ServerProcess

pytestmark = pytest.mark.e2e

NOTEBOOK = Path(calotype.__file__).parents[1] / "examples" / "notebook.ipynb"
PREPARE = "from calotype import Client\nfrom calotype.notebook import show\nclient = Client({address!r})"
STEP = re.compile(r"step (\d+)/(\d+)")


class WatchedNotebook(NotebookClient):
    """Executes a notebook and keeps every state of its displays, oldest first, as HTML."""

    def __init__(self, *arguments: Any, interrupt_at: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, timeout=100, kernel_name="python3", **options)
        self.pages: list[str] = []
        self._interrupt_at = interrupt_at
        """Text of a page at which the cell is interrupted, once."""

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        """Takes a message of the kernel."""
        if msg["msg_type"] == "update_display_data":
            self.pages.append(msg["content"]["data"]["text/html"])
            if self._interrupt_at is not None and self._interrupt_at in self.pages[-1]:
                self._interrupt_at, self._interrupting = None, asyncio.ensure_future(self.km.interrupt_kernel())
        return super().process_message(msg, cell, cell_index)


def execute(address: str, *cells: str, **options: Any) -> FileWatcher:
    """Executes cells after one that connects to the server."""
    codes = [PREPARE.format(address=address), *cells]
    watched = WatchedNotebook(new_notebook(cells=[new_code_cell(code) for code in codes]), allow_errors=True, **options)
    watched.execute()
    return watched


def errors(cell: Any) -> list[tuple[str, str]]:
    """The exceptions that a cell shows: name and text."""
    return [(output.ename, output.evalue) for output in cell.outputs if output.output_type == "error"]


@pytest.mark.proves("notebook", "streams")
@pytest.mark.proves("notebook", "errors")
def test_the_example_shows_pictures_that_form(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell runs: previews replace each other in place, the image comes last, and violations are named."""
    monkeypatch.setenv("CALOTYPE_GRPC_ADDRESS", server.address)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    watched = WatchedNotebook(notebook, resources={"metadata": {"path": str(tmp_path)}})
    watched.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    previews = [page for page in watched.pages if "data:image/jpeg" in page]
    assert len(set(previews)) >= 10
    steps = [int(STEP.search(page)[1]) for page in watched.pages if "seed 1<" in page and STEP.search(page)]
    assert steps == sorted(steps)
    assert steps[-1] == 20
    # One display for each picture, which holds the final one in the end.
    (shown,) = cells[1].outputs
    assert "data:image/png" in shown.data["text/html"]
    assert "a red apple" in cells[2].outputs[0].text
    assert "image/png" in cells[2].outputs[1].data
    assert "prompt: must not be empty\nsteps: is 0" in cells[4].outputs[-1].text


@pytest.mark.proves("notebook", "cancels")
def test_interrupting_the_cell_frees_the_slot(server: ServerProcess) -> None:
    """The stop button in mid-stream cancels the generation on the server, and the next cell runs."""
    watched = execute(
        server.address,
        'show(client.generate("fox", steps=150))',
        "running = next(iter(client.generations()))\nprint(running.generation_id)",
        'show(client.generate("a cat", steps=1)).format',
        interrupt_at="step 3/150",
    )
    interrupted, listed, after = watched.nb.cells[1:]
    assert [name for name, _ in errors(interrupted)] == ["KeyboardInterrupt"]
    assert "outcome=CANCELLED" in server.wait_for_log("generation ended", listed.outputs[0].text.strip())
    assert after.outputs[-1].data["text/plain"] == "'png'"


@pytest.mark.proves("notebook", "resumes")
def test_a_lost_connection_is_not_seen_in_the_cell() -> None:
    """Connections that break, and a server that has lost everything, leave the display as it would have been."""
    with FakeServer(steps=4, drop_at=[1], lose_at=[3]) as server:
        watched = execute(server.address, 'show(client.generate("a red apple")).format')
    shown, value = watched.nb.cells[1].outputs
    assert "succeeded, step 4/4" in shown.data["text/html"]
    assert value.data["text/plain"] == "'png'"
    steps = [int(found[1]) for page in watched.pages if "denoising" in page and (found := STEP.search(page))]
    assert steps == [1, 2, 3, 4]
    assert len(server.requests) == 2


@pytest.mark.proves("notebook", "errors")
def test_a_refusal_is_an_exception_with_every_violation(server: ServerProcess) -> None:
    """The cell ends with the typed exception, whose text names all that is wrong."""
    watched = execute(server.address, 'show(client.generate("", steps=0))')
    ((name, text),) = errors(watched.nb.cells[1])
    assert name == "InvalidRequest"
    assert "prompt: must not be empty" in text
    assert "step_count: is 0" in text
