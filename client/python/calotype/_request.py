"""Arguments → `GenerateRequest`. Shared by both clients.

Only what the wire cannot carry is refused here. Which values make sense depends on the model, and the server is the
one authority on that.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor

from ._errors import InvalidRequest, Violation
from .v1 import calotype_pb2 as v1

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ARGUMENTS", "CONTROL_TIMEOUT", "build_request", "resolve_timeout"]

ARGUMENTS = {"width_px": "width", "height_px": "height", "step_count": "steps"}
"""Fields of the request whose argument has another name."""

CONTROL_TIMEOUT = 10.0
"""Deadline in seconds of the calls that the server answers at once."""

_FIELDS = {argument: field for field, argument in ARGUMENTS.items()}
_FLOAT32_MAX = 3.4028234663852886e38


def build_request(prompt: str, **optional: Any) -> v1.GenerateRequest:
    """Builds a request; None means that the server chooses.

    Raises:
        InvalidRequest: The wire cannot carry an argument. Names all of them.
    """
    request = v1.GenerateRequest()
    violations: list[Violation] = []
    for argument, value in {"prompt": prompt, **optional}.items():
        if value is None and argument != "prompt":
            continue
        field = request.DESCRIPTOR.fields_by_name[_FIELDS.get(argument, argument)]
        try:
            setattr(request, field.name, _CONVERTERS[field.type](value))
        except ValueError as error:
            violations.append(Violation(argument, str(error)))
    if violations:
        raise InvalidRequest(_sentence(violations), reason="INVALID_ARGUMENTS", violations=violations)
    return request


def resolve_timeout(timeout: float | None, default: float | None) -> float | None:
    """Chooses the deadline of a call in seconds; None means that there is none."""
    chosen = default if timeout is None else timeout
    if chosen is None or chosen == math.inf:
        return None
    if isinstance(chosen, bool) or not isinstance(chosen, numbers.Real) or not chosen > 0:
        text = f"must be a positive number of seconds, not {chosen!r}"
        raise InvalidRequest(f"timeout {text}", reason="INVALID_ARGUMENTS", violations=[("timeout", text)])
    return float(chosen)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a str, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode: it has half of a surrogate pair") from None
    return value


def _integer(value: Any, bits: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"must be an int, not {type(value).__name__}")
    if not -(2 ** (bits - 1)) <= number < 2 ** (bits - 1):
        raise ValueError(f"must fit in {bits} bits, not {number}")
    return number


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"must be a number, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = None
    if number is None or (math.isfinite(number) and abs(number) > _FLOAT32_MAX):
        raise ValueError("must fit in a 32-bit float")
    return number


_CONVERTERS: dict[int, Callable[[Any], str | int | float]] = {
    FieldDescriptor.TYPE_STRING: _text,
    FieldDescriptor.TYPE_INT32: lambda value: _integer(value, 32),
    FieldDescriptor.TYPE_INT64: lambda value: _integer(value, 64),
    FieldDescriptor.TYPE_FLOAT: _number,
}


def _sentence(violations: list[Violation]) -> str:
    return "; ".join(f"{violation.field} {violation.description}" for violation in violations)
