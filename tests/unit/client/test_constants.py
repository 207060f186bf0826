"""The table of constants that the Python and the TypeScript client share."""

import re
from pathlib import Path

import pytest

from calotype import _constants

TABLE = Path(__file__).parents[3] / "client" / "typescript" / "src" / "constants.ts"


def test_typescript_has_the_same_constants():
    """`constants.ts` exports the same names with the same values."""
    if not TABLE.exists():
        pytest.skip("the TypeScript client has no table yet")
    exported = re.findall(r"^export const ([A-Z_]+) = ([\d._]+);", TABLE.read_text(), re.MULTILINE)
    assert {name: float(value) for name, value in exported} == {
        name: float(getattr(_constants, name)) for name in _constants.__all__
    }
