"""Where a server may listen, and the command-line options for keys and certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

CERTIFICATE: dict[str, Any] = {"tls_certificate": "a.pem", "tls_key": "a.key"}


def check(*addresses: str, **options: Any) -> None:
    """Checks addresses as `serve` does."""
    check_exposure(Settings(**options), {f"--{number}": address for number, address in enumerate(addresses)})


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.9.9.9:1", "localhost:0", "[::1]:0"])
def test_loopback_needs_no_protection(address: str) -> None:
    """A port that only this machine can reach needs neither TLS nor keys."""
    check(address)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:80", "[2001:db8::1]:80"])
@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ({}, ["--tls-certificate FILE --tls-key FILE", "--api-keys FILE"], []),
        (CERTIFICATE, ["without a key", "--api-keys FILE"], ["--tls-certificate"]),
        ({"api_keys": "keys.toml"}, ["without encryption", "--tls-certificate"], ["--api-keys"]),
    ],
)
def test_other_addresses_need_tls_and_keys(address: str, options: dict, present: list[str], absent: list[str]) -> None:
    """The error names the exposed address, exactly the missing options, and the two alternatives."""
    with pytest.raises(Exposed) as caught:
        check("127.0.0.1:0", address, **options)
    text = str(caught.value)
    assert f"--1 {address}" in text
    assert "--0" not in text
    assert "--insecure" in text
    assert all(each in text for each in present)
    assert not any(each in text for each in absent)


def test_tls_with_keys_or_insecure_allows_listening(monkeypatch) -> None:
    """TLS and keys log nothing; `--insecure` logs a warning."""
    log = structlog.testing.CapturingLogger()
    monkeypatch.setattr(exposure, "_log", log)
    check("0.0.0.0:0", **CERTIFICATE, api_keys="keys.toml")
    assert not log.calls
    check("0.0.0.0:0", insecure=True)
    assert [call.method_name for call in log.calls] == ["warning"]


def test_a_bridge_may_rely_on_keys_checked_upstream() -> None:
    """A bridge forwards keys, so the operator can declare that the upstream checks them."""
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
def test_incomplete_tls_options_are_rejected(arguments: list[str]) -> None:
    """A certificate without its key, or a key without its certificate, is a usage error."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--tls-key" in result.output or "--upstream-key" in result.output


@pytest.mark.parametrize("command", ["serve", "bridge"])
def test_unusable_settings_end_the_start_with_one_sentence(command: str, tmp_path: Path) -> None:
    """An exposed address, a broken key file and a wrong certificate each print one sentence and exit with 1."""
    (tmp_path / "keys.toml").write_text("[[key")
    authority = Authority(tmp_path)
    authority.key.write_text("no key")
    for options, expected in (
        (["--web-address", "0.0.0.0:0"], "--insecure"),
        (["--api-keys", str(tmp_path / "keys.toml")], "is not TOML"),
        (authority.options(), "server.key"),
    ):
        result = CliRunner().invoke(app, [command, *options])
        assert result.exit_code == 1
        assert expected in result.output
        assert "Traceback" not in result.output


def test_a_bridge_with_a_wrong_certificate_for_its_upstream_does_not_start(tmp_path: Path) -> None:
    """Otherwise the first call would fail and blame the upstream."""
    authority = Authority(tmp_path)
    authority.key.write_text("no key")
    upstream = ["--upstream-certificate", str(authority.certificate), "--upstream-key", str(authority.key)]
    result = CliRunner().invoke(app, ["bridge", "--web-address", "127.0.0.1:0", *upstream])
    assert result.exit_code == 1
    assert "server.key" in result.output


def test_keys_add_prints_the_key_once(tmp_path: Path) -> None:
    """The printed key is valid for a server with that file; the file holds role, expiry and limits, but not the key."""
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
    ("options", "code", "expected"),
    [
        (["--name", "bob"], 1, "already"),
        (["--name", "a b"], 2, "--name"),
        (["--name", "x", "--concurrent", "0"], 2, "--concurrent"),
        (["--name", "x", "--expires", "soon"], 2, "--expires"),
        (["--name", "x", "--expires", "2027-01-01"], 2, "time zone"),
    ],
)
def test_rejected_keys_add_leaves_the_file_unchanged(
    options: list[str], code: int, expected: str, tmp_path: Path
) -> None:
    """The error names the wrong option, and the file does not change."""
    keyring = Keyring(tmp_path / "keys.toml")
    keyring.add("bob")
    before = keyring.path.read_text()
    result = CliRunner().invoke(app, ["keys", "add", "--file", str(keyring.path), *options])
    assert result.exit_code == code
    assert expected in result.output
    assert keyring.path.read_text() == before
