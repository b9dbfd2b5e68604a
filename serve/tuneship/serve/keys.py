"""API keys: who may come in, and which models each of them may use.

    secret = keys.add(cache.keys_file(), "ci", models=["sql"])   # shown once, stored nowhere
    ring = Keyring(cache.keys_file())
    ring.authenticate(b"Bearer ts-...")                            # the key, or a Refusal (401)

A file holds the SHA-256 of each key. A slow hash (bcrypt, argon2) protects passwords, which are guessed from a list; a
key here is 256 random bits, which nobody guesses however fast the hash is, and every request would pay for a slow one.

The door asks for a key as soon as there is one, or there is a file for them. A running server reads the file again when
it changes: a revoked key is refused within `_LOOK_S`, a request in flight is finished.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tomli_w
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import Scope

from tuneship.core.errors import PreflightError
from tuneship.core.files import write_atomic
from tuneship.core.progress import say
from tuneship.serve.refusals import Refusal
from tuneship.serve.running import ADMIN_KEY_VARIABLE

PREFIX = "ts-"
SCOPE_KEY = "tuneship.key"
"""Where an ASGI scope says who asks (`guard.Guard` puts it there); not there, or None: no key is needed."""
API_KEY_VARIABLE = "TUNESHIP_API_KEY"
_MIN_LENGTH = 16
"""Of a key that a person chose, in the environment."""
_LOOK_S = 1.0
_SCHEME = b"bearer "
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_MODEL = re.compile(r"[A-Za-z0-9._/-]+")
_WRITABLE_BY_OTHERS = 0o022


class Key(NamedTuple):
    """One key. `models` are the aliases (or the base's name) that it may use; None: all of them."""

    name: str
    sha256: bytes
    models: frozenset[str] | None
    admin: bool

    def may_use(self, model: str) -> bool:
        """Whether it may use the model called `model`; a version `alias@id12` counts as its alias."""
        return self.models is None or model.partition("@")[0] in self.models


class KeyRecord(BaseModel):
    """A key as the file knows it. No `models`: all of them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: str
    models: list[Annotated[str, Field(pattern=rf"^{_MODEL.pattern}$")]] | None = None
    admin: bool = False


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    keys: dict[str, KeyRecord] = {}


class Keyring:
    """The keys that open one server: those of `path`, followed as it changes, and those of the environment."""

    def __init__(self, path: Path, environ: Mapping[str, str] = os.environ) -> None:
        """Read them.

        Raises:
            PreflightError: the file cannot be read or is broken, or a key of the environment is too short.

        """
        self._path = path
        self._given = _of_environment(environ)
        self._seen = _signature(path)
        self._stored = _stored(path)
        self._look_at = time.monotonic() + _LOOK_S
        self._was_file = self._seen is not None

    @property
    def keys(self) -> tuple[Key, ...]:
        """All that are valid now."""
        self._follow()
        return self._given + self._stored

    @property
    def asks(self) -> bool:
        """Whether a key is needed. An empty file asks for one too: the last key was revoked, not the door opened."""
        return bool(self.keys) or self._was_file

    def authenticate(self, authorization: bytes) -> Key | None:
        """Whose `Authorization` header that is; None where no key is needed.

        Raises:
            Refusal: 401, there is no such key.

        """
        keys = self.keys
        if not (keys or self._was_file):
            return None
        scheme, secret = authorization[: len(_SCHEME)], authorization[len(_SCHEME) :].strip()
        if scheme.lower() != _SCHEME or not secret:
            raise _unauthorized("missing_api_key", "An API key is needed: 'Authorization: Bearer KEY'.")
        found = _find(keys, secret)
        if found is None:
            raise _unauthorized("invalid_api_key", "This API key is not valid.")
        return found

    def admin(self, secret: str) -> str | None:
        """The name of the admin key that `secret` is; None if it is none. Admin verbs are never open to all."""
        found = _find(self.keys, secret.encode(errors="surrogateescape"))
        return found.name if found and found.admin else None

    def _follow(self) -> None:
        """Read the file again if it is another one than it was; a broken one leaves the keys as they are."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        signature = _signature(self._path)
        if signature == self._seen:
            return
        self._seen = signature
        if signature is None:
            say(f"warning: the keys file {self._path} is gone; the keys that it had stay valid until this server ends")
            return
        try:
            self._stored = _stored(self._path)
        except PreflightError as error:
            say(f"warning: {error.message}; the keys stay as they were")
            return
        self._was_file = True
        say(f"read the keys again: {', '.join(key.name for key in self._stored) or 'none is left'}")


def permit(scope: Scope, model: object) -> None:
    """Let a request for `model` pass if its key may use it.

    Raises:
        Refusal: 403, whether or not there is such a model: a key does not learn what else is served.

    """
    if isinstance(model, str) and not permits(scope, model):
        message = "This API key may not use this model."
        raise Refusal(403, "model_not_allowed", message, param="model")


def permits(scope: Scope, model: str) -> bool:
    """Whether the key that the request came with may use `model`."""
    key: Key | None = scope.get(SCOPE_KEY)
    return key is None or key.may_use(model)


def read(path: Path) -> dict[str, KeyRecord]:
    """The file's keys by name; none if there is no file.

    Raises:
        PreflightError: it cannot be read, is no keys file, or others may write to it.

    """
    hint = f"mend it, or move {path} away and add the keys again"
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise PreflightError(f"the keys file {path} cannot be read: {error}", hint=hint) from None
    if mode & _WRITABLE_BY_OTHERS:
        raise PreflightError(f"others may write to the keys file {path}", hint=f"chmod 600 {path}")
    try:
        return _File.model_validate(tomllib.loads(text)).keys
    except tomllib.TOMLDecodeError as error:
        raise PreflightError(f"the keys file {path} is not TOML: {error}", hint=hint) from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise PreflightError(f"the keys file {path} is broken at {where}: {first['msg']}", hint=hint) from None


def add(path: Path, name: str, models: Sequence[str] | None = None, *, admin: bool = False) -> str:
    """Make a key called `name` for `models` (None: all) and return it: it can never be read again.

    Raises:
        PreflightError: the name is taken or no name, a model is no alias, or the file cannot be used.

    """
    if not _NAME.fullmatch(name):
        raise PreflightError(f"{name!r} cannot be the name of a key", hint="letters, digits, '.', '_' and '-'")
    for model in models or ():
        if not _MODEL.fullmatch(model):
            raise PreflightError(
                f"{model!r} is not the name of a model", hint="an alias, without @version, or the base's"
            )
    secret = _new_secret()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    record = KeyRecord(
        sha256=_sha256(secret).hex(), created=created, models=None if models is None else list(models), admin=admin
    )
    with _changed(path) as keys:
        if name in keys:
            raise PreflightError(
                f"there is a key called {name!r}", hint=f"tuneship keys revoke {name}, or another name"
            )
        keys[name] = record
    return secret


def revoke(path: Path, name: str) -> dict[str, KeyRecord]:
    """Take the key called `name` out of the file; those that are left.

    Raises:
        PreflightError: there is none, or the file cannot be used.

    """
    with _changed(path) as keys:
        if name not in keys:
            raise PreflightError(f"there is no key called {name!r} in {path}", hint="tuneship keys list")
        del keys[name]
    return keys


@contextmanager
def _changed(path: Path) -> Iterator[dict[str, KeyRecord]]:
    """The file's keys, to be changed; written when the block ends well, one change at a time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(f"{path}.lock", mode=0o600):
            keys = read(path)
            yield keys
            records = {name: record.model_dump(exclude_none=True) for name, record in keys.items()}
            write_atomic(path, tomli_w.dumps({"schema": 1, "keys": records}), mode=0o600)
    except OSError as error:
        raise PreflightError(
            f"the keys file {path} cannot be written: {error}", hint="choose another with --file"
        ) from None


def _find(keys: Sequence[Key], secret: bytes) -> Key | None:
    digest, found = hashlib.sha256(secret).digest(), None
    # All of them, always: how long it takes says nothing about which one it was.
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


def _stored(path: Path) -> tuple[Key, ...]:
    return tuple(
        Key(
            name,
            bytes.fromhex(record.sha256),
            None if record.models is None else frozenset(record.models),
            record.admin,
        )
        for name, record in read(path).items()
    )


def _of_environment(environ: Mapping[str, str]) -> tuple[Key, ...]:
    found = []
    for variable, admin in ((API_KEY_VARIABLE, False), (ADMIN_KEY_VARIABLE, True)):
        secret = environ.get(variable, "").strip()
        if not secret:
            continue
        if len(secret) < _MIN_LENGTH or not secret.isascii():
            raise PreflightError(
                f"{variable} is not a key: {_MIN_LENGTH} ASCII characters at least",
                hint="python -c 'import secrets; print(secrets.token_urlsafe())'",
            )
        found.append(Key(variable, _sha256(secret), None, admin))
    return tuple(found)


def _signature(path: Path) -> tuple[int, int, int, int] | None:
    """Another one whenever the file is another one, None while there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode


def _new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def _sha256(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _unauthorized(code: str, message: str) -> Refusal:
    return Refusal(401, code, message, headers={"WWW-Authenticate": 'Bearer realm="tuneship"'})
