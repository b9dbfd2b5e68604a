"""The admin side of a server: a port of its own on loopback, one key, and the verbs that change what answers.

    GET  /admin/status                       engine, slots, versions, figures (what `tuneship top` shows)
    GET  /admin/adapters                     versions and their states
    POST /admin/adapters                     {"path", "alias"?, "weight"?, "pinned"?}
    POST /admin/adapters/{name}/promote      name: an alias, or alias@id
    POST /admin/adapters/{name}/weight       {"weight": 0.05}
    POST /admin/adapters/{alias}/rollback
    POST /admin/adapters/{name}/unload       {"timeout_s"?}
    GET  /admin/history?alias=&limit=

Paths are those of the server's machine. Errors are tuneship's own, so that the command line prints them as if they had
happened there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneship.core.errors import EngineError, TuneshipError
from tuneship.core.progress import say
from tuneship.serve.assembly import Parts, describe
from tuneship.serve.deploy import DRAIN_S, Deployer, refuse_adapters
from tuneship.serve.registry import Version

_LONGEST_BODY = 1 << 20
_LONGEST_HISTORY = 10_000
Body = TypeVar("Body", bound=BaseModel)
IsAdmin = Callable[[str], str | None]
"""(bearer token) -> who that is, None for nobody."""


class _Load(BaseModel):
    model_config = ConfigDict(extra="forbid")

    path: str
    alias: str = ""
    weight: Annotated[float, Field(ge=0, le=1)] | None = None
    pinned: bool = False


class _Weight(BaseModel):
    model_config = ConfigDict(extra="forbid")

    weight: Annotated[float, Field(ge=0, le=1)]


class _Unload(BaseModel):
    model_config = ConfigDict(extra="forbid")

    timeout_s: Annotated[float, Field(gt=0, le=3600)] = DRAIN_S


def build_admin(parts: Parts, is_admin: IsAdmin, mode: str) -> Starlette:
    """The admin application of the server made of `parts`."""
    verbs = _Verbs(parts, mode)

    def route(path: str, answer: Callable[[Request, str], Awaitable[Any]], method: str = "POST") -> Route:
        async def handler(request: Request) -> Response:
            return JSONResponse(await answer(request, _actor(request, is_admin)))

        return Route(path, handler, methods=[method])

    return Starlette(
        routes=[
            route("/admin/status", verbs.status, "GET"),
            route("/admin/adapters", verbs.listed, "GET"),
            route("/admin/history", verbs.history, "GET"),
            route("/admin/adapters", verbs.load),
            route("/admin/adapters/{name}/promote", verbs.promote),
            route("/admin/adapters/{name}/weight", verbs.weigh),
            route("/admin/adapters/{name}/rollback", verbs.rollback),
            route("/admin/adapters/{name}/unload", verbs.unload),
        ],
        exception_handlers={TuneshipError: _failed, HTTPException: _not_routed, Exception: _our_fault},
    )


class _Verbs:
    """What can be asked; each gets the request and who asks, and returns JSON."""

    def __init__(self, parts: Parts, mode: str) -> None:
        self._parts = parts
        self._mode = mode

    async def status(self, _: Request, __: str) -> Any:
        return self._parts.status()

    async def listed(self, _: Request, __: str) -> Any:
        return self._parts.status()["versions"]

    async def history(self, request: Request, _: str) -> Any:
        alias, limit = request.query_params.get("alias") or None, request.query_params.get("limit", "100")
        if not (limit.isdecimal() and len(limit) < 10 and 0 < int(limit) <= _LONGEST_HISTORY):
            raise HTTPException(400, f"limit must be between 1 and {_LONGEST_HISTORY}")
        registry = self._parts.registry
        return [event._asdict() for event in registry.history(alias, int(limit))] if registry else []

    async def load(self, request: Request, actor: str) -> Any:
        asked = await _read(request, _Load)
        path, remarks = Path(asked.path), list[str]()
        load = partial(self._deployer.load, path, actor=actor, remark=remarks.append)
        try:
            loaded = await load(alias=asked.alias, weight=asked.weight, pinned=asked.pinned)
        except TuneshipError as error:
            say(_one_line(f"warning: {path} was not loaded: {error.message}{f' ({error.hint})' if error.hint else ''}"))
            raise
        return self._described(loaded) | {"remarks": remarks}

    async def promote(self, request: Request, actor: str) -> Any:
        return self._described(self._deployer.promote(_name(request), actor=actor))

    async def weigh(self, request: Request, actor: str) -> Any:
        asked = await _read(request, _Weight)
        return self._described(self._deployer.weigh(_name(request), asked.weight, actor=actor))

    async def rollback(self, request: Request, actor: str) -> Any:
        return self._described(self._deployer.rollback(_name(request), actor=actor))

    async def unload(self, request: Request, actor: str) -> Any:
        asked = await _read(request, _Unload)
        gone = await self._deployer.unload(_name(request), timeout_s=asked.timeout_s, actor=actor)
        return [self._described(version) for version in gone]

    @property
    def _deployer(self) -> Deployer:
        if self._parts.deployer is None:
            raise refuse_adapters(self._mode)
        return self._parts.deployer

    def _described(self, version: Version) -> dict[str, Any]:
        return describe(version, self._parts.routes)


def _one_line(text: str) -> str:
    """For the server's log, whatever a file's name or settings hold."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _name(request: Request) -> str:
    return str(request.path_params["name"])


def _actor(request: Request, is_admin: IsAdmin) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    actor = is_admin(token.strip()) if scheme.lower() == "bearer" else None
    if actor is None:
        raise HTTPException(401, "the admin key is missing or wrong", {"WWW-Authenticate": "Bearer"})
    return actor


async def _read(request: Request, body: type[Body]) -> Body:
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > _LONGEST_BODY:
            raise HTTPException(413, "the body is too large")
    try:
        return body.model_validate_json(bytes(raw) or b"{}")
    except ValidationError as error:
        first = error.errors()[0]
        raise HTTPException(400, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None


async def _failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, TuneshipError)
    status = 503 if isinstance(error, EngineError) else 409
    said = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
    return JSONResponse({"error": said}, status_code=status)


async def _not_routed(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {"type": "EndpointError", "message": str(error.detail), "hint": ""}
    return JSONResponse({"error": said}, status_code=error.status_code, headers=error.headers)


async def _our_fault(_: Request, __: Exception) -> Response:
    said = {"type": "EndpointError", "message": "the server failed on this", "hint": "its output tells more"}
    return JSONResponse({"error": said}, status_code=500)
