"""Fixtures that run a test over every transport."""

from __future__ import annotations

import pytest

from support.service import GRPC_TRANSPORTS, TRANSPORTS


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """A transport to the service."""
    return request.param


@pytest.fixture(params=GRPC_TRANSPORTS)
def grpc_transport(request: pytest.FixtureRequest) -> str:
    """A gRPC transport, for tests of health, reflection and handlers of any kind."""
    return request.param
