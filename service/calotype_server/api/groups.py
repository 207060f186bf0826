"""Checks the names of groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype_server.errors import InvalidRequest, Violation
from calotype_server.limits import GROUP_CHARS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype.v1 import calotype_pb2 as pb

__all__ = ["check_group", "validate_cancel"]


def check_group(group: str, reject: Callable[[str, str], None]) -> None:
    """Checks the name of a group; empty for none.

    Args:
        group: As received.
        reject: Adds a violation: the name of the field and a description.
    """
    if len(group) > GROUP_CHARS_MAX or not (group.isascii() and group.isprintable()):
        reject("group", f"must be up to {GROUP_CHARS_MAX} characters of printable ASCII")


def validate_cancel(request: pb.CancelRequest, earlier: Sequence[Violation] = ()) -> None:
    """Checks a request to cancel a generation or a group.

    Args:
        request: The request of the caller.
        earlier: Violations found while decoding the request.

    Raises:
        InvalidRequest: It names neither, both, or an impossible group.
    """
    violations = list(earlier)
    check_group(request.group, lambda field, text: violations.append(Violation(field, text)))
    if request.generation_id and request.group:
        violations.append(Violation("generation_id", "must be empty, because group is set"))
    elif not (request.generation_id or request.group or earlier):
        violations.append(Violation("generation_id", "must not be empty, unless group is set"))
    if violations:
        raise InvalidRequest(violations)
