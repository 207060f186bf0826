"""Checking API keys, and the file that contains them."""

from __future__ import annotations

import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
import structlog
from hypothesis import example, given
from hypothesis import strategies as st

from calotype_server import file_watcher
from calotype_server.auth import keys
from calotype_server.auth.access import Access, Caller, bearer_in_subprotocols
from calotype_server.auth.keys import Role
from calotype_server.errors import KeyExpired, KeyInvalid, KeyRequired, KeysUnusable, RequestsPerMinute, RoleRequired
from calotype_server.file_watcher import FileWatcher
from calotype_server.types import Job
from support.keyring import Keyring, notice_change

if TYPE_CHECKING:
    from pathlib import Path

PEER = "ipv4:10.0.0.7:4711"
JOB = Job("a cat", None, 64, 64, 10, 3.0, 0, "DDIMScheduler")


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    """A keyring with an empty file."""
    return Keyring(tmp_path / "keys.toml")


def test_without_keys_callers_are_identified_by_host() -> None:
    """All connections of one host are the same caller, with any headers."""
    callers = [Access().authenticate(header, f"ipv4:10.0.0.7:{port}") for header, port in ((None, 1), ("Bearer x", 2))]
    assert callers == [Caller("ipv4:10.0.0.7")] * 2
    assert callers[0].can_access("another caller")
    assert not callers[0].can_list("another caller")


def test_a_valid_key_identifies_its_caller(keyring: Keyring) -> None:
    """The scheme is case-insensitive, as in HTTP, and the address does not matter."""
    alice, root = keyring.add("alice"), keyring.add("root", role="operator")
    access = keyring.access()
    for header in (f"Bearer {alice}", f"bearer {alice}", f"BEARER  {alice} "):
        assert access.authenticate(header, PEER) == Caller("key:alice", has_key=True)
    assert access.authenticate(f"Bearer {root}", PEER).role is Role.OPERATOR


def test_all_invalid_keys_get_the_same_error(keyring: Keyring) -> None:
    """The error does not reveal whether the id, the secret, the scheme or the format is wrong."""
    alice = keyring.add("alice")
    access = keyring.access()
    seen = set()
    for header in (
        "",
        "Bearer",
        "Bearer ",
        alice,
        f"Basic {alice}",
        f"Bearer {alice}x",
        f"Bearer {alice[:-1]}",
        f"Bearer {alice[:-1]}{'A' if alice[-1] != 'A' else 'B'}",
        f"Bearer {alice.upper()}",
        f"Bearer {alice.replace('alice', 'bob')}",
        f"Bearer {keys.make('alice')}",
        f"Bearer {keys.digest(alice)}",
        f"Bearer {'0' * 64}",
        "Bearer \x00\xff\ud800",
    ):
        with pytest.raises(KeyInvalid) as caught:
            access.authenticate(header, PEER)
        seen.add((str(caught.value), caught.value.reason, str(caught.value.metadata)))
    assert len(seen) == 1
    with pytest.raises(KeyRequired):
        access.authenticate(None, PEER)


@given(st.text(max_size=200))
@example("Bearer calotype_alice_" + "A" * 43)
def test_no_text_is_accepted_by_chance(header: str) -> None:
    """Any text that is not a known key is rejected with KeyInvalid."""
    access = Access()
    access._path = object()  # type: ignore[assignment]
    with pytest.raises(KeyInvalid):
        access.authenticate(header, PEER)


def test_an_expired_key_is_reported_as_expired(keyring: Keyring) -> None:
    """A key works until it expires. After that the error is KeyExpired, but only for callers with the right secret."""
    alice = keyring.add("alice", expires=datetime.fromtimestamp(keyring.time + 60, UTC))
    access = keyring.access()
    access.authenticate(f"Bearer {alice}", PEER)
    keyring.time += 60
    with pytest.raises(KeyExpired):
        access.authenticate(f"Bearer {alice}", PEER)
    with pytest.raises(KeyInvalid):
        access.authenticate(f"Bearer {keys.make('alice')}", PEER)


def test_users_access_their_own_generations_and_operators_all() -> None:
    """With API keys, knowing the id of a generation is not enough to access it."""
    user, operator = Caller("key:a", has_key=True), Caller("key:b", Role.OPERATOR, has_key=True)
    assert [user.can_access("key:a"), user.can_access("key:b"), user.can_list("key:b")] == [True, False, False]
    assert operator.can_access("key:a")
    assert operator.can_list("key:a")
    operator.require(Role.OPERATOR)
    Caller("ipv4:127.0.0.1").require(Role.OPERATOR)
    with pytest.raises(RoleRequired):
        user.require(Role.OPERATOR)


