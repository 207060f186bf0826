"""The classes, reasons and codes of errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import pytest
from google.rpc.code_pb2 import Code

from calotype_server import errors
from calotype_server.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind = TypeVar("Kind", bound=Exception)

ABSTRACT = {"ServiceError", "GenerationError"}
"""Bases that are never raised and share the reason INTERNAL."""


def subclasses(base: type[Kind]) -> Iterator[type[Kind]]:
    """All subclasses in the package `errors`, direct and indirect; tests elsewhere may define their own."""
    for each in base.__subclasses__():
        if each.__module__.startswith(errors.__name__):
            yield each
            yield from subclasses(each)


SERVICE_ERRORS = [each for each in subclasses(ServiceError) if each.__name__ not in ABSTRACT]


@pytest.mark.parametrize("kind", SERVICE_ERRORS)
def test_each_class_is_named_after_its_reason(kind: type[ServiceError]) -> None:
    """Searching the code for a reason that a caller received finds the class: QUEUE_FULL is QueueFull."""
    assert kind.__name__ == "".join(word.capitalize() for word in kind.reason.split("_"))


@pytest.mark.parametrize("kind", SERVICE_ERRORS)
def test_each_code_is_a_status_of_grpc(kind: type[ServiceError]) -> None:
    """Every error maps to a gRPC status other than OK."""
    assert Code.Value(kind.code) != Code.OK


def test_no_two_errors_share_a_reason() -> None:
    """A reason identifies one error."""
    reasons = [kind.reason for kind in SERVICE_ERRORS]
    assert len(reasons) == len(set(reasons))


def test_the_tree_in_the_documentation_is_complete() -> None:
    """The module docstring lists every class, with the code of each that sets its own."""
    lines = [line.lstrip("│├└─ ").split() for line in (errors.__doc__ or "").split("```")[1].splitlines()]
    listed = {words[0]: words[1:2] for words in lines if words}
    every = [errors.ServiceError, errors.StartupError, *subclasses(ServiceError), *subclasses(errors.StartupError)]
    assert set(listed) == {each.__name__ for each in every}
    for kind in SERVICE_ERRORS:
        if "code" in vars(kind):
            assert listed[kind.__name__] == [kind.code]


def test_every_error_is_exported() -> None:
    """`__all__` lists every class of the package."""
    names = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__.startswith(errors.__name__)
    }
    assert names == set(errors.__all__)
