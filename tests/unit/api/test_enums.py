"""The tables between the proto's enums and the server's values."""

from __future__ import annotations

from typing import get_args

import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.enums import DISCONNECT_POLICIES, IMAGE_FORMATS, PHASES, PREVIEW_METHODS, PRIORITIES, SPEEDS
from calotype_server.types import DisconnectPolicy, ImageFormat, Phase, PreviewMethod, Priority, Speed

TABLES = [
    pytest.param(PHASES, pb.Phase, Phase, None, id="phases"),
    pytest.param(PREVIEW_METHODS, pb.PreviewMethod, PreviewMethod, None, id="preview methods"),
    pytest.param(IMAGE_FORMATS, pb.ImageFormat, get_args(ImageFormat), "png", id="image formats"),
    pytest.param(DISCONNECT_POLICIES, pb.DisconnectPolicy, DisconnectPolicy, DisconnectPolicy.CANCEL, id="policies"),
    pytest.param(PRIORITIES, pb.Priority, Priority, Priority.INTERACTIVE, id="priorities"),
    pytest.param(SPEEDS, pb.Speed, Speed, Speed.EXACT, id="speeds"),
]


@pytest.mark.parametrize(("table", "enum", "values", "default"), TABLES)
def test_each_table_covers_every_member(table, enum, values, default) -> None:
    """Every number of the proto but 0 has exactly one value and the other way round."""
    numbers = set(enum.values()) - {0}
    assert {table.to_proto(value) for value in values} == numbers
    assert [table.from_proto(table.to_proto(value)) for value in values] == list(values)


@pytest.mark.parametrize(("table", "enum", "values", "default"), TABLES)
def test_unspecified_and_unknown_numbers(table, enum, values, default) -> None:
    """0 has the default, if there is one, and a number of a later version has no value."""
    assert table.from_proto(0) == default
    assert table.from_proto(max(enum.values()) + 1) is None


@pytest.mark.parametrize(("table", "enum", "values", "default"), TABLES)
def test_names_agree(table, enum, values, default) -> None:
    """A value has the name of its member in the proto."""
    for value in values:
        name = value.upper() if isinstance(value, str) else value.name
        assert enum.Name(table.to_proto(value)).endswith(f"_{name}")
