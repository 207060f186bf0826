"""Derives pydantic models from the proto's messages, to parse JSON requests and to describe the API.

JSON is the canonical form of proto3 with the proto's own field names (snake_case): enums by name, 64-bit integers as
strings, durations as "1.5s", bytes in base64. Fields that are 0, empty or absent are left out.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any, Literal

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, create_model, model_validator

from calotype_server.limits import LORAS_MAX

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor
    from google.protobuf.message import Message

__all__ = ["RequestModel", "Text", "as_json", "request_model", "response_model"]

_MAX_FLOAT = 3.4028234663852886e38

_DURATION = Annotated[str, Field(pattern=r"^-?[0-9]{1,11}(\.[0-9]{1,9})?s$", examples=["1.5s"])]
_TIMESTAMP = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
_INT64 = Annotated[
    int,
    Field(ge=-(2**63), le=2**63 - 1),
    WithJsonSchema({"type": ["integer", "string"], "format": "int64", "pattern": "^-?[0-9]+$"}),
]
_INT64_STRING = Annotated[str, WithJsonSchema({"type": "string", "format": "int64", "pattern": "^-?[0-9]+$"})]
_BASE64 = Annotated[str, WithJsonSchema({"type": "string", "contentEncoding": "base64"})]

_MAX_ITEMS = {"calotype.v1.GenerateRequest.loras": LORAS_MAX}
"""Maximum length of lists in requests."""


def _in_unicode(value: str) -> str:
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("must not contain half of a surrogate pair")
    return value


Text = Annotated[str, AfterValidator(_in_unicode)]
"""A string that can be encoded as UTF-8. JSON also allows others."""

_SCALARS: dict[int, Any] = {
    FieldDescriptor.TYPE_STRING: Text,
    FieldDescriptor.TYPE_BOOL: bool,
    FieldDescriptor.TYPE_INT32: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)],
    FieldDescriptor.TYPE_FLOAT: Annotated[float, Field(ge=-_MAX_FLOAT, le=_MAX_FLOAT, allow_inf_nan=False)],
    FieldDescriptor.TYPE_BYTES: _BASE64,
}
_WELL_KNOWN = {"google.protobuf.Duration": _DURATION, "google.protobuf.Timestamp": _TIMESTAMP}


class RequestModel(BaseModel):
    """Base of all requests: unknown fields are rejected, and null means absent."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


def as_json(message: Message) -> dict[str, Any]:
    """Returns a message as JSON."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def request_model(message: type[Message]) -> type[BaseModel]:
    """Returns the model of a message in requests."""
    return _model(message.DESCRIPTOR, RequestModel)


def response_model(message: type[Message]) -> type[BaseModel]:
    """Returns the model of a message in responses."""
    return _model(message.DESCRIPTOR, BaseModel)


@functools.cache
def _model(message: Descriptor, base: type[BaseModel]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for field in message.fields:
        kind = _type(field, base)
        if field.is_repeated:
            kind = list[kind]  # type: ignore[valid-type]
        description = _comment(field.full_name)
        if field.enum_type is not None:
            description += "".join(f"\n- `{v.name}`: {_comment(_value_name(v))}" for v in field.enum_type.values)
        most = _MAX_ITEMS.get(field.full_name)
        fields[field.name] = (
            kind,
            Field(None, description=description, max_length=most, json_schema_extra=_without_default),
        )
    return create_model(message.name, __base__=base, __doc__=_comment(message.full_name), **fields)


def _without_default(schema: dict[str, Any]) -> None:
    # None means "absent" and is not a value of the field.
    del schema["default"]


def _type(field: FieldDescriptor, base: type[BaseModel]) -> Any:
    if field.enum_type is not None:
        return Literal[tuple(field.enum_type.values_by_name)]
    if field.message_type is not None:
        known = _WELL_KNOWN.get(field.message_type.full_name)
        return known or _model(field.message_type, base)
    if field.type == FieldDescriptor.TYPE_INT64:
        return _INT64 if base is RequestModel else _INT64_STRING
    return _SCALARS[field.type]


def _value_name(value: Any) -> str:
    return f"{value.type.full_name}.{value.name}"


def _comment(full_name: str) -> str:
    return _comments().get(full_name, "")


@functools.cache
def _comments() -> dict[str, str]:
    """Returns the comments of the proto by the full name of the element that they describe."""
    found = {}
    data = resources.files(__package__).joinpath("proto.binpb").read_bytes()
    for file in FileDescriptorSet.FromString(data).file:
        for location in file.source_code_info.location:
            if location.leading_comments:
                # The path alternates between the number of a repeated field and the index in it.
                name, at = file.package, file
                for number, index in zip(location.path[::2], location.path[1::2], strict=False):
                    at = getattr(at, at.DESCRIPTOR.fields_by_number[number].name)[index]
                    name = f"{name}.{at.name}"
                found[name] = " ".join(location.leading_comments.split())
    return found
