"""Converts errors and durations to messages, for `calotype.testing`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from .._errors import CalotypeError, InvalidRequest
from .._status import DETAILS_KEY
from ..v1 import calotype_pb2 as v1

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._types import Model

__all__ = ["abort", "error_to_proto", "method_to_proto", "model_fields", "seconds_to_proto"]

_MODEL_FIELDS = {
    "width": "width_px",
    "height": "height_px",
    "size_multiple": "size_multiple_px",
    "steps": "step_count",
    "max_steps": "max_step_count",
    "max_preview_edge": "max_preview_edge_px",
}


def seconds_to_proto(seconds: float) -> Duration:
    """Converts seconds, 0 or more, to a Duration."""
    return Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9))


def method_to_proto(method: str) -> v1.PreviewMethod.ValueType:
    """Converts the name of a preview method, such as "head", to the enum."""
    return v1.PreviewMethod.Value(f"PREVIEW_METHOD_{method.upper()}")


def model_fields(model: Model) -> dict[str, Any]:
    """Maps the fields of `v1.Model` to the values of a model."""
    fields = {_MODEL_FIELDS.get(name, name): getattr(model, name) for name in type(model).__dataclass_fields__}
    fields["preview_methods"] = list(map(method_to_proto, model.preview_methods))
    fields["sizes"] = [v1.Size(width_px=width, height_px=height) for width, height in model.sizes]
    fields["loras"] = [v1.ModelLora(name=name) for name in model.loras]
    fields["prompt_syntaxes"] = _numbers(v1.PromptSyntax, "PROMPT_SYNTAX", model.prompt_syntaxes)
    fields["scheduler_details"] = [
        v1.Scheduler(
            name=each.name,
            aliases=each.aliases,
            sigmas=_numbers(v1.Sigmas, "SIGMAS", each.sigmas),
            spacings=_numbers(v1.TimestepSpacing, "TIMESTEP_SPACING", each.spacings),
        )
        for each in model.scheduler_details
    ]
    return fields


def _numbers(enum: Any, prefix: str, names: Iterable[str]) -> list[Any]:
    return [enum.Value(f"{prefix}_{name.upper()}") for name in names]


def error_to_proto(error: CalotypeError) -> v1.Error:
    """Converts an error to the one in the last message of a stream."""
    delay = None if error.retry_after is None else seconds_to_proto(error.retry_after)
    code = grpc.StatusCode[error.code].value[0]
    return v1.Error(code=code, reason=error.reason, message=error.message, retry_delay=delay)


def abort(context: Any, error: CalotypeError) -> NoReturn:
    """Ends a call with a status that has details, like the real server does."""
    code = grpc.StatusCode[error.code]
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain="calotype", metadata=error.metadata)]
    if error.retry_after is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=seconds_to_proto(error.retry_after)))
    if isinstance(error, InvalidRequest):
        violations = [{"field": field, "description": text} for field, text in error.violations]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    status = status_pb2.Status(code=code.value[0], message=error.message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
    context.abort(code, error.message)
    raise AssertionError("abort always raises")
