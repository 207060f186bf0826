"""Checks the scheduler of a request and its options."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, TypeVar

from calotype_server.api.enums import SIGMAS, SPACINGS
from calotype_server.engine.schedulers.names import Name, missing_package, read_name, reason_against
from calotype_server.types import Sigmas, TimestepSpacing

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype.v1 import calotype_pb2 as pb
    from calotype_server.types import ModelInfo, SchedulerInfo

__all__ = ["chosen_options", "chosen_scheduler"]

Option = TypeVar("Option", Sigmas, TimestepSpacing)

_QUOTED_CHARS = 80
_CLOSE = 0.6
"""Least similarity of a name that a violation suggests."""


def chosen_scheduler(request: pb.GenerateRequest, model: ModelInfo, reject: Callable[[str, str], None]) -> Name:
    """Returns the scheduler of a request: a class name, or the main spelling of an alias and the options it includes.

    Args:
        request: The request of the caller.
        model: The model, which has the default and all choices.
        reject: Adds a violation if the model does not support the scheduler; its name is then returned as it is.
    """
    given = request.scheduler if request.HasField("scheduler") else model.scheduler
    if given in model.schedulers:
        return Name(given)
    name = read_name(given) or Name(given)
    info = model.scheduler_info(name.scheduler)
    if info is None:
        reject("scheduler", _unsupported(given, name, model))
        return name
    for option, supported in ((name.sigmas, info.sigmas), (name.spacing, info.spacings)):
        if option is not None and option not in supported:
            reject("scheduler", f"{_quoted(given)} is unavailable, because {_unsupported_option(option, info)}")
    return name


def chosen_options(
    request: pb.GenerateRequest, model: ModelInfo, name: Name, reject: Callable[[str, str], None]
) -> tuple[Sigmas | None, TimestepSpacing | None]:
    """Returns the noise levels and the spacing of a request; None for those of the scheduler.

    Args:
        request: The request of the caller.
        model: The model.
        name: The request's scheduler.
        reject: Adds a violation for an option that the scheduler does not support, or that contradicts another.
    """
    info = model.scheduler_info(name.scheduler)

    def choose(
        field: str, number: int, value: Option | None, included: Option | None, supported: tuple[Option, ...]
    ) -> Option | None:
        if number == 0:
            return included
        if value is None:
            reject(field, f"has the unknown value {number}")
        elif included not in (None, value):
            reject(field, f"is {value.name}, but scheduler {_quoted(request.scheduler)} includes {included.name}")
        elif info is not None and value not in supported:
            reject(field, f"is {value.name}, and {_unsupported_option(value, info)}")
        return value

    sigmas = choose(
        "sigmas", request.sigmas, SIGMAS.from_proto(request.sigmas), name.sigmas, info.sigmas if info else ()
    )
    spacing = choose(
        "spacing", request.spacing, SPACINGS.from_proto(request.spacing), name.spacing, info.spacings if info else ()
    )
    if sigmas is not None and spacing is not None and (info is None or spacing in info.spacings):
        reject("spacing", f"is {spacing.name}, which cannot be combined with {sigmas.name} sigmas")
    return sigmas, spacing


def _unsupported(given: str, name: Name, model: ModelInfo) -> str:
    """Returns the violation for a scheduler that the model does not have."""
    quoted = _quoted(given)
    takes_flow = any(each.startswith("FlowMatch") for each in model.schedulers)
    # Flow models have no use for schedulers that need other packages.
    if not takes_flow and (package := missing_package(name.scheduler)) is not None:
        return f"{quoted} needs the package {package}, which this server does not have: pip install {package}"
    known = f"must be one of {', '.join(model.schedulers)}"
    if (reason := reason_against(given)) is not None:
        return f"{quoted} is unavailable, because {reason}; {known}"
    if read_name(given) is not None:
        return f"{quoted} does not work with this model, {known}"
    candidates = [*model.schedulers, *(alias for each in model.scheduler_details for alias in each.aliases)]
    by_key = {each.casefold(): each for each in candidates}
    close = difflib.get_close_matches(given[:_QUOTED_CHARS].casefold(), by_key, n=1, cutoff=_CLOSE)
    suggestion = f"; did you mean {by_key[close[0]]!r}?" if close else ""
    return f"{quoted} is unknown, {known}{suggestion}"


def _unsupported_option(option: Sigmas | TimestepSpacing, info: SchedulerInfo) -> str:
    package = missing_package(option) if isinstance(option, Sigmas) else None
    if package is not None:
        return (
            f"{option.name} sigmas need the package {package}, which this server does not have: pip install {package}"
        )
    kind = "sigmas" if isinstance(option, Sigmas) else "spacing"
    return f"{info.name} does not support {option.name} {kind}"


def _quoted(given: str) -> str:
    return repr(given[:_QUOTED_CHARS])
