"""The same promises on every port."""

from __future__ import annotations

import pytest

from support.service import GRPC_TRANSPORTS, TRANSPORTS


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """A way to the service."""
    return request.param


@pytest.fixture(params=GRPC_TRANSPORTS)
def grpc_transport(request: pytest.FixtureRequest) -> str:
    """A way to gRPC's own, such as health and handlers of any kind."""
    return request.param
