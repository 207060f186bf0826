"""Who is let in, by which key, and what the file of the keys may hold."""

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
from support.keyring import Keyring

if TYPE_CHECKING:
    from pathlib import Path

PEER = "ipv4:10.0.0.7:4711"
JOB = Job("a cat", None, 64, 64, 10, 3.0, 0, "DDIMScheduler")


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    """An empty file."""
    return Keyring(tmp_path / "keys.toml")


def test_without_a_file_everybody_is_their_host() -> None:
    """Connections of one host are one caller, whatever it sends."""
    callers = [Access().authenticate(header, f"ipv4:10.0.0.7:{port}") for header, port in ((None, 1), ("Bearer x", 2))]
    assert callers == [Caller("ipv4:10.0.0.7")] * 2
    assert callers[0].can_access("anybody's")
    assert not callers[0].can_list("anybody's")


def test_a_key_opens_and_names_its_bearer(keyring: Keyring) -> None:
    """The scheme is read in any case, as HTTP says; the address does not matter."""
    alice, root = keyring.add("alice"), keyring.add("root", role="operator")
    access = keyring.access()
    for header in (f"Bearer {alice}", f"bearer {alice}", f"BEARER  {alice} "):
        assert access.authenticate(header, PEER) == Caller("key:alice", has_key=True)
    assert access.authenticate(f"Bearer {root}", PEER).role is Role.OPERATOR


def test_whoever_has_no_good_key_is_told_nothing_else(keyring: Keyring) -> None:
    """A known id with a wrong secret, an unknown id, another scheme and garbage are answered alike."""
    alice = keyring.add("alice")
    access = keyring.access()
    answers = set()
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
        answers.add((str(caught.value), caught.value.reason, str(caught.value.metadata)))
    assert len(answers) == 1
    with pytest.raises(KeyRequired):
        access.authenticate(None, PEER)


@given(st.text(max_size=200))
@example("Bearer calotype_alice_" + "A" * 43)
def test_no_text_is_a_key_by_chance(header: str) -> None:
    """Whatever is sent, it is refused, and nothing else is raised."""
    access = Access()
    access._path = object()
    with pytest.raises(KeyInvalid):
        access.authenticate(header, PEER)


def test_an_expired_key_says_so_to_whoever_has_it(keyring: Keyring) -> None:
    """Before its time it opens; from then on it is told apart from a wrong one, but only with the right secret."""
    alice = keyring.add("alice", expires=datetime.fromtimestamp(keyring.time + 60, UTC))
    access = keyring.access()
    access.authenticate(f"Bearer {alice}", PEER)
    keyring.time += 60
    with pytest.raises(KeyExpired):
        access.authenticate(f"Bearer {alice}", PEER)
    with pytest.raises(KeyInvalid):
        access.authenticate(f"Bearer {keys.make('alice')}", PEER)


def test_users_see_their_own_and_operators_everything() -> None:
    """With keys, an id alone is not enough."""
    user, operator = Caller("key:a", has_key=True), Caller("key:b", Role.OPERATOR, has_key=True)
    assert [user.can_access("key:a"), user.can_access("key:b"), user.can_list("key:b")] == [True, False, False]
    assert operator.can_access("key:a")
    assert operator.can_list("key:a")
    operator.require(Role.OPERATOR)
    Caller("ipv4:127.0.0.1").require(Role.OPERATOR)
    with pytest.raises(RoleRequired):
        user.require(Role.OPERATOR)


def test_an_edit_counts_without_a_restart(keyring: Keyring) -> None:
    """A key that is added opens, one that is taken out does not any more."""
    alice = keyring.add("alice")
    access = keyring.access()
    watched = FileWatcher(access.files, access.reload)
    bob = keyring.add("bob")
    with pytest.raises(KeyInvalid):
        access.authenticate(f"Bearer {bob}", PEER)
    watched.check()
    access.authenticate(f"Bearer {bob}", PEER)
    records = keyring.path.read_text().split("[[key]]")
    keyring.path.write_text("[[key]]" + records[2])
    watched.check()
    access.authenticate(f"Bearer {bob}", PEER)
    with pytest.raises(KeyInvalid):
        access.authenticate(f"Bearer {alice}", PEER)


