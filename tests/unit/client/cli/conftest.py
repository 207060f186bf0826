"""Runs the command line in this process."""

import pytest
from typer.testing import CliRunner

from calotype._cli.main import app


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(server, *arguments):
        address = server if isinstance(server, str) else server.address
        return CliRunner().invoke(app, arguments, env={"CALOTYPE_GRPC_ADDRESS": address})

    return run
