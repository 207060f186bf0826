"""Wheels and source archives, built and installed in clean environments."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import calotype
from support.process import ServerProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
SOURCES = {"calotype": ROOT, "calotype_bundled_model": ROOT / "service" / "bundled_model"}
MEBIBYTE = 2**20


def run(*command: str | Path, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command without the environment variables of Python."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, cwd=cwd, env={**variables, "COLUMNS": "200"}
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def build(source: Path, target: Path, *kinds: str) -> None:
    """Builds distributions of the given kinds from a source folder."""
    options = [word for kind in kinds for word in ("--target", kind)]
    run(sys.executable, "-m", "hatchling", "build", *options, "--directory", target, cwd=source)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with both distributions, each as a wheel and a source archive."""
    folder = tmp_path_factory.mktemp("dist")
    for source in SOURCES.values():
        build(source, folder, "wheel", "sdist")
    return folder


def wheel(folder: Path, name: str) -> Path:
    """Returns the wheel of a distribution."""
    [found] = folder.glob(f"{name}-*.whl")
    return found


def content(archive: Path) -> dict[str, bytes]:
    """Returns the files of a wheel, without its metadata."""
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist() if ".dist-info/" not in name}


def tracked(folder: str) -> set[str]:
    """Returns the tracked files of a folder, relative to its parent."""
    listed = run("git", "ls-files", folder, cwd=ROOT).stdout.splitlines()
    return {line.removeprefix(folder.rpartition("/")[0] + "/") for line in listed}


@pytest.mark.parametrize("name", SOURCES)
def test_source_archive_builds_the_same_wheel(published: Path, tmp_path: Path, name: str) -> None:
    """A wheel built from the source archive alone has the same files, byte for byte."""
    [archive] = published.glob(f"{name}-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    build(source, tmp_path / "again", "wheel")
    assert content(wheel(tmp_path / "again", name)) == content(wheel(published, name))


def test_wheels_contain_all_tracked_files(published: Path) -> None:
    """The wheels contain every tracked file and no others; the main one is below 1 MiB."""
    light = wheel(published, "calotype")
    assert light.stat().st_size < MEBIBYTE
    assert set(content(light)) == tracked("client/python/calotype") | tracked("service/calotype_server")
    assert "calotype_server/page/index.html" in content(light)
    model = wheel(published, "calotype_bundled_model")
    assert set(content(model)) == tracked("service/bundled_model/calotype_bundled_model")


class Environment:
    """A clean virtual environment.

    Args:
        folder: Where to make it.
        wheels: What to install, without what they require.
    """

    def __init__(self, folder: Path, *wheels: Path) -> None:
        venv.create(folder)
        self.python = folder / "bin" / "python"
        self.calotype = folder / "bin" / "calotype"
        self.packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        pip: list[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python]
        run(*pip, "install", "--no-index", "--no-deps", *wheels)

    def borrow(self, *names: str) -> None:
        """Links distributions of this environment, and their requirements, instead of installing them."""
        wanted, done = list(names), set()
        while wanted:
            if (name := wanted.pop()) in done:
                continue
            done.add(name)
            distribution = importlib.metadata.distribution(name)
            for file in distribution.files:
                link = self.packages / file
                if ".." not in file.parts and "__pycache__" not in file.parts and not link.exists():
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(str(distribution.locate_file(file)))
            wanted += required(distribution.requires or [])


def required(lines: list[str], extra: str = "") -> list[str]:
    """Returns the names of the requirements that apply on this machine."""
    requirements = map(Requirement, lines)
    return [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": extra})]


def requirements_of(archive: Path, extra: str = "") -> list[str]:
    """Returns the names of the distributions that a wheel requires."""
    with zipfile.ZipFile(archive) as opened:
        [name] = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        lines = opened.read(name).decode().split("\n\n")[0].splitlines()
    listed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return required(listed, extra)


def test_client_requires_three_packages(published: Path, tmp_path: Path) -> None:
    """The client works with its three requirements, and its command line names the missing extra."""
    light = wheel(published, "calotype")
    assert set(requirements_of(light)) == {"grpcio", "protobuf", "googleapis-common-protos"}
    clean = Environment(tmp_path / "venv", light)
    clean.borrow(*requirements_of(light))
    code = """
import importlib.util, sys
import calotype, calotype.testing
assert not any(importlib.util.find_spec(name) for name in ("torch", "numpy", "PIL", "typer", "pydantic"))
with calotype.testing.FakeServer() as server, calotype.Client(server.address) as client:
    print(len(client.generate("a red apple").result().data))
"""
    assert int(run(clean.python, "-c", code, cwd=tmp_path).stdout) > 0
    done = run(clean.calotype, "--help", cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "The command line needs an extra: pip install 'calotype[cli]'\n",
    )


def test_command_line_works_without_the_server(published: Path, tmp_path: Path) -> None:
    """The help lists all commands; a command of the server prints what to install."""
    light = wheel(published, "calotype")
    clean = Environment(tmp_path / "venv", light)
    clean.borrow(*requirements_of(light, "cli"))
    listed = run(clean.calotype, "--help", cwd=tmp_path).stdout
    assert "generate" in listed
    assert "Needs the extra `server`" in listed
    done = run(clean.calotype, "serve", "--max-queue", "1", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "pip install 'calotype[server]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_server_works_when_installed_from_wheels(published: Path, tmp_path: Path) -> None:
    """A server installed from the two wheels generates an image with the bundled model and serves the page."""
    clean = Environment(tmp_path / "venv", *(wheel(published, name) for name in SOURCES))
    # The requirements are too large to install again: borrow them. This does not expose the checkout itself.
    (clean.packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))

    class Installed(ServerProcess):
        calotype = (str(clean.calotype),)

    origin = "import calotype, calotype_server, calotype_bundled_model as m; print(calotype.__file__, m.__file__)"
    assert str(ROOT) not in run(clean.python, "-c", origin, cwd=tmp_path).stdout
    with Installed() as server:
        with calotype.Client(server.address) as client:
            assert client.model().name == "bundled"
            assert client.generate("a red apple", steps=2).result().width == 128
        with urllib.request.urlopen(f"http://{server.web_address}/", timeout=30) as page:
            assert b"calotype" in page.read().lower()
