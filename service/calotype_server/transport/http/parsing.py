"""Parses JSON and query strings to messages, and reports all violations at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

from google.protobuf import json_format
from google.protobuf.message import Message
from pydantic import BaseModel, ValidationError
from pydantic_core import core_schema

from calotype_server.api.field_names import suggested_field
from calotype_server.errors import Violation
from calotype_server.transport.http.schema import request_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic import GetCoreSchemaHandler

__all__ = ["Lenient", "Parsed", "parse", "parse_message", "parse_query", "query_parameters", "sentence"]

M = TypeVar("M", bound=BaseModel)
P = TypeVar("P", bound=Message)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parsed(Generic[T]):
    """The valid parts of a request, and the violations found so far. Later checks may add more."""

    value: T
    violations: list[Violation]


def parse(model: type[M], data: Any) -> Parsed[M]:
    """Returns a model of the valid fields of `data`. Every field of `model` must have a default."""
    violations: list[Violation] = []
    for _ in range(2):
        try:
            return Parsed(model.model_validate(data), violations)
        except ValidationError as error:
            for each in error.errors(include_url=False, include_input=False):
                path = tuple(map(str, each["loc"]))
                description = sentence(each)
                if each["type"] == "extra_forbidden":
                    meant = suggested_field(path[-1], _fields_at(model, path[:-1]))
                    description += "" if meant is None else f"; did you mean {meant}?"
                violations.append(Violation(_printable(".".join(path)) or "body", description))
                data = _without(data, path)
    return Parsed(model(), violations)


def parse_message(kind: type[P], data: Any) -> Parsed[P]:
    """Returns a message of the valid fields of `data`, its JSON."""
    parsed = parse(request_model(kind), data)
    given = parsed.value.model_dump(exclude_none=True)
    return Parsed(json_format.ParseDict(given, kind()), parsed.violations)


def parse_query(kind: type[P], query: Mapping[str, str]) -> Parsed[P]:
    """Returns a message of the valid fields of a query.

    Dots lead into messages, as in preview.quality=80, and numbers into lists, as in loras.0.name=watercolor.
    """
    data: dict[str, Any] = {}
    for name, value in query.items():
        outer, dot, inner = name.partition(".")
        if not dot:
            data[name] = value
        elif isinstance(data.setdefault(outer, {}), dict):
            data[outer][inner] = value
    for field in kind.DESCRIPTOR.fields:
        if field.is_repeated and isinstance(data.get(field.name), dict):
            data[field.name] = _items(data[field.name])
    return parse_message(kind, data)


def _items(fields: dict[str, str]) -> Any:
    """Returns the items of a list, from keys such as "0.name"; the fields unchanged if they have other keys."""
    items: dict[int, dict[str, str]] = {}
    for key, value in fields.items():
        number, _, name = key.partition(".")
        if not (number.isascii() and number.isdecimal() and len(number) <= 3 and name):
            return fields
        items.setdefault(int(number), {})[name] = value
    return [items[number] for number in sorted(items)]


def query_parameters(kind: type[Message], *, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Returns the OpenAPI description of a query for `parse_query`, except the parameters named in `without`."""
    root = request_model(kind).model_json_schema()

    def flatten(schema: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
        parameters = []
        for name, field in schema["properties"].items():
            reference, number = (field["items"], "0.") if field.get("type") == "array" else (field, "")
            if "$ref" in reference:
                parameters += flatten(root["$defs"][reference["$ref"].rpartition("/")[2]], f"{prefix}{name}.{number}")
            else:
                description = field.pop("description")
                parameters.append({"name": prefix + name, "in": "query", "description": description, "schema": field})
        return parameters

    return [each for each in flatten(root, "") if each["name"] not in without]


class Lenient:
    """Annotates a FastAPI body of type `Parsed`: documented as `model`, and never rejected while it is parsed.

    Args:
        model: Model or message type of the body.
    """

    def __init__(self, model: type[BaseModel] | type[Message]) -> None:
        self._message = model if issubclass(model, Message) else None
        self._model = model if issubclass(model, BaseModel) else request_model(model)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def validate(data: Any, _: object) -> Parsed[Any]:
            return parse(self._model, data) if self._message is None else parse_message(self._message, data)

        return core_schema.no_info_wrap_validator_function(validate, handler.generate_schema(self._model))


def sentence(error: Any) -> str:
    """Returns the text of one of pydantic's errors in the style of Calotype's own violations."""
    if error["type"] == "extra_forbidden":
        return "is unknown"
    if error["type"] in ("model_type", "model_attributes_type"):
        return "must be a JSON object, sent as application/json" if not error["loc"] else "must be an object"
    if error["type"] in ("list_type", "tuple_type"):
        return "must be a list"
    if error["type"] == "too_long":
        return f"has too many entries, the maximum is {error['ctx']['max_length']}"
    message: str = error["msg"]
    return message.removeprefix("Value error, ").replace("Input should be", "must be")


def _printable(name: str) -> str:
    """Returns a field name that can be sent back: callers choose the names of unknown fields."""
    return name.encode("utf-8", "replace").decode()[:80]


def _without(data: Any, path: tuple[str, ...]) -> Any:
    """Returns JSON without the value at a path of field names and indices of lists."""
    if path and isinstance(data, list):
        index, rest = int(path[0]), path[1:]
        if index >= len(data):
            return data  # removed with another item
        # As a whole: without an item, the others would have other numbers.
        return [*data[:index], _without(data[index], rest), *data[index + 1 :]] if rest else []
    if not path or not isinstance(data, dict):
        return {}
    if len(path) == 1:
        return {name: value for name, value in data.items() if name != path[0]}
    return {**data, path[0]: _without(data.get(path[0]), path[1:])}


def _fields_at(model: type[BaseModel], path: tuple[str, ...]) -> Iterable[str]:
    """Returns the fields of the part of a model at a path of field names and indices of lists."""
    part: type[BaseModel] | None = model
    for name in path:
        if part is not None and name in part.model_fields:
            part = _model_in(part.model_fields[name].annotation)
    return () if part is None else part.model_fields


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the model that an annotation is or contains, as in `list[Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _model_in(each)) is not None), None)