@pytest.mark.parametrize("edit", ["[[key]", "[[key]]\nid = 'x'\n", "\xff", None])
def test_a_broken_edit_leaves_the_old_keys(edit: str | None, keyring: Keyring, monkeypatch) -> None:
    """Nobody is locked out by a typing mistake, nor let in; the log says what is wrong, once."""
    log = structlog.testing.CapturingLogger()
    monkeypatch.setattr(file_watcher, "_log", log)
    alice = keyring.add("alice")
    access = keyring.access()
    watched = FileWatcher(access.files, access.reload)
    keyring.path.unlink() if edit is None else keyring.path.write_text(edit, encoding="latin-1")
    watched.check()
    watched.check()
    access.authenticate(f"Bearer {alice}", PEER)
    assert [call.method_name for call in log.calls] == ["warning"]


def test_what_was_used_up_still_counts_after_an_edit(keyring: Keyring) -> None:
    """Otherwise touching the file would fill every bucket; a limit that was changed begins anew."""
    alice = keyring.add("alice", requests_per_minute=1)
    access = keyring.access()
    access.authenticate(f"Bearer {alice}", PEER).quota.charge(JOB)
    access.reload()
    with pytest.raises(RequestsPerMinute):
        access.authenticate(f"Bearer {alice}", PEER).quota.check(JOB, 0)
    keyring.path.write_text(keyring.path.read_text().replace("requests_per_minute = 1.0", "requests_per_minute = 2.0"))
    access.reload()
    access.authenticate(f"Bearer {alice}", PEER).quota.check(JOB, 0)


def test_the_file_holds_no_key(keyring: Keyring) -> None:
    """Only its owner can read it, and whoever does learns no key from it."""
    keyring.path.unlink()
    alice = keyring.add("alice", expires=datetime(2030, 1, 1, tzinfo=UTC), requests_per_minute=1.5, concurrent=3)
    text = keyring.path.read_text()
    assert alice not in text
    assert alice[-43:] not in text
    assert stat.S_IMODE(keyring.path.stat().st_mode) == 0o600
    record = keys.read(keyring.path)["alice"]
    assert (record.expires, record.limits.requests_per_minute) == (datetime(2030, 1, 1, tzinfo=UTC), 1.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("key = 1", "nothing but tables"),
        ("[other]", "nothing but tables"),
        ("[[key]]\nid = 'a b'\nsha256 = '" + "0" * 64 + "'", "key 1: id"),
        ("[[key]]\nid = 'a'\nsha256 = 'x'", "key 1: sha256"),
        ("[[key]]\nid = 'a'\nsha256 = '" + "0" * 64 + "'\nrole = 'root'", "key 1: role"),
        ("[[key]]\nid = 'a'\nsha256 = '" + "0" * 64 + "'\nlimit = 1", "key 1: limit"),
        ("[[key]]\nid = 'a'\nsha256 = '" + "0" * 64 + "'\nexpires = 2027-01-01T00:00:00", "no time zone"),
        ("[[key]]\nid = 'a'\nsha256 = '" + "0" * 64 + "'\nconcurrent = 0", "key 1: concurrent"),
        (("[[key]]\nid = 'a'\nsha256 = '" + "0" * 64 + "'\n") * 2, "key 2: there is another"),
    ],
)
def test_a_wrong_record_is_named(text: str, said: str, tmp_path: Path) -> None:
    """The operator reads which record and which field; a hash is not repeated in the log."""
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(KeysUnusable, match=said) as caught:
        Access(path)
    assert "0" * 64 not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A server that was told to ask for keys never starts without."""
    with pytest.raises(KeysUnusable, match=r"none\.toml"):
        Access(tmp_path / "none.toml")


def test_a_websocket_carries_its_key_as_a_subprotocol(keyring: Keyring) -> None:
    """What is offered beside it does not matter; without it there is no key."""
    alice = keyring.add("alice")
    header = bearer_in_subprotocols(["calotype.v1", f"calotype.bearer.{alice}"])
    assert keyring.access().authenticate(header, PEER).id == "key:alice"
    assert bearer_in_subprotocols(["calotype.v1"]) is None
