"""Renders the OpenAPI document as plain HTML without scripts or external resources."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

__all__ = ["STYLE", "render"]

STYLE = resources.files(__package__).joinpath("docs.css").read_text("utf-8")

_TEMPLATES = Environment(
    loader=PackageLoader("calotype_server.transport.http", "."), autoescape=select_autoescape(), trim_blocks=True
)


def render(document: dict[str, Any], prefix: str) -> str:
    """Returns the page as HTML.

    Args:
        document: OpenAPI 3.1.
        prefix: Prepended to every path in the document.
    """
    schemas = document["components"]["schemas"]
    template = _TEMPLATES.get_template("docs.html")
    return template.render(document=document, schemas=schemas, prefix=prefix, kind=kind)


def kind(schema: dict[str, Any]) -> tuple[str, str]:
    """Returns a description of a schema in words, and the name of the schema that it refers to; either may be ""."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return "", name
    if "anyOf" in schema:
        return kind(next(each for each in schema["anyOf"] if each.get("type") != "null"))
    if schema.get("type") == "array":
        words, name = kind(schema["items"])
        return f"list of {words}", name
    if "const" in schema or "enum" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")]))), ""
    types = schema.get("type", "anything")
    return types if isinstance(types, str) else " or ".join(types), ""
