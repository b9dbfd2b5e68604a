"""Who may come in: keys are stored as hashes, written whole, followed while a server runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.core.errors import PreflightError
from tuneship.serve import keys, keys_commands
from tuneship.serve.keys import SCOPE_KEY, Key, Keyring, permit
from tuneship.serve.refusals import Refusal

CHOSEN = "chosen-by-a-person-0123"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "settings" / "keys.toml"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keyring looks at its file every time."""
    monkeypatch.setattr(keys, "_LOOK_S", 0.0)


def ring(path: Path, **environ: str) -> Keyring:
    return Keyring(path, environ)


def bearer(secret: str) -> bytes:
    return f"Bearer {secret}".encode()


def refused(ring: Keyring, header: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        ring.authenticate(header)
    assert caught.value.status == 401
    assert caught.value.headers["WWW-Authenticate"].startswith("Bearer")
    return caught.value


def test_a_key_opens_the_door_and_its_file_does_not_hold_it(path):
    secret = keys.add(path, "ci", ["sql"])
    assert re.fullmatch(r"ts-[A-Za-z0-9_-]{43}", secret)  # 256 bits
    assert secret not in path.read_text()
    assert secret.removeprefix("ts-") not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    found = ring(path).authenticate(bearer(secret))
    assert found
    assert (found.name, found.models, found.admin) == ("ci", {"sql"}, False)
    assert ring(path).authenticate(b"bEARER  " + secret.encode()) == found


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (b"", "missing_api_key"),
        (b"Bearer", "missing_api_key"),
        (b"Bearer  ", "missing_api_key"),
        (b"Basic dXNlcjpwYXNz", "missing_api_key"),
        (b"Bearer ts-nobody", "invalid_api_key"),
        (b"Bearer \xff\xfe", "invalid_api_key"),
        (b"Bearer " + b"x" * 100_000, "invalid_api_key"),
    ],
)
def test_other_keys_do_not(path, header, code):
    secret = keys.add(path, "ci")
    refusal = refused(ring(path), header)
    assert refusal.code == code
    assert "nobody" not in str(refusal), "what was sent is not repeated"
    assert refused(ring(path), bearer(secret[:-1])).code == "invalid_api_key"
    assert refused(ring(path), bearer(next(iter(keys.read(path).values())).sha256)).code == "invalid_api_key"


def test_every_key_is_compared(path, monkeypatch):
    secrets = [keys.add(path, f"key-{n}") for n in range(5)]
    held = ring(path)
    compared: list[bytes] = []
    real = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    for secret in (secrets[0], secrets[4], "ts-nobody"):
        compared.clear()
        if secret in secrets:
            assert held.authenticate(bearer(secret))
        else:
            refused(held, bearer(secret))
        assert len(compared) == 5


def test_without_any_key_none_is_needed(path):
    assert not ring(path).asks
    assert ring(path).authenticate(b"") is None
    assert ring(path).authenticate(b"Bearer whatever") is None


def test_keys_of_the_environment(path):
    held = ring(path, TUNESHIP_API_KEY=CHOSEN, TUNESHIP_ADMIN_KEY=f"{CHOSEN}-admin")
    assert held.asks
    user, admin = held.authenticate(bearer(CHOSEN)), held.authenticate(bearer(f"{CHOSEN}-admin"))
    assert user
    assert admin
    assert (user.models, user.admin) == (None, False)
    assert (admin.models, admin.admin) == (None, True)
    refused(held, bearer("other"))
    assert not ring(path, TUNESHIP_API_KEY="").asks


@pytest.mark.parametrize("chosen", ["short", "é" * 20])
def test_a_key_that_can_be_guessed_or_not_be_sent(path, chosen):
    with pytest.raises(PreflightError, match="TUNESHIP_API_KEY") as caught:
        ring(path, TUNESHIP_API_KEY=chosen)
    assert caught.value.hint
    assert chosen not in caught.value.message


def test_only_an_admin_key_is_an_admins(path):
    assert ring(path).admin("") is None, "an open door is not an open admin side"
    user, admin = keys.add(path, "ci"), keys.add(path, "ops", admin=True)
    held = ring(path)
    assert held.admin(admin) == "ops"
    assert [held.admin(secret) for secret in (user, "", "ts-nobody", "\udc80")] == [None] * 4


def test_a_revoked_key_is_refused_without_a_restart(path, at_once):
    first, second = keys.add(path, "a"), keys.add(path, "b")
    held = ring(path)
    assert held.authenticate(bearer(first))
    assert list(keys.revoke(path, "a")) == ["b"]
    assert refused(held, bearer(first)).code == "invalid_api_key"
    assert held.authenticate(bearer(second))
    third = keys.add(path, "c")
    assert held.authenticate(bearer(third))


