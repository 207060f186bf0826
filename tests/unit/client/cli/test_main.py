"""The `calotype` command has the commands of client and server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import calotype

PRELUDE = "import sys\nfor name in {missing!r}: sys.modules[name] = None\nfrom calotype.__main__ import main\nmain()"


def run(*arguments, missing=()):
    """Runs the command without the packages in `missing`."""
    environment = os.environ | {"PYTHONPATH": str(Path(calotype.__file__).parents[1]), "COLUMNS": "200"}
    code = PRELUDE.format(missing=tuple(missing))
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("missing", ["typer", "rich", "textual_image", "PIL"])
def test_missing_cli_extra(missing):
    """Without the extra, the command prints one line with what to install."""
    result = run("generate", "a red apple", missing=[missing])
    assert result.returncode == 2
    assert result.stderr == "The command line needs an extra: pip install 'calotype[cli]'\n"


@pytest.mark.parametrize("command", ["serve", "bridge", "doctor"])
def test_missing_server_extra(command):
    """Without the server's extra, its commands print what to install, with any options."""
    result = run(command, "--model", "bundled", missing=["calotype_server.cli.main"])
    assert result.returncode == 2
    assert f"`calotype {command}` needs an extra: pip install 'calotype[server]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_names_every_command():
    """The help lists every command, including those whose extra is missing."""
    result = run("--help", missing=["calotype_server.cli.main"])
    assert result.returncode == 0
    for name in ("generate", "cancel", "model", "serve", "bridge", "doctor"):
        assert f" {name} " in result.stdout


def test_server_adds_its_commands(tmp_path):
    """Commands that the server registers are part of the command line."""
    package = tmp_path / "calotype_server" / "cli"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "main.py").write_text(
        "def register(app):\n    @app.command()\n    def serve():\n        print('serving')\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom calotype.__main__ import main\nmain()"
    environment = os.environ | {"PYTHONPATH": str(Path(calotype.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code, "serve"], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout) == (0, "serving\n")


def test_missing_notebook_extra():
    """Importing the notebook module without IPython raises an error with what to install."""
    code = "import sys; sys.modules['IPython'] = None; sys.modules['IPython.display'] = None; import calotype.notebook"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'calotype[notebook]'" in result.stderr
