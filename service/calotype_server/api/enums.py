"""Enums of the proto and their values inside the server, one table each."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

from calotype.v1 import calotype_pb2 as pb
from calotype_server.types import (
    DisconnectPolicy,
    Phase,
    PreviewMethod,
    Priority,
    PromptSyntax,
    Sigmas,
    Speed,
    TimestepSpacing,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calotype_server.types import ImageFormat

__all__ = [
    "DISCONNECT_POLICIES",
    "IMAGE_FORMATS",
    "PHASES",
    "PREVIEW_METHODS",
    "PRIORITIES",
    "PROMPT_SYNTAXES",
    "SIGMAS",
    "SPACINGS",
    "SPEEDS",
    "EnumTable",
]

V = TypeVar("V", bound=Hashable)
N = TypeVar("N", bound=int)


class EnumTable(Generic[V, N]):
    """Converts between the numbers of a proto enum and the server's values.

    Args:
        numbers: The number of each value.
        default: The value of `..._UNSPECIFIED`, or None when the server has none for it.
    """

    def __init__(self, numbers: Mapping[V, N], default: V | None = None) -> None:
        self._numbers = dict(numbers)
        self._values: dict[int, V] = {number: value for value, number in numbers.items()}
        if default is not None:
            self._values[0] = default

    def to_proto(self, value: V) -> N:
        """Returns the number of a value."""
        return self._numbers[value]

    def from_proto(self, number: int) -> V | None:
        """Returns the value of a number; None when the number is unknown, or unspecified without a default."""
        return self._values.get(number)


PHASES = EnumTable({phase: pb.Phase.Value(f"PHASE_{phase.name}") for phase in Phase})

PREVIEW_METHODS = EnumTable(
    {method: pb.PreviewMethod.Value(f"PREVIEW_METHOD_{method.name}") for method in PreviewMethod}
)
"""Without a default: the operator chooses it, see `types.Limits.preview`."""

_FORMATS: dict[ImageFormat, pb.ImageFormat.ValueType] = {
    "jpeg": pb.IMAGE_FORMAT_JPEG,
    "png": pb.IMAGE_FORMAT_PNG,
    "webp": pb.IMAGE_FORMAT_WEBP,
}
IMAGE_FORMATS = EnumTable(_FORMATS, default="png")

DISCONNECT_POLICIES = EnumTable(
    {policy: pb.DisconnectPolicy.Value(f"DISCONNECT_POLICY_{policy.name}") for policy in DisconnectPolicy},
    default=DisconnectPolicy.CANCEL,
)

PRIORITIES = EnumTable(
    {priority: pb.Priority.Value(f"PRIORITY_{priority.name}") for priority in Priority},
    default=Priority.INTERACTIVE,
)

SPEEDS = EnumTable({speed: pb.Speed.Value(f"SPEED_{speed.name}") for speed in Speed}, default=Speed.EXACT)

PROMPT_SYNTAXES = EnumTable(
    {syntax: pb.PromptSyntax.Value(f"PROMPT_SYNTAX_{syntax.name}") for syntax in PromptSyntax},
    default=PromptSyntax.PLAIN,
)

SIGMAS = EnumTable({sigmas: pb.Sigmas.Value(f"SIGMAS_{sigmas.name}") for sigmas in Sigmas})
"""Without a default: unspecified means those of the scheduler."""

SPACINGS = EnumTable(
    {spacing: pb.TimestepSpacing.Value(f"TIMESTEP_SPACING_{spacing.name}") for spacing in TimestepSpacing}
)
"""Without a default: unspecified means that of the scheduler."""
