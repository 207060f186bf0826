"""The public names, signatures and documentation of the package."""

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import calotype
from calotype import AsyncClient, AsyncGeneration, AsyncGenerationGroup, Client, Generation, GenerationGroup
from calotype.testing import FakeServer

ASYNC_NAMES = {"aclose": "close", "__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__"}


def surface(kind):
    """Returns the public and special methods of a class, by their names in the sync class."""
    names = [name for name in vars(kind) if not name.startswith("_") or name in {*ASYNC_NAMES, *ASYNC_NAMES.values()}]
    return {ASYNC_NAMES.get(name, name): getattr(kind, name) for name in [*names, "__init__"]}


def test_all_lists_every_public_name():
    """__all__ contains every public name, in ruff's order."""
    names = {name for name, value in vars(calotype).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert names | {"__version__"} == set(calotype.__all__)
    assert list(calotype.__all__) == sorted(calotype.__all__, key=lambda name: (not name.isupper(), name))


def test_public_names_have_docstrings():
    """Every public class has a docstring."""
    for name in calotype.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(calotype, name)), name


@pytest.mark.parametrize(
    ("sync", "asynchronous"),
    [(Client, AsyncClient), (Generation, AsyncGeneration), (GenerationGroup, AsyncGenerationGroup)],
)
def test_async_classes_have_the_same_methods(sync, asynchronous):
    """The sync and the async classes have the same methods with the same parameters."""
    ours, theirs = surface(sync), surface(asynchronous)
    assert ours.keys() == theirs.keys()
    for name, method in ours.items():
        if callable(method) and name != "__init__":
            mine, other = inspect.signature(method), inspect.signature(theirs[name])
            assert list(mine.parameters.values()) == list(other.parameters.values()), name


def test_constructors_take_the_same_arguments():
    """Client and AsyncClient have the same constructor parameters."""
    assert inspect.signature(Client) == inspect.signature(AsyncClient)


def test_core_imports_no_extras():
    """Importing the package and its fake server imports no optional dependency."""
    extras = {"typer", "rich", "textual_image", "PIL", "IPython", "numpy"}
    code = f"import sys, calotype, calotype.testing; print(sorted({extras} & {{*sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_documented_example_runs(tmp_path, monkeypatch):
    """The example in the package's docstring runs unchanged."""
    monkeypatch.chdir(tmp_path)
    lines = textwrap.dedent(calotype.__doc__.split("Usage::\n\n")[1].split("\n\n`AsyncClient`")[0])
    with FakeServer() as server:
        exec(lines.replace("localhost:50051", server.address))
    assert (tmp_path / "apple.png").stat().st_size > 0


def test_package_is_typed():
    """The package has the py.typed marker and a version."""
    assert (Path(calotype.__file__).parent / "py.typed").exists()
    assert calotype.__version__
