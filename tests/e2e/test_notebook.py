"""Notebooks in a real kernel: what cells show, and what interrupting them does."""

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


class RecordingNotebook(NotebookClient):
    """Executes a notebook and records every update of its displays as HTML, oldest first."""

    def __init__(self, *arguments: Any, interrupt_at: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, timeout=100, kernel_name="python3", **options)
        self.pages: list[str] = []
        self._interrupt_at = interrupt_at
        """The cell is interrupted once, when a display contains this text."""

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        """Records the display updates among the kernel's messages."""
        if msg["msg_type"] == "update_display_data":
            self.pages.append(msg["content"]["data"]["text/html"])
            if self._interrupt_at is not None and self._interrupt_at in self.pages[-1]:
                self._interrupt_at, self._interrupting = None, asyncio.ensure_future(self.km.interrupt_kernel())
        return super().process_message(msg, cell, cell_index)


def execute(address: str, *cells: str, **options: Any) -> RecordingNotebook:
    """Executes cells, after one that connects to a server."""
    codes = [PREPARE.format(address=address), *cells]
    notebook_run = RecordingNotebook(
        new_notebook(cells=[new_code_cell(code) for code in codes]), allow_errors=True, **options
    )
    notebook_run.execute()
    return notebook_run


def errors(cell: Any) -> list[tuple[str, str]]:
    """Returns the exceptions that a cell shows, as names and texts."""
    return [(output.ename, output.evalue) for output in cell.outputs if output.output_type == "error"]


@pytest.mark.proves("notebook", "streams")
@pytest.mark.proves("notebook", "errors")
def test_example_shows_previews_and_images(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell of the example runs: previews, then the image, in one display, and violations as text."""
    monkeypatch.setenv("CALOTYPE_GRPC_ADDRESS", server.address)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook_run = RecordingNotebook(notebook, resources={"metadata": {"path": str(tmp_path)}})
    notebook_run.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    previews = [page for page in notebook_run.pages if "data:image/jpeg" in page]
    assert len(set(previews)) >= 10
    steps = [int(STEP.search(page)[1]) for page in notebook_run.pages if "seed 1<" in page and STEP.search(page)]
    assert steps == sorted(steps)
    assert steps[-1] == 20
    # Each generation has one display, which shows the final image at the end.
    (shown,) = cells[1].outputs
    assert "data:image/png" in shown.data["text/html"]
    assert "a red apple" in cells[2].outputs[0].text
    assert "image/png" in cells[2].outputs[1].data
    assert "prompt: must not be empty\nsteps: is 0" in cells[4].outputs[-1].text


@pytest.mark.proves("notebook", "cancels")
def test_interrupting_the_cell_cancels_the_generation(server: ServerProcess) -> None:
    """Interrupting a cell cancels the generation on the server, and the next cell runs."""
    notebook_run = execute(
        server.address,
        'show(client.generate("fox", steps=150))',
        "running = next(iter(client.generations()))\nprint(running.generation_id)",
        'show(client.generate("a cat", steps=1)).format',
        interrupt_at="step 3/150",
    )
    interrupted, listed, after = notebook_run.nb.cells[1:]
    assert [name for name, _ in errors(interrupted)] == ["KeyboardInterrupt"]
    assert "outcome=CANCELLED" in server.wait_for_log("generation ended", listed.outputs[0].text.strip())
    assert after.outputs[-1].data["text/plain"] == "'png'"


@pytest.mark.proves("notebook", "resumes")
def test_lost_connection_does_not_show_in_the_cell() -> None:
    """A lost connection and a server restart do not change what the display shows."""
    with FakeServer(steps=4, drop_at=[1], lose_at=[3]) as server:
        notebook_run = execute(server.address, 'show(client.generate("a red apple")).format')
    shown, value = notebook_run.nb.cells[1].outputs
    assert "succeeded, step 4/4" in shown.data["text/html"]
    assert value.data["text/plain"] == "'png'"
    steps = [int(found[1]) for page in notebook_run.pages if "denoising" in page and (found := STEP.search(page))]
    assert steps == [1, 2, 3, 4]
    assert len(server.requests) == 2


@pytest.mark.proves("notebook", "errors")
def test_invalid_request_raises_with_every_violation(server: ServerProcess) -> None:
    """The cell shows the typed exception, whose text lists every violation."""
    notebook_run = execute(server.address, 'show(client.generate("", steps=0))')
    ((name, text),) = errors(notebook_run.nb.cells[1])
    assert name == "InvalidRequest"
    assert "prompt: must not be empty" in text
    assert "step_count: is 0" in text
