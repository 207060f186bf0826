"""The command line in a real terminal."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import calotype
from calotype import Notice
from calotype.testing import FakeServer

if sys.platform == "win32":
    pytest.skip("needs POSIX pseudo terminals", allow_module_level=True)

import fcntl
import pty
import struct
import termios

import pexpect
from pexpect.fdpexpect import fdspawn

# Makes the terminal the controlling one, so that Ctrl-C works. This process runs gRPC and must not fork.
LAUNCHER = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "calotype", *sys.argv[1:]])
"""


@pytest.fixture
def terminal(tmp_path):
    """Returns a function that runs the command in a terminal of 100 x 30 cells."""
    with contextlib.ExitStack() as stack:

        def run(server, *arguments, term="xterm-256color", rows=30, **variables):
            ours, theirs = pty.openpty()
            stack.callback(os.close, ours)
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 100, 0, 0))
            # Rich prefers these two variables to the size of the terminal.
            inherited = {name: value for name, value in os.environ.items() if name not in ("LINES", "COLUMNS")}
            environment = inherited | {"TERM": term, "CALOTYPE_GRPC_ADDRESS": server.address, "COLORTERM": "truecolor"}
            environment |= variables
            environment["PYTHONPATH"] = str(Path(calotype.__file__).parents[1])
            process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER, *arguments],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                cwd=tmp_path,
                env=environment,
                start_new_session=True,
            )
            os.close(theirs)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process, fdspawn(ours, timeout=30, encoding="utf-8", maxread=65536)

        yield run


def rest(process, screen):
    """Reads to the end of the output. Returns it with the exit code."""
    screen.expect(pexpect.EOF)
    return screen.before, process.wait()


def test_picture_of_half_blocks_and_a_bar(terminal, tmp_path):
    """A terminal that does not answer the query gets half blocks and a progress bar, without stray characters."""
    with FakeServer(steps=3) as server:
        output, code = rest(*terminal(server, "generate", "a red apple", "-o", "apple.png"))
    assert code == 0
    assert "▀" in output
    assert "━" in output
    assert "step 3/3" in output
    assert "Saved apple.png (seed 1234, 3.0 s)" in output
    assert "\x1bP" not in output
    assert "\x1b_G" not in output
    assert "^[" not in output
    assert "Traceback" not in output
    assert output.rstrip().endswith("s)")
    assert (tmp_path / "apple.png").exists()


def test_several_pictures_share_the_screen(terminal, tmp_path):
    """Several images are drawn as one grid above one progress bar, and the paths of all files follow at the end."""
    with FakeServer(steps=2) as server:
        output, code = rest(*terminal(server, "generate", "a red apple", "-n", "2", "--seed", "5"))
    assert code == 0
    assert "▀" in output
    assert "1 of 2 done, " in output
    assert "2 of 2 done, succeeded, step 2/2" in output
    end = output[output.rindex("▀") :]
    assert end.count("Saved calotype-") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calotype-5.png", "calotype-6.png"]


def test_sixel_terminal(terminal):
    """A terminal that reports sixel support gets sixel graphics."""
    with FakeServer(steps=2) as server:
        process, screen = terminal(server, "generate", "a red apple", "-o", "apple.png")
        screen.expect_exact("\x1b[c")
        screen.send("\x1b[?62;4;6c")
        output, code = rest(process, screen)
    assert code == 0
    assert "\x1bP" in output
    assert "▀" not in output
    assert "62;4;6c" not in output


def test_kitty_terminal(terminal):
    """Kitty gets its own graphics without a query."""
    with FakeServer(steps=2) as server:
        output, code = rest(*terminal(server, "generate", "a red apple", "-o", "apple.png", term="xterm-kitty"))
    assert code == 0
    assert "\x1b_G" in output
    assert "\x1b[c" not in output


def test_dumb_terminal(terminal):
    """A terminal that cannot move its cursor gets plain lines."""
    with FakeServer(steps=2) as server:
        output, code = rest(*terminal(server, "generate", "a red apple", "-o", "apple.png", term="dumb"))
    assert code == 0
    assert "\x1b" not in output
    assert "denoising, step 1/2, 1 s left\r\n" in output


def test_terminal_without_colours(terminal):
    """With NO_COLOR, the terminal shows the progress bar and no picture."""
    with FakeServer(steps=2) as server:
        output, code = rest(*terminal(server, "generate", "a red apple", "-o", "apple.png", NO_COLOR="1"))
    assert code == 0
    assert "step 2/2" in output
    assert "▀" not in output


