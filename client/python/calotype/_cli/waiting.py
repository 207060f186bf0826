"""Says why a command waits before its first answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._resume.waits import is_loading, is_unreached
from .view import BaseView

if TYPE_CHECKING:
    from typing import TextIO

    from .._errors import CalotypeError
    from .server_options import Server
    from .view import View

__all__ = ["LOADING", "WAIT_SECONDS", "WaitMessages"]

WAIT_SECONDS = 10.0
"""How long `calotype generate` waits for a server that does not answer: a server opens its ports before it loads its
model, within a few seconds of its start."""

LOADING = "The server is loading its model; waiting ..."


class WaitMessages:
    """Shows each reason for a wait, in the view if that has a place for it, and otherwise once on stderr.

    Args:
        server: Where the server is.
        stderr: The stream for messages.
        view: The view of the generation, if there is one.
    """

    def __init__(self, server: Server, stderr: TextIO, view: View | None = None) -> None:
        self._server = server
        self._stderr = stderr
        self._view = view or BaseView()
        self._answered = False
        self._printed: set[str] = set()

    def note(self, error: CalotypeError, delay: float) -> None:
        """Takes the error before a wait. `Client` calls this as its `on_reconnect`."""
        if is_loading(error):
            self._answered = True
            self._say(LOADING)
        elif is_unreached(error) and not self._answered:
            self._say(f"No Calotype server answers at {self._server.address}; waiting ...")
        else:
            self._view.reconnect(error, delay)

    def note_progress(self) -> None:
        """Records that the server answers: from now on, a failure is a lost connection."""
        self._answered = True
        self._printed.clear()

    def _say(self, text: str) -> None:
        if not self._view.wait(text) and text not in self._printed:
            self._printed.add(text)
            self._stderr.write(text + "\n")
            self._stderr.flush()
