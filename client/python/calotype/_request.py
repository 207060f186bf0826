"""Converts arguments to requests. Shared by both clients.

This module rejects only values that a request cannot carry, such as a string for a number. All other limits depend on
the model, so the server checks them.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration

from ._constants import MAX_MEMBERS
from ._convert import wire_names
from ._errors import InvalidRequest, Violation
from ._options import GenerateOptions, Lora, Output, Previews
from .v1 import calotype_pb2 as v1

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

__all__ = [
    "argument_name",
    "build",
    "build_group",
    "build_request",
    "fill",
    "resolve_retries",
    "resolve_seconds",
    "resolve_stall_timeout",
    "resolve_timeout",
]

Request = TypeVar("Request", bound="Message")

_ARGUMENTS = {
    "width_px": "width",
    "height_px": "height",
    "step_count": "steps",
    "preview": "previews",
    "max_edge_px": "max_edge",
}
_FIELDS = {argument: field for field, argument in _ARGUMENTS.items()}
_OPTIONS: dict[str, type[Previews | Output]] = {"preview": Previews, "output": Output}
_INT64_MAX = 2**63 - 1
_FLOAT32_MAX = 3.4028234663852886e38
_DURATION_MAX = 315_576_000_000  # seconds; the range of google.protobuf.Duration


def argument_name(path: str) -> str:
    """Converts the path of a request field to an argument's name: "preview.max_edge_px" to "previews.max_edge"."""
    return ".".join(_ARGUMENTS.get(part, part) for part in path.split("."))


def build_request(
    prompt: str, *, previews: Previews | None = None, output: Output | None = None, **optional: Any
) -> v1.GenerateRequest:
    """Builds a request to generate. None leaves a field unset, so that the server uses its default.

    Raises:
        InvalidRequest: The request cannot carry an argument. Lists every violation.
    """
    return build(v1.GenerateRequest(), "prompt", {"prompt": prompt, **optional, "previews": previews, "output": output})


def build_group(
    prompt: str, n: int, group: str, *, seed: int | None, request_id: str | None, **optional: Any
) -> list[v1.GenerateRequest]:
    """Builds the requests of the members of a group. They differ in their seed and request id.

    Args:
        prompt: As for `build_request`.
        n: Number of members.
        group: Name of the group.
        seed: Seed of the first member; each further one adds 1. None or -1 lets the server draw all of them.
        request_id: Beginning of the request ids of all members. None for none.
        optional: As for `build_request`.

    Raises:
        InvalidRequest: A request cannot carry an argument, or there are too many members. Lists every violation.
        TypeError: There is no argument of this name.
    """
    if unknown := sorted(optional.keys() - GenerateOptions.__annotations__.keys()):
        raise TypeError(f"generate_many() got an unexpected keyword argument {unknown[0]!r}")
    values = {"prompt": prompt, **optional, "seed": seed, "request_id": request_id, "group": group}
    is_count = isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= MAX_MEMBERS
    wrong = [] if is_count else [Violation("n", f"must be an int, 1 to {MAX_MEMBERS}, not {n!r}")]
    first = build(v1.GenerateRequest(), "prompt", values, wrong)
    requests = []
    for index in range(n):
        request = v1.GenerateRequest()
        request.CopyFrom(first)
        if request.HasField("seed") and request.seed >= 0:
            request.seed = min(request.seed + index, _INT64_MAX)
        if request_id:
            request.request_id = f"{request_id}/{index}"
        requests.append(request)
    return requests


def build(
    request: Request, required: str | None, values: Mapping[str, Any], earlier: Sequence[Violation] = ()
) -> Request:
    """Sets the fields of a request. None leaves a field unset, so that the server uses its default.

    Args:
        request: Has no fields set.
        required: Name of the argument that must not be None; None if there is no such argument.
        values: The arguments.
        earlier: Violations that were found before.

    Raises:
        InvalidRequest: The request cannot carry an argument, or the required one is None. Lists every violation.
    """
    violations = [*earlier, *fill(request, values)]
    if required is not None and values[required] is None:
        violations.insert(0, Violation(required, "must be a str, not NoneType"))
    if violations:
        raise InvalidRequest(_sentence(violations), reason="INVALID_ARGUMENTS", violations=violations)
    return request