def test_warning_stays_visible(terminal):
    """A warning stays visible until the end."""
    with FakeServer(steps=2, warnings=[Notice("PROMPT_TRUNCATED", "The prompt was cut.")]) as server:
        output, _ = rest(*terminal(server, "generate", "a red apple", "-o", "apple.png"))
    assert "Note: The prompt was cut." in output[output.rindex("▀") :]


def test_withdrawn_previews_leave_the_screen(terminal):
    """When previews are withdrawn, the terminal erases the picture and shows the reason."""
    with FakeServer(withdraw_at=3) as server:
        output, code = rest(*terminal(server, "generate", "a red apple"))
    assert code == 1
    before, _, after = output.partition("previews withdrawn")
    erased = before[before.rindex("▀") :]
    assert erased.count("\x1b[2K") >= 24
    assert "▀" not in after
    assert "The model's safety checker withheld the image." in after


def test_withdrawn_previews_leave_kitty(terminal):
    """When previews are withdrawn, the command deletes every image that it sent to kitty."""
    with FakeServer(withdraw_at=3) as server:
        output, _ = rest(*terminal(server, "generate", "a red apple", term="xterm-kitty"))
    placed, deleted = re.findall(r"\x1b_Ga=p,i=(\d+)", output), re.findall(r"\x1b_Ga=d,I=(\d+)", output)
    assert len(placed) == 2
    assert placed == deleted


def test_small_terminal(terminal):
    """The command works in a terminal of three lines."""
    with FakeServer(steps=2) as server:
        output, code = rest(*terminal(server, "generate", "a red apple", "-o", "apple.png", rows=3))
    assert code == 0
    assert "step 2/2" in output


@pytest.mark.proves("cli", "cancels")
@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_cancels_on_the_server(terminal, tmp_path, as_json):
    """Ctrl-C cancels the generation, exits with 130, shows no traceback and leaves no file."""
    with FakeServer(hold_at=2) as server:
        process, screen = terminal(server, "generate", "a red apple", *(["--json"] if as_json else []))
        screen.expect('"step": 2' if as_json else "step 2/4")
        screen.send("\x03")
        output, code = rest(process, screen)
        assert server.wait_cancelled()
    assert code == 130
    assert "Cancelled." in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []
    if as_json:
        assert '{"phase": "cancelled"' in output


def test_terminal_is_restored(terminal):
    """After Ctrl-C, the cursor is visible and echo is on again."""
    with FakeServer(hold_at=1) as server:
        process, screen = terminal(server, "generate", "a red apple")
        screen.expect("step 1/4")
        during = termios.tcgetattr(screen.child_fd)[3]
        process.send_signal(signal.SIGINT)
        output, _ = rest(process, screen)
    assert not during & termios.ECHO
    assert "\x1b[?25h" in output


def test_ctrl_c_ends_the_wait_for_a_loading_server(terminal):
    """The terminal shows that the server is loading, and Ctrl-C ends the wait at once."""
    with FakeServer(loading_calls=10**9) as server:
        process, screen = terminal(server, "generate", "a red apple")
        screen.expect_exact("The server is loading its model; waiting ...")
        screen.send("\x03")
        output, code = rest(process, screen)
    assert code == 130
    assert "Cancelled." in output
    assert "Traceback" not in output


def test_a_message_about_a_wait_reaches_stderr(tmp_path):
    """Outside a terminal, the message is on stderr although the output of gRPC's C core is not."""
    with FakeServer(loading_calls=1) as server:
        command = [sys.executable, "-m", "calotype", "generate", "a red apple", "--address", server.address]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stderr == "The server is loading its model; waiting ...\n"
    assert "Saved calotype-1234.png" in result.stdout


def test_lost_server_is_one_line(terminal):
    """A lost server gives a message and an exit code, without output of gRPC's C core."""
    with FakeServer(hold_at=2) as server:
        process, screen = terminal(server, "generate", "a red apple", "--retries", "0")
        screen.expect("step 2/4")
        server.stop()
        output, code = rest(process, screen)
    assert code in (1, 3)
    assert "Traceback" not in output
    assert "chttp2" not in output


def test_ctrl_c_does_not_cancel_a_kept_generation(terminal):
    """Ctrl-C during a kept generation prints that it continues, and how to watch it."""
    with FakeServer(hold_at=2) as server:
        process, screen = terminal(server, "generate", "a red apple", "--on-disconnect", "keep")
        screen.expect("step 2/4")
        screen.send("\x03")
        output, code = rest(process, screen)
        assert server.cancelled == []
    assert code == 130
    assert "calotype watch" in output
