"""Command-line options made from the fields of settings."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import pydantic
import typer

from calotype_server.settings import WebSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic.fields import FieldInfo

__all__ = ["default_text", "flag_text", "help_text", "with_settings"]

S = TypeVar("S", bound=WebSettings)


def with_settings(command: Callable[[S], None], kind: type[S]) -> Callable[..., None]:
    """Returns `command` as a function with one option per field of its settings.

    A field without its option is read from its `CALOTYPE_...` variable. The function prints invalid settings, one line
    each, and exits with code 2.
    """

    def run(**options: Any) -> None:
        given = {name: value for name, value in options.items() if value not in (None, [])}
        try:
            settings = kind(**given)
        except pydantic.ValidationError as error:
            for problem in error.errors():
                # Problems of two settings together have no location; their messages name both.
                flag = f"{flag_text(str(problem['loc'][0]))}: " if problem["loc"] else ""
                typer.secho(f"calotype: {flag}{problem['msg'].removeprefix('Value error, ')}", fg="red", err=True)
            raise typer.Exit(2) from None
        command(settings)

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__.strip("_")
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(name, field, kind))
            for name, field in kind.model_fields.items()
        ]
    )
    return run


def _option(name: str, field: FieldInfo, kind: type[WebSettings]) -> Any:
    default = default_text(field)
    text = f"{help_text(field)} Default: {default}." if default else help_text(field)
    if field.annotation in (bool, bool | None):
        no = f"/--no-{name.replace('_', '-')}"
        return Annotated[bool | None, typer.Option(flag_text(name) + no, help=text, show_default=False)]
    if name in kind.repeated:
        return Annotated[
            list[str] | None, typer.Option(flag_text(name), help=text, show_default=False, metavar="VALUE")
        ]
    # As text, because pydantic parses options and variables alike.
    return Annotated[str | None, typer.Option(flag_text(name), help=text, show_default=False, metavar="VALUE")]


def flag_text(name: str) -> str:
    """Returns the option of a setting, such as `--max-queue`."""
    return f"--{name.replace('_', '-')}"


def default_text(field: FieldInfo) -> str:
    """Returns the default of a setting; empty when it has none or its description explains it."""
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    return "" if default in (None, "") else str(default)


def help_text(field: FieldInfo) -> str:
    """Returns the description of a setting with its range."""
    return f"{field.description} {_range_text(field)}".rstrip()


def _range_text(field: FieldInfo) -> str:
    """Returns the bounds of a number as a sentence; empty for none, and for numbers that are 0 or more."""
    bounds = {
        name: getattr(each, name) for each in field.metadata for name in ("ge", "gt", "le") if hasattr(each, name)
    }
    lowest = f"above {bounds['gt']:g}" if "gt" in bounds else f"{bounds.get('ge', 0):g}"
    if "le" in bounds:
        return f"Range: {lowest} to {bounds['le']:g}."
    return f"{lowest.capitalize()}." if "gt" in bounds else "" if lowest == "0" else f"At least {lowest}."
