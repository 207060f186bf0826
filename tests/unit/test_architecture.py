"""The structure of the code: layers, sizes and imports."""

from __future__ import annotations

import ast
import graphlib
import statistics
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = ("client/python/calotype/", "service/calotype_server/")
GENERATED = ("calotype/v1/", "/gen/", "/page/assets/")
MAX_MODULES = 20
MAX_LINES = 400
MEDIAN_LINES = 120


def tracked(*suffixes: str) -> list[str]:
    """Returns the tracked files with one of these suffixes, except generated ones."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = [name for name in listed.stdout.splitlines() if name.endswith(suffixes) and (ROOT / name).exists()]
    return [name for name in names if not any(part in name for part in GENERATED)]


def lines(name: str) -> int:
    """Returns the number of lines of a file."""
    return len((ROOT / name).read_text("utf-8").splitlines())


def imports(name: str) -> set[str]:
    """Returns the modules that a file imports absolutely, also in functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """The import graph of client and server, with type-only imports."""
    return grimp.build_graph("calotype", "calotype_server", cache_dir=None)


def test_every_module_belongs_to_a_layer(graph: grimp.ImportGraph) -> None:
    """Every package and module directly below `calotype_server` is named in the layers that import-linter checks."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [server] = [each for each in contracts if each.get("containers") == ["calotype_server"]]
    assert server["exhaustive"] is True
    layers = {name for layer in server["layers"] for name in layer.split(" | ")}
    assert {child.rpartition(".")[2] for child in graph.find_children("calotype_server")} == layers


def test_no_folder_has_too_many_modules() -> None:
    """A folder has at most 20 modules, `__init__.py` not counted."""
    folders = Counter(str(Path(name).parent) for name in tracked(".py", ".ts") if not name.endswith("__init__.py"))
    assert {folder: count for folder, count in folders.items() if count > MAX_MODULES} == {}


def test_no_file_is_too_long() -> None:
    """A file of code has at most 400 lines."""
    assert {name: lines(name) for name in tracked(".py", ".ts", ".css") if lines(name) > MAX_LINES} == {}


def test_most_modules_are_short() -> None:
    """Half of the product's Python modules have fewer than 120 lines."""
    product = [name for name in tracked(".py") if name.startswith(PRODUCT) and not name.endswith("__init__.py")]
    assert statistics.median(map(lines, product)) < MEDIAN_LINES


def test_there_are_no_import_cycles(graph: grimp.ImportGraph) -> None:
    """No module imports itself through others, not even for type checking."""
    dependencies = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        graphlib.TopologicalSorter(dependencies).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("library", ["torch", "diffusers", "transformers"])
def test_only_the_engine_imports_heavy_libraries(library: str) -> None:
    """Everything outside `calotype_server.engine` starts without them."""
    importing = {name for name in tracked(".py") for each in imports(name) if each.partition(".")[0] == library}
    product = {name for name in importing if name.startswith(PRODUCT)}
    assert {name for name in product if not name.startswith("service/calotype_server/engine/")} == set()


def test_the_server_imports_only_public_modules_of_the_client() -> None:
    """A name with an underscore may change without notice."""
    server = [name for name in tracked(".py") if name.startswith("service/")]
    private = {
        (name, each)
        for name in server
        for each in imports(name)
        if each.startswith("calotype.") and any(part.startswith("_") for part in each.split("."))
    }
    assert private == set()
