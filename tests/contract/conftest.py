"""The same promises on every port."""

from __future__ import annotations

import pytest

from support.service import TRANSPORTS


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """A way to the service."""
    return request.param