def test_the_last_key_revoked_does_not_open_the_door(path, at_once):
    keys.add(path, "a")
    held = ring(path)
    keys.revoke(path, "a")
    assert held.asks
    refused(held, b"")
    assert ring(path).asks, "after a restart neither"


def test_the_first_key_closes_an_open_door(path, at_once):
    held = ring(path)
    assert not held.asks
    secret = keys.add(path, "a")
    refused(held, b"")
    assert held.authenticate(bearer(secret))


@pytest.mark.parametrize("text", ["keys = [", "[keys.a]\nsha256 = 'xyz'\ncreated = ''\n", "schema = 2\n", "\xff"])
def test_a_broken_file_keeps_the_keys_and_says_so(path, at_once, capsys, text):
    secret = keys.add(path, "a")
    held = ring(path)
    path.write_bytes(text.encode("latin-1"))
    for _ in range(3):
        assert held.authenticate(bearer(secret))
    said = capsys.readouterr().err
    assert said.count("warning:") == 1, "once for one state of the file"
    assert "keys stay as they were" in said
    with pytest.raises(PreflightError) as caught:
        ring(path)
    assert caught.value.hint


def test_a_deleted_file_does_not_open_the_door(path, at_once, capsys):
    secret = keys.add(path, "a")
    held = ring(path)
    path.unlink()
    assert held.authenticate(bearer(secret))
    refused(held, b"")
    assert "is gone" in capsys.readouterr().err


def test_a_file_that_others_may_write_to_is_refused(path):
    keys.add(path, "a")
    path.chmod(0o620)
    with pytest.raises(PreflightError, match="others may write"):
        ring(path)


@pytest.mark.parametrize(
    ("name", "models", "said"),
    [
        ("", None, "cannot be the name"),
        ("a b", None, "cannot be the name"),
        ("a", ["sql@3fa9c1d20b77"], "is not the name of a model"),
        ("a", [""], "is not the name of a model"),
        ("taken", None, "there is a key called"),
    ],
)
def test_keys_that_cannot_be_made(path, name, models, said):
    keys.add(path, "taken")
    before = path.read_bytes()
    with pytest.raises(PreflightError, match=said) as caught:
        keys.add(path, name, models)
    assert caught.value.hint
    assert path.read_bytes() == before


def test_adding_at_once_loses_none(path):
    threads = [threading.Thread(target=keys.add, args=(path, f"key-{n}")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(keys.read(path)) == sorted(f"key-{n}" for n in range(8))


names = st.from_regex(r"[a-z][a-z0-9._/-]{0,8}", fullmatch=True)


@given(allowed=st.none() | st.frozensets(names, max_size=4), asked=names, version=st.booleans())
def test_a_model_that_a_key_may_not_use_is_refused(allowed, asked, version):
    model = f"{asked}@3fa9c1d20b77" if version else asked
    scope = {SCOPE_KEY: Key("k", b"", allowed, admin=False)}
    if allowed is None or asked in allowed:
        permit(scope, model)
        return
    with pytest.raises(Refusal) as caught:
        permit(scope, model)
    assert (caught.value.status, caught.value.code) == (403, "model_not_allowed")


def test_who_needs_no_key_may_use_all():
    permit({}, "sql")
    permit({SCOPE_KEY: None}, "sql")


def test_the_verbs(path, capsys):
    keys_commands.add("ci", models="sql, invoice", admin=True, file=path)
    printed = capsys.readouterr()
    secret = printed.out.strip()
    assert secret not in printed.err
    assert secret.startswith("ts-")
    found = ring(path).authenticate(bearer(secret))
    assert found
    assert (found.models, found.admin) == ({"sql", "invoice"}, True)
    keys_commands.list_(file=path)
    listed = capsys.readouterr().out
    assert "ci" in listed
    assert "sql, invoice" in listed
    assert secret not in listed
    assert found.sha256.hex() not in listed
    keys_commands.revoke("ci", file=path)
    assert "nobody gets in" in capsys.readouterr().err
    with pytest.raises(PreflightError, match="no key called"):
        keys_commands.revoke("ci", file=path)


def test_the_verb_prints_the_key_and_nothing_else(path):
    environ = {**os.environ, "TUNESHIP_KEYS": str(path)}
    argv = [sys.executable, "-m", "tuneship", "keys", "add", "ci"]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"ts-[A-Za-z0-9_-]{43}\n", done.stdout)
    assert str(path) in done.stderr
    again = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "hint:" in again.stderr
    assert "Traceback" not in again.stderr
