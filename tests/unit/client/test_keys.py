"""The API key of a client: where it comes from, that every call carries it, and what a refusal becomes."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from calotype import AsyncClient, Cancelled, Client, Unauthenticated
from calotype._cli.main import app
from calotype.testing import FakeServer

KEY = "calotype_alice_secret"


@pytest.fixture
def server():
    """A server that asks for a key."""
    with FakeServer(steps=2, hold_at=1, api_key=KEY) as server:
        yield server


def test_every_call_carries_the_key(server):
    """Each method works, and so does the farewell of whoever leaves early."""
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


async def test_every_call_of_the_asyncio_twin_carries_the_key(server):
    """The same, awaited."""
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
async def test_a_refusal_is_unauthenticated(key, reason, server):
    """The reason tells whether there was a key at all; nothing is retried."""
    with Client(server.address, api_key=key) as client:
        for ask in (client.model, client.generate("a cat").result):
            with pytest.raises(Unauthenticated) as caught:
                ask()
            assert caught.value.reason == reason
    async with AsyncClient(server.address, api_key=key) as client:
        with pytest.raises(Unauthenticated):
            await client.generate("a cat").result()
    assert not server.requests


def test_the_key_of_the_environment_is_the_default(server, monkeypatch):
    """It is used when none is given; an empty one means none."""
    monkeypatch.setenv("CALOTYPE_API_KEY", f"{KEY}\n")
    with Client(server.address) as client:
        assert client.model().name == "fake"
    with Client(server.address, api_key="") as client, pytest.raises(Unauthenticated):
        client.model()


@pytest.mark.parametrize("key", ["two keys", "line\nbreak", "schl\u00fcssel", "tab\t"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_what_cannot_be_a_key_is_refused_unheard(key, kind):
    """The error does not repeat it: it may be another secret, pasted by mistake."""
    with pytest.raises(ValueError, match="API key") as caught:
        kind(api_key=key)
    assert key not in str(caught.value)


def test_the_key_is_not_shown(server):
    """Not in a repr, nor in what an error says."""
    with Client(server.address, api_key="calotype_alice_other") as client:
        assert "other" not in repr(client)
        with pytest.raises(Unauthenticated) as caught:
            client.model()
        assert "other" not in repr(caught.value)


def test_the_command_line_takes_the_key_as_option_and_variable(server):
    """Both work; without, it says how to give one."""
    address = ["--address", server.address]
    assert CliRunner().invoke(app, ["model", *address, "--api-key", KEY]).exit_code == 0
    assert CliRunner().invoke(app, ["model", *address], env={"CALOTYPE_API_KEY": KEY}).exit_code == 0
    without = CliRunner().invoke(app, ["model", *address], env={"CALOTYPE_API_KEY": ""})
    assert without.exit_code == 1
    assert "--api-key" in without.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--client-key", "x.key"], "go together"), (["--ca-file", "none.pem"], "Cannot read none.pem")],
)
def test_the_command_line_names_what_is_wrong_with_its_files(options, said):
    """One sentence, no traceback."""
    result = CliRunner().invoke(app, ["model", "--address", "127.0.0.1:1", *options])
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output
