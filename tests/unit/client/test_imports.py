"""Which modules import which."""

import sys
from graphlib import TopologicalSorter

import grimp
import pytest

EXTRAS = ("calotype._cli", "calotype.notebook", "calotype.__main__")
"""Modules that need an extra; all others belong to the core."""


@pytest.fixture(scope="module")
def graph():
    """All imports of the client and the server, type-only ones included."""
    return grimp.build_graph("calotype", "calotype_server", include_external_packages=True, cache_dir=None)


def imports(graph, package):
    """Pairs of importing and imported module, for all modules of a package."""
    importers = {package} | graph.find_descendants(package)
    return [
        (importer, target)
        for importer in sorted(importers)
        for target in graph.find_modules_directly_imported_by(importer)
    ]


def is_in(module, package):
    """Whether a module is a package or one of its submodules."""
    return module == package or module.startswith(f"{package}.")


def test_client_has_no_import_cycles(graph):
    """Modules of the client import each other in one direction, also for type checking only."""
    # grimp reports `calotype.v1`, which has no __init__.py, as `calotype`; generated code imports nothing of ours.
    own = [pair for pair in imports(graph, "calotype") if pair[1].startswith("calotype.")]
    order = TopologicalSorter()
    for importer, target in own:
        order.add(importer, target)
    assert list(order.static_order())  # raises CycleError, which names the cycle


def test_server_imports_only_public_modules_of_the_client(graph):
    """No part of a module that the server imports from the client begins with an underscore."""
    used = [(importer, target) for importer, target in imports(graph, "calotype_server") if is_in(target, "calotype")]
    assert used
    assert [pair for pair in used if any(part.startswith("_") for part in pair[1].split("."))] == []


def test_core_needs_only_grpcio_and_protobuf(graph):
    """The core imports the standard library, grpc and google; only `Image` imports Pillow, when a method needs it."""
    allowed = {"calotype", "grpc", "google", *sys.stdlib_module_names}
    foreign = [
        (importer, target)
        for importer, target in imports(graph, "calotype")
        if not any(is_in(importer, extra) for extra in EXTRAS) and target.partition(".")[0] not in allowed
    ]
    assert foreign == [("calotype._image", "PIL")]
