"""A server process with TLS and keys, which reloads both while it runs."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from typing import TYPE_CHECKING

import pytest

import calotype
from support.authority import Authority
from support.keyring import Keyring
from support.process import CALOTYPE, BridgeProcess, ServerProcess

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.e2e


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a `calotype` command and returns its result."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment}
    return subprocess.run([*CALOTYPE, *arguments], capture_output=True, text=True, timeout=100, env=env, check=False)


def test_a_protected_server_reloads_keys_and_certificates(cache_dir: Path, tmp_path: Path) -> None:
    """A client generates an image, a key is added, a bridge connects, and the certificate is replaced."""
    authority, keyring = Authority(tmp_path), Keyring(tmp_path / "keys.toml")
    alice = keyring.add("alice")
    protection = [*authority.options(), "--api-keys", str(keyring.path), "--cache-dir", str(cache_dir)]
    with ServerProcess(*protection) as server:
        connection = ["--address", server.address, "--ca-file", str(authority.ca)]
        generate = ["generate", "a secret fox", "--steps", "2", "--json", "-o", str(tmp_path / "fox.png")]
        made = run(*generate, *connection, CALOTYPE_API_KEY=alice)
        assert json.loads(made.stdout.splitlines()[-1])["phase"] == "succeeded", made.stderr
        assert run("model", *connection).returncode == 1
        assert "--tls" in run("model", "--address", server.address, "--api-key", alice).stderr

        added = run("keys", "add", "--name", "bob", "--file", str(keyring.path))
        server.wait_for_log("files reloaded", "keys.toml")
        with calotype.Client(server.address, tls=authority.tls(), api_key=added.stdout.strip()) as client:
            assert list(client.generations()) == []
            keyring.path.write_text("[[key")
            server.wait_for_log("files not reloaded", "keys.toml")
            assert client.model().width

        upstream = ["--upstream", server.address, "--upstream-ca", str(authority.ca), "--upstream-checks-keys"]
        with BridgeProcess(*upstream, *authority.options()) as bridge:
            url = f"https://{bridge.web_address}/readyz"
            with urllib.request.urlopen(url, context=authority.context(), timeout=20) as answer:
                assert answer.read() == b"ready\n"

        authority.renew()
        server.wait_for_log("files reloaded", "server.pem")
        with calotype.Client(server.address, tls=authority.tls(), api_key=alice) as client:
            assert client.generate("a secret fox", steps=2).result().width
        assert "secret" not in "".join(server.log)
        assert alice[-43:] not in "".join(server.log)
