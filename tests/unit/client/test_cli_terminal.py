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
    pytest.skip("pseudo terminals are a matter of POSIX", allow_module_level=True)

import fcntl
import pty
import struct
import termios

import pexpect
from pexpect.fdpexpect import fdspawn

# Takes the terminal as its own, so that Ctrl-C arrives. Forking here is not an option: this process runs gRPC.
LAUNCHER = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "calotype", *sys.argv[1:]])
"""


@pytest.fixture
def terminal(tmp_path):
    """Runs the command in a terminal of 100 x 30 cells; gives the process and what to expect from."""
    with contextlib.ExitStack() as stack:

        def run(server, *arguments, term="xterm-256color", rows=30, **variables):
            ours, theirs = pty.openpty()
            stack.callback(os.close, ours)
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 100, 0, 0))
            # Rich would believe these two more than the terminal.
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
    """Reads to the end of the output."""
    screen.expect(pexpect.EOF)
    return screen.before, process.wait()


def test_picture_of_half_blocks_and_a_bar(terminal, tmp_path):
    """A terminal that answers nothing gets half blocks and a bar, at once and without a trace of the question."""
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


def test_sixel_terminal(terminal):
    """A terminal that says it has sixel gets sixel."""
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
    """Kitty gets its own graphics and is asked nothing."""
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
    """NO_COLOR leaves the bar and drops the picture, which would be a grey wall."""
    with FakeServer(steps=2) as server:
        output, code = rest(*terminal(server, "generate", "a red apple", "-o", "apple.png", NO_COLOR="1"))
    assert code == 0
    assert "step 2/2" in output
    assert "▀" not in output


def test_warning_stays_visible(terminal):
    """A warning is shown above the bar until the end."""
    with FakeServer(steps=2, warnings=[Notice("PROMPT_TRUNCATED", "The prompt was cut.")]) as server:
        output, _ = rest(*terminal(server, "generate", "a red apple", "-o", "apple.png"))
    assert "Note: The prompt was cut." in output[output.rindex("▀") :]


def test_withdrawn_previews_leave_the_screen(terminal):
    """When previews are withdrawn, every line of the picture is erased, and the reason stands in its place."""
    with FakeServer(withdraw_at=3) as server:
        output, code = rest(*terminal(server, "generate", "a red apple"))
    assert code == 1
    before, _, after = output.partition("previews withdrawn")
    erased = before[before.rindex("▀") :]
    assert erased.count("\x1b[2K") >= 24
    assert "▀" not in after
    assert "The model's safety checker withheld the image." in after


def test_withdrawn_previews_leave_kitty(terminal):
    """Kitty is told to forget every picture that it was sent."""
    with FakeServer(withdraw_at=3) as server:
        output, _ = rest(*terminal(server, "generate", "a red apple", term="xterm-kitty"))
    placed, deleted = re.findall(r"\x1b_Ga=p,i=(\d+)", output), re.findall(r"\x1b_Ga=d,I=(\d+)", output)
    assert len(placed) == 2
    assert placed == deleted


def test_small_terminal(terminal):
    """A terminal of a few lines still works."""
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


def test_terminal_is_given_back(terminal):
    """After Ctrl-C the cursor is visible and keys are echoed again."""
    with FakeServer(hold_at=1) as server:
        process, screen = terminal(server, "generate", "a red apple")
        screen.expect("step 1/4")
        during = termios.tcgetattr(screen.child_fd)[3]
        process.send_signal(signal.SIGINT)
        output, _ = rest(process, screen)
    assert not during & termios.ECHO
    assert "\x1b[?25h" in output


def test_server_that_dies_is_said_in_words(terminal):
    """A lost server is one line and exit code 3, without a word from the C core."""
    with FakeServer(hold_at=2) as server:
        process, screen = terminal(server, "generate", "a red apple", "--retries", "0")
        screen.expect("step 2/4")
        server.stop()
        output, code = rest(process, screen)
    assert code in (1, 3)
    assert "Traceback" not in output
    assert "chttp2" not in output


def test_ctrl_c_leaves_what_is_to_be_kept(terminal):
    """Ctrl-C of a kept generation says that it goes on, and how to see it again."""
    with FakeServer(hold_at=2) as server:
        process, screen = terminal(server, "generate", "a red apple", "--on-disconnect", "keep")
        screen.expect("step 2/4")
        screen.send("\x03")
        output, code = rest(process, screen)
        assert server.cancelled == []
    assert code == 130
    assert "calotype watch" in output
