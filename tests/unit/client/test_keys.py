"""The API key of a client: where it comes from, which calls carry it, and what a rejection raises."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from calotype import AsyncClient, Cancelled, Client, Unauthenticated
from calotype._cli.main import app
from calotype.testing import FakeServer

KEY = "calotype_alice_secret"


@pytest.fixture
def server():
    """A server that requires a key."""
    with FakeServer(steps=2, hold_at=1, api_key=KEY) as server:
        yield server


def test_every_call_carries_the_key(server):
    """Every method sends the key, and so does the background cancel."""
    with Client(server.address, api_key=KEY) as client:
        assert client.model().name == "fake"
        generation = client.generate("a cat")
        progress = next(iter(generation))
        assert [each.generation_id for each in client.generations()] == [progress.generation_id]
        generation.cancel()
        assert server.wait_cancelled()
        assert client.cancel(progress.generation_id).ended
        assert client.finish(progress.generation_id).ended
        with pytest.raises(Cancelled):
            client.watch(progress.generation_id).result()
        for _ in client.generate("a dog"):
            break
        assert server.wait_cancelled(count=2)


async def test_every_asyncio_call_carries_the_key(server):
    """Every method of the asyncio client sends the key."""
    async with AsyncClient(server.address, api_key=KEY) as client:
        assert (await client.model()).name == "fake"
        generation = client.generate("a cat")
        progress = await anext(aiter(generation))
        assert [each.generation_id async for each in client.generations()] == [progress.generation_id]
        generation.cancel()
        assert (await client.cancel(progress.generation_id)) is not None
        assert (await client.finish(progress.generation_id)).ended
        with pytest.raises(Cancelled):
            await client.watch(progress.generation_id).result()
        async for _ in client.generate("a dog"):
            break
    assert server.wait_cancelled(count=2)


@pytest.mark.parametrize(("key", "reason"), [("", "KEY_REQUIRED"), ("calotype_alice_other", "KEY_INVALID")])
async def test_rejected_key_raises_unauthenticated(key, reason, server):
    """A rejected key raises Unauthenticated with the server's reason, and nothing is retried."""
    with Client(server.address, api_key=key) as client:
        for ask in (client.model, client.generate("a cat").result):
            with pytest.raises(Unauthenticated) as caught:
                ask()
            assert caught.value.reason == reason
    async with AsyncClient(server.address, api_key=key) as client:
        with pytest.raises(Unauthenticated):
            await client.generate("a cat").result()
    assert not server.requests


def test_environment_variable_is_the_default_key(server, monkeypatch):
    """CALOTYPE_API_KEY is the default key; an empty key sends none."""
    monkeypatch.setenv("CALOTYPE_API_KEY", f"{KEY}\n")
    with Client(server.address) as client:
        assert client.model().name == "fake"
    with Client(server.address, api_key="") as client, pytest.raises(Unauthenticated):
        client.model()


@pytest.mark.parametrize("key", ["two keys", "line\nbreak", "schl\u00fcssel", "tab\t"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_malformed_key_raises_without_repeating_it(key, kind):
    """A malformed key raises ValueError, whose message omits the key."""
    with pytest.raises(ValueError, match="API key") as caught:
        kind(api_key=key)
    assert key not in str(caught.value)


def test_key_is_not_printed(server):
    """Neither repr() nor an error contains the key."""
    with Client(server.address, api_key="calotype_alice_other") as client:
        assert "other" not in repr(client)
        with pytest.raises(Unauthenticated) as caught:
            client.model()
        assert "other" not in repr(caught.value)


def test_command_line_takes_the_key_as_option_or_variable(server):
    """The option and the variable set the key; without a key, the message names the option."""
    address = ["--address", server.address]
    assert CliRunner().invoke(app, ["model", *address, "--api-key", KEY]).exit_code == 0
    assert CliRunner().invoke(app, ["model", *address], env={"CALOTYPE_API_KEY": KEY}).exit_code == 0
    without = CliRunner().invoke(app, ["model", *address], env={"CALOTYPE_API_KEY": ""})
    assert without.exit_code == 1
    assert "--api-key" in without.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--client-key", "x.key"], "go together"), (["--ca-file", "none.pem"], "Cannot read none.pem")],
)
def test_command_line_reports_problems_with_tls_files(options, message):
    """A problem with a TLS file is one line on stderr, without a traceback."""
    result = CliRunner().invoke(app, ["model", "--address", "127.0.0.1:1", *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
