"""Where a server may listen, and what the command line makes of keys and certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import structlog
from typer.testing import CliRunner

from calotype._cli.main import app
from calotype_server.auth import keys
from calotype_server.auth.access import Access
from calotype_server.cli.main import register
from calotype_server.errors import Exposed
from calotype_server.settings import BridgeSettings, Settings
from calotype_server.transport.net import exposure
from calotype_server.transport.net.exposure import check_exposure
from support.authority import Authority
from support.keyring import Keyring

if TYPE_CHECKING:
    from pathlib import Path

if not any(command.name == "serve" for command in app.registered_commands):
    register(app)

CERTIFICATE = {"tls_certificate": "a.pem", "tls_key": "a.key"}


def check(*addresses: str, **options: object) -> None:
    """Checks addresses as `serve` would."""
    check_exposure(Settings(**options), {f"--{number}": address for number, address in enumerate(addresses)})


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.9.9.9:1", "localhost:0", "[::1]:0"])
def test_loopback_is_open(address: str) -> None:
    """On this machine alone nothing is asked for."""
    check(address)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:80", "[2001:db8::1]:80"])
@pytest.mark.parametrize(
    ("options", "said", "unsaid"),
    [
        ({}, ["--tls-certificate FILE --tls-key FILE", "--api-keys FILE"], []),
        (CERTIFICATE, ["without a key", "--api-keys FILE"], ["--tls-certificate"]),
        ({"api_keys": "keys.toml"}, ["without encryption", "--tls-certificate"], ["--api-keys"]),
    ],
)
def test_elsewhere_both_are_needed(address: str, options: dict, said: list[str], unsaid: list[str]) -> None:
    """The refusal names the address and exactly what is missing, and the two other ways out."""
    with pytest.raises(Exposed) as caught:
        check("127.0.0.1:0", address, **options)
    text = str(caught.value)
    assert f"--1 {address}" in text
    assert "--0" not in text
    assert "--insecure" in text
    assert all(each in text for each in said)
    assert not any(each in text for each in unsaid)


def test_both_or_a_word_let_it_listen(monkeypatch) -> None:
    """With TLS and keys there is nothing to say; with --insecure there is a warning."""
    log = structlog.testing.CapturingLogger()
    monkeypatch.setattr(exposure, "_log", log)
    check("0.0.0.0:0", **CERTIFICATE, api_keys="keys.toml")
    assert not log.calls
    check("0.0.0.0:0", insecure=True)
    assert [call.method_name for call in log.calls] == ["warning"]


def test_a_bridge_may_leave_keys_to_its_upstream() -> None:
    """It passes them on; that the upstream checks them, the operator has to say."""
    with pytest.raises(Exposed, match="api-keys"):
        check_exposure(BridgeSettings(**CERTIFICATE), {"--web-address": "0.0.0.0:0"})
    check_exposure(BridgeSettings(**CERTIFICATE, upstream_checks_keys=True), {"--web-address": "0.0.0.0:0"})


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--tls-certificate", "a.pem"],
        ["serve", "--tls-key", "a.key"],
        ["serve", "--tls-client-ca", "ca.pem"],
        ["bridge", "--upstream-certificate", "a.pem"],
    ],
)
def test_halves_are_refused(arguments: list[str]) -> None:
    """A certificate without its key, or the other way round, is a usage error."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--tls-key" in result.output or "--upstream-key" in result.output


@pytest.mark.parametrize("command", ["serve", "bridge"])
def test_what_cannot_be_used_ends_the_start(command: str, tmp_path: Path) -> None:
    """An exposed address, a broken file of keys and a wrong certificate are each one sentence and exit code 1."""
    (tmp_path / "keys.toml").write_text("[[key")
    authority = Authority(tmp_path)
    authority.key.write_text("no key")
    for options, said in (
        (["--web-address", "0.0.0.0:0"], "--insecure"),
        (["--api-keys", str(tmp_path / "keys.toml")], "is not TOML"),
        (authority.options(), "server.key"),
    ):
        result = CliRunner().invoke(app, [command, *options])
        assert result.exit_code == 1
        assert said in result.output
        assert "Traceback" not in result.output


def test_a_bridge_with_a_wrong_certificate_for_its_upstream_does_not_start(tmp_path: Path) -> None:
    """It would find out with the first call only, and blame the upstream."""
    authority = Authority(tmp_path)
    authority.key.write_text("no key")
    upstream = ["--upstream-certificate", str(authority.certificate), "--upstream-key", str(authority.key)]
    result = CliRunner().invoke(app, ["bridge", "--web-address", "127.0.0.1:0", *upstream])
    assert result.exit_code == 1
    assert "server.key" in result.output


def test_keys_add_prints_the_key_once(tmp_path: Path) -> None:
    """The key opens a server with that file, which holds role, expiry and limits, and not the key."""
    path = tmp_path / "keys.toml"
    limits = ["--requests-per-minute", "5", "--concurrent", "2", "--expires", "30"]
    result = CliRunner().invoke(app, ["keys", "add", "--name", "alice", "--file", str(path), *limits])
    assert result.exit_code == 0
    key = result.stdout.strip()
    assert Access(path).authenticate(f"Bearer {key}", "").id == "key:alice"
    record = keys.read(path)["alice"]
    assert (record.role, record.requests_per_minute, record.concurrent) == ("user", 5, 2)
    assert key not in path.read_text()
    listed = CliRunner().invoke(app, ["keys", "list", "--file", str(path)])
    assert listed.stdout.split()[:3] == ["alice", "user", "until"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--name", "bob"], 1, "already"),
        (["--name", "a b"], 2, "--name"),
        (["--name", "x", "--concurrent", "0"], 2, "--concurrent"),
        (["--name", "x", "--expires", "soon"], 2, "--expires"),
        (["--name", "x", "--expires", "2027-01-01"], 2, "time zone"),
    ],
)
def test_keys_add_refuses_and_changes_nothing(options: list[str], code: int, said: str, tmp_path: Path) -> None:
    """What is wrong is named by its option, and the file stays as it was."""
    keyring = Keyring(tmp_path / "keys.toml")
    keyring.add("bob")
    before = keyring.path.read_text()
    result = CliRunner().invoke(app, ["keys", "add", "--file", str(keyring.path), *options])
    assert result.exit_code == code
    assert said in result.output
    assert keyring.path.read_text() == before
