"""Commands that wait for a server: one that loads its model, or one that was just started."""

import pytest

from calotype._cli.text_views import PlainView
from calotype._cli.waiting import WaitMessages
from calotype.testing import FakeServer

LOADING = "The server is loading its model; waiting ...\n"


@pytest.mark.parametrize(
    "command", ["generate apple -o a.png", "generate apple --json", "model", "list", "cancel fake-1"]
)
def test_commands_wait_while_the_server_loads(run, command):
    """Each command waits for a loading server, and says so once on stderr; stdout has only results."""
    with FakeServer(loading_calls=3) as server:
        result = run(server, *command.split())
    message = "There is no generation 'fake-1'.\n" if command.startswith("cancel") else ""
    assert (result.exit_code, result.stderr) == (1 if message else 0, LOADING + message)
    assert "loading" not in result.stdout


def test_generate_waits_for_a_server_that_was_just_started(run, monkeypatch):
    """`generate` waits for a server that does not answer yet, then while it loads, and says both once."""
    with FakeServer() as server:
        server.stop()
        note = WaitMessages.note

        def start(self, error, delay):
            note(self, error, delay)
            if not error.reason:
                server.restart(loading_calls=2)

        monkeypatch.setattr(WaitMessages, "note", start)
        result = run(server, "generate", "a red apple", "--wait", "60", "-o", "apple.png")
        assert result.exit_code == 0
        assert result.stderr == f"No Calotype server answers at {server.address}; waiting ...\n{LOADING}"


def test_a_restart_during_a_generation_says_that_the_server_is_loading(run, monkeypatch):
    """After a lost connection, the lines say that the client reconnects, and then once that the server is loading."""
    with FakeServer(steps=3, hold_at=2) as server:
        update = PlainView.update

        def restart(self, progress, path):
            update(self, progress, path)
            if progress.step == 2 and len(server.requests) == 1:
                server.restart(loading_calls=3)
                server.release()

        monkeypatch.setattr(PlainView, "update", restart)
        result = run(server, "generate", "a red apple", "-o", "apple.png")
    assert result.exit_code == 0
    assert "connection lost, reconnecting ..." in result.stdout
    assert result.stderr == LOADING
