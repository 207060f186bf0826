"""A server with TLS and keys as a process of its own: reached from everywhere, and changed while it runs."""

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
    """Runs a command to its end."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment}
    return subprocess.run([*CALOTYPE, *arguments], capture_output=True, text=True, timeout=100, env=env, check=False)


def test_a_closed_server_is_used_and_changed_while_it_runs(cache_dir: Path, tmp_path: Path) -> None:
    """With TLS, keys, and a bridge before it: a picture is made, a key is added, the certificate is swapped."""
    authority, keyring = Authority(tmp_path), Keyring(tmp_path / "keys.toml")
    alice = keyring.add("alice")
    doors = [*authority.options(), "--api-keys", str(keyring.path), "--cache-dir", str(cache_dir)]
    with ServerProcess(*doors) as server:
        reach = ["--address", server.address, "--ca-file", str(authority.ca)]
        asked = ["generate", "a secret fox", "--steps", "2", "--json", "-o", str(tmp_path / "fox.png")]
        made = run(*asked, *reach, CALOTYPE_API_KEY=alice)
        assert json.loads(made.stdout.splitlines()[-1])["phase"] == "succeeded", made.stderr
        assert run("model", *reach).returncode == 1
        assert "--tls" in run("model", "--address", server.address, "--api-key", alice).stderr

        added = run("keys", "add", "--name", "bob", "--file", str(keyring.path))
        server.wait_for_log("files reloaded", "keys.toml")
        with calotype.Client(server.address, tls=authority.tls(), api_key=added.stdout.strip()) as client:
            assert list(client.generations()) == []
            keyring.path.write_text("[[key")
            server.wait_for_log("files not reloaded", "keys.toml")
            assert client.model().width

        behind = ["--upstream", server.address, "--upstream-ca", str(authority.ca), "--upstream-checks-keys"]
        with BridgeProcess(*behind, *authority.options()) as bridge:
            url = f"https://{bridge.web_address}/readyz"
            with urllib.request.urlopen(url, context=authority.context(), timeout=20) as answer:
                assert answer.read() == b"ready\n"

        authority.renew()
        server.wait_for_log("files reloaded", "server.pem")
        with calotype.Client(server.address, tls=authority.tls(), api_key=alice) as client:
            assert client.generate("a secret fox", steps=2).result().width
        assert "secret" not in "".join(server.log)
        assert alice[-43:] not in "".join(server.log)