def fill(message: Message, values: Mapping[str, Any], prefix: str = "") -> list[Violation]:
    """Sets the fields of a message from arguments. None leaves a field unset.

    Returns:
        A violation for each argument that the message cannot carry.
    """
    violations: list[Violation] = []
    for argument, value in values.items():
        if value is None:
            continue
        field = message.DESCRIPTOR.fields_by_name[_FIELDS.get(argument, argument)]
        try:
            if (kind := _OPTIONS.get(field.name)) is not None:
                options = _options(value, kind)
                violations += fill(getattr(message, field.name), options, f"{prefix}{argument}.")
            elif field.name == "loras":
                for index, lora in enumerate(_loras(value)):
                    violations += fill(getattr(message, field.name).add(), lora, f"{prefix}{argument}[{index}].")
            elif field.type == FieldDescriptor.TYPE_MESSAGE:
                getattr(message, field.name).CopyFrom(_duration(value))
            else:
                setattr(message, field.name, _CONVERTERS[field.type](value, field))
        except ValueError as error:
            violations.append(Violation(prefix + argument, str(error)))
    return violations


def resolve_timeout(timeout: float | None, default: float | None) -> float | None:
    """Returns the deadline of a call in seconds, or None for no deadline.

    Raises:
        InvalidRequest: The timeout is not a positive number.
    """
    chosen = default if timeout is None else timeout
    if chosen is None or chosen == math.inf:
        return None
    if isinstance(chosen, bool) or not isinstance(chosen, numbers.Real) or not chosen > 0:
        text = f"must be a positive number of seconds, not {chosen!r}"
        raise InvalidRequest(f"timeout {text}", reason="INVALID_ARGUMENTS", violations=[("timeout", text)])
    return float(chosen)


def resolve_retries(retries: int) -> int:
    """Returns the number of retries.

    Raises:
        ValueError: It is not an integer, or negative.
    """
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ValueError(f"retries must be an int, 0 or more, not {retries!r}")
    return retries


def resolve_stall_timeout(seconds: float | None) -> float | None:
    """Returns the stall timeout in seconds, or None for no limit.

    Raises:
        ValueError: It is not a positive number.
    """
    if seconds is None or seconds == math.inf:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real) or not seconds > 0:
        raise ValueError(f"stall_timeout must be a positive number of seconds, not {seconds!r}")
    return float(seconds)


def resolve_seconds(name: str, seconds: float) -> float:
    """Returns the duration of the argument `name` in seconds. `math.inf` means no limit.

    Raises:
        ValueError: It is not a number, or negative.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real) or not seconds >= 0:
        raise ValueError(f"{name} must be a number of seconds, 0 or more, not {seconds!r}")
    return float(seconds)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a str, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode: it contains half of a surrogate pair") from None
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


def _check_real(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"must be a number, not {type(value).__name__}")


def _number(value: Any) -> float:
    _check_real(value)
    try:
        number = float(value)
    except OverflowError:
        number = None
    if number is None or (math.isfinite(number) and abs(number) > _FLOAT32_MAX):
        raise ValueError("must fit in a 32-bit float")
    return number


def _duration(value: Any) -> Duration:
    _check_real(value)
    if not abs(value) <= _DURATION_MAX:
        raise ValueError(f"must be at most {_DURATION_MAX} seconds")
    duration = Duration()
    duration.FromNanoseconds(round(float(value) * 1e9))
    return duration


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be a bool, not {type(value).__name__}")
    return value


def _choice(value: Any, field: Any) -> int:
    choices = {name: number for number, name in wire_names(field.enum_type).items()}
    if _text(value) not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}, not {str(value)!r}")
    return choices[value]


def _options(value: Any, kind: type[Previews | Output]) -> dict[str, Any]:
    if not isinstance(value, kind):
        raise ValueError(f"must be a calotype.{kind.__name__}, not {type(value).__name__}")
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _loras(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, Mapping):
        return [{"name": name, "scale": scale} for name, scale in value.items()]
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(each, Lora) for each in value):
        return [{"name": each.name, "scale": each.scale} for each in value]
    raise ValueError("must be a list of calotype.Lora, or a dict with the scale of each name")


_CONVERTERS: dict[int, Callable[[Any, Any], str | int | float]] = {
    FieldDescriptor.TYPE_STRING: lambda value, _: _text(value),
    FieldDescriptor.TYPE_BOOL: lambda value, _: _boolean(value),
    FieldDescriptor.TYPE_INT32: lambda value, _: _integer(value, 32),
    FieldDescriptor.TYPE_INT64: lambda value, _: _integer(value, 64),
    FieldDescriptor.TYPE_FLOAT: lambda value, _: _number(value),
    FieldDescriptor.TYPE_ENUM: _choice,
}


def _sentence(violations: list[Violation]) -> str:
    return "; ".join(f"{violation.field} {violation.description}" for violation in violations)