def test_an_edited_key_file_takes_effect_without_a_restart(keyring: Keyring) -> None:
    """An added key is accepted, and a removed key is rejected."""
    alice = keyring.add("alice")
    access = keyring.access()
    watcher = FileWatcher(access.files, access.reload)
    bob = keyring.add("bob")
    with pytest.raises(KeyInvalid):
        access.authenticate(f"Bearer {bob}", PEER)
    notice_change(watcher)
    access.authenticate(f"Bearer {bob}", PEER)
    records = keyring.path.read_text().split("[[key]]")
    keyring.path.write_text("[[key]]" + records[2])
    notice_change(watcher)
    access.authenticate(f"Bearer {bob}", PEER)
    with pytest.raises(KeyInvalid):
        access.authenticate(f"Bearer {alice}", PEER)


@pytest.mark.parametrize("edit", ["[[key]", "[[key]]\nid = 'x'\n", "\xff", "", "\n# none\n", None])
def test_an_invalid_key_file_keeps_the_old_keys(edit: str | None, keyring: Keyring, monkeypatch) -> None:
    """A mistake in the file locks no caller out and lets none in, and is logged once."""
    log = structlog.testing.CapturingLogger()
    monkeypatch.setattr(file_watcher, "_log", log)
    alice = keyring.add("alice")
    access = keyring.access()
    watcher = FileWatcher(access.files, access.reload)
    keyring.path.unlink() if edit is None else keyring.path.write_text(edit, encoding="latin-1")
    notice_change(watcher)
    notice_change(watcher)
    access.authenticate(f"Bearer {alice}", PEER)
    assert [call.method_name for call in log.calls] == ["warning"]


def test_usage_survives_a_reload_unless_the_limits_change(keyring: Keyring) -> None:
    """Touching the file does not reset the usage of a key; changing its limits does."""
    alice = keyring.add("alice", requests_per_minute=1)
    access = keyring.access()
    access.authenticate(f"Bearer {alice}", PEER).quota.charge([JOB])
    access.reload()
    with pytest.raises(RequestsPerMinute):
        access.authenticate(f"Bearer {alice}", PEER).quota.check([JOB], 0)
    keyring.path.write_text(keyring.path.read_text().replace("requests_per_minute = 1.0", "requests_per_minute = 2.0"))
    access.reload()
    access.authenticate(f"Bearer {alice}", PEER).quota.check([JOB], 0)


def test_the_file_contains_no_secrets(keyring: Keyring) -> None:
    """Only its owner can read the file, and it contains only hashes of the keys."""
    keyring.path.unlink()
    alice = keyring.add("alice", expires=datetime(2030, 1, 1, tzinfo=UTC), requests_per_minute=1.5, concurrent=3)
    text = keyring.path.read_text()
    assert alice not in text
    assert alice[-43:] not in text
    assert stat.S_IMODE(keyring.path.stat().st_mode) == 0o600
    record = keys.read(keyring.path)["alice"]
    assert (record.expires, record.limits.requests_per_minute) == (datetime(2030, 1, 1, tzinfo=UTC), 1.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key = 1", "only tables"),
        ("[other]", "only tables"),
        ("[[key]]\nid = 'a b'\nsha256 = '" + "0" * 64 + "'", "key 1: id"),
        ("[[key]]\nid = 'a'\nsha256 = 'x'", "key 1: sha256"),
        ("[[key]]\nid = 'a'\nsha256 = '" + "0" * 64 + "'\nrole = 'root'", "key 1: role"),
        ("[[key]]\nid = 'a'\nsha256 = '" + "0" * 64 + "'\nlimit = 1", "key 1: limit"),
        ("[[key]]\nid = 'a'\nsha256 = '" + "0" * 64 + "'\nexpires = 2027-01-01T00:00:00", "no time zone"),
        ("[[key]]\nid = 'a'\nsha256 = '" + "0" * 64 + "'\nconcurrent = 0", "key 1: concurrent"),
        (("[[key]]\nid = 'a'\nsha256 = '" + "0" * 64 + "'\n") * 2, "key 2: an earlier key"),
    ],
)
def test_an_invalid_record_is_named(text: str, message: str, tmp_path: Path) -> None:
    """The message names the record and the field, and never contains a hash."""
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(KeysUnusable, match=message) as caught:
        Access(path)
    assert "0" * 64 not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A server configured with API keys does not start without the file."""
    with pytest.raises(KeysUnusable, match=r"none\.toml"):
        Access(tmp_path / "none.toml")


def test_a_websocket_carries_its_key_as_a_subprotocol(keyring: Keyring) -> None:
    """Other offered subprotocols do not matter."""
    alice = keyring.add("alice")
    header = bearer_in_subprotocols(["calotype.v1", f"calotype.bearer.{alice}"])
    assert keyring.access().authenticate(header, PEER).id == "key:alice"
    assert bearer_in_subprotocols(["calotype.v1"]) is None
