"""The published proto: the README's commands work, all errors are listed, and breaking changes are rejected."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from calotype_server import errors

ROOT = Path(__file__).parents[2]
README = (ROOT / "protos" / "README.md").read_text(encoding="utf-8")
BUF = str(Path(sys.executable).with_name("buf"))
COMMANDS = [each for each in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "_out=" in each]
CHECK = re.search(r"buf (breaking protos --against .*)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1]


def needs(command):
    """Returns the programs that a command calls."""
    tools = [
        command.split()[0],
        *re.findall(r"grpc_\w+_plugin", command),
        *re.findall(r"client/\S+protoc-gen-es", command),
    ]
    plugins = (name for name in re.findall(r"--([a-z-]+)_out", command) if name in ("go", "go-grpc"))
    return [*tools, *(f"protoc-gen-{name}" for name in plugins)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.search(r"--([a-z]+)_out", command)[1])
def test_the_readmes_commands_generate_code(command, tmp_path):
    """Each command, unchanged, writes code that contains the service; languages without installed tools are skipped."""
    for name in ("protos", "client"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "out").mkdir()
    path = f"{ROOT}/.venv-proto/bin{os.pathsep}{os.environ['PATH']}"
    if missing := [tool for tool in needs(command) if not (shutil.which(tool, path=path) or (ROOT / tool).exists())]:
        pytest.skip(f"{', '.join(missing)} not installed")
    if command.startswith("python") and not (ROOT / ".venv-proto").exists():
        pytest.skip("`make proto` sets up grpcio-tools")
    done = subprocess.run(
        ["sh", "-ec", command],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert any("GenerationService" in file.read_text(encoding="utf-8") for file in written)


BASES = errors.ServiceError, errors.GenerationError, errors.Unauthenticated, errors.RateLimited


def reasons(kind=errors.ServiceError):
    """Returns the code and reason of every error that can reach a caller."""
    own = set() if kind in BASES else {(kind.code, kind.reason)}
    return own.union(*(reasons(child) for child in kind.__subclasses__()))


def test_the_readme_lists_every_error():
    """The README lists exactly the codes and reasons of the code."""
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([^|]*) \|", README, re.MULTILINE)
    listed = {(code, reason) for code, cell in rows for reason in re.findall(r"`(\w+)`", cell)}
    assert listed == reasons()


@pytest.fixture
def checkout(tmp_path):
    """A repository whose last release contains the current proto."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "Release"], ["tag", "v0"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("  string reason = 2;", "", "deleted"),
        ("int32 image_step = 9;", "int64 image_step = 9;", "changed type"),
        ("int32 image_step = 9;", "int32 picture_step = 9;", "changed"),
        ("PHASE_FAILED = 6;", "PHASE_FAILED = 8;", "deleted"),
        ("rpc Cancel(CancelRequest) returns (CancelResponse);", "", "deleted"),
        ("int32 image_step = 9;", "int32 image_step = 9;\n  // New.\n  int32 news = 90;", None),
    ],
    ids=["field deleted", "type changed", "field renamed", "number changed", "call deleted", "field added"],
)
def test_a_breaking_change_fails_the_check(checkout, old, new, complaint):
    """The comparison of `make lint` with the last tag rejects breaking changes and accepts additions."""
    proto = checkout / "protos" / "calotype" / "v1" / "calotype.proto"
    text = proto.read_text(encoding="utf-8")
    assert old in text
    proto.write_text(text.replace(old, new), encoding="utf-8")
    command = CHECK.replace("$(PUBLISHED)", "v0")
    done = subprocess.run(["sh", "-c", f"{BUF} {command}"], cwd=checkout, capture_output=True, text=True, check=False)
    if complaint is None:
        assert (done.returncode, done.stdout) == (0, "")
    else:
        assert done.returncode == 100
        assert complaint in done.stdout
