"""What a running server is, as a file: `endpoint.json`, written by `tuneship serve` once it answers."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tuneship.core import versioned
from tuneship.core.errors import EndpointError
from tuneship.core.files import write_atomic

SCHEMA = 1
VERSION_HEADER = "x-tuneship-version"


class ServedModel(BaseModel):
    """One name that clients may send as `model`. `version` is the immutable name behind it."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    artifact_id: str
    base_id: str


class EngineInfo(BaseModel):
    """The inference engine behind the door."""

    model_config = ConfigDict(frozen=True)

    name: str = "sglang"
    version: str
    flags: list[str]


class Endpoint(BaseModel):
    """A server that can be benched with nothing but this (or just its URL, for anybody else's)."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: int = Field(default=SCHEMA, alias="schema")
    url: str
    """Without `/v1`, e.g. `http://127.0.0.1:30000`."""
    kind: Literal["engine", "door"] = "door"
    key_env: str = ""
    mode: Literal["merged", "adapters", "base"]
    pid: int
    started_at: str
    engine: EngineInfo
    models: list[ServedModel]
    extra: dict[str, Any] = {}


def write_endpoint(endpoint: Endpoint, path: Path) -> None:
    """Publish a running server."""
    write_atomic(path, endpoint.model_dump_json(indent=1, by_alias=True))


def read_endpoint(path: Path) -> Endpoint:
    """The server that `path` describes.

    Raises:
        EndpointError: no such file, or not one of ours.

    """
    try:
        text = path.read_bytes()
    except OSError:
        raise EndpointError(f"no endpoint at {path}", hint="is `tuneship serve` running?") from None
    return versioned.parse(Endpoint, text, path, SCHEMA, EndpointError)


def key_in(variable: str) -> str:
    """The API key in the environment variable `variable`; empty where none is named.

    Raises:
        EndpointError: it is not set, or empty.

    """
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise EndpointError(f"the environment variable {variable} holds no key", hint=f"export {variable}=...")
    return key


def curl(url: str, model: str, key_env: str = "") -> str:
    """The command line that asks `model` at `url` something, with the key in the variable `key_env`."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    key = f' -H "Authorization: Bearer ${key_env}"' if key_env else ""
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
