"""What a client asks for: the request's body, read and checked, and the body that the engine gets instead.

A client chooses a model by `model`, and by nothing else. SGLang would also take the adapter from `lora_path` and from
`model="anything:adapter"`. And it keeps attention caches apart by `extra_key + lora_id`, where ids are a hash of the
adapter's name and path: a base request with the right `extra_key` would read an adapter's cache. So those keys are
refused, not dropped: a client that sends one believes that it does something.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from starlette.requests import Request

from tuneship.serve import bodies, bounds
from tuneship.serve.catalog import Entry
from tuneship.serve.keys import permit
from tuneship.serve.refusals import Refusal, unknown_model
from tuneship.serve.routes import LEASE, Lease, Routes

ENGINE_ONLY = frozenset(
    {
        # which adapter, and whose cached attention
        *("lora_path", "lora_id", "extra_key", "cache_salt", "session_id", "session_params"),
        # whose request
        "rid",
        # which worker
        *("bootstrap_host", "bootstrap_port", "bootstrap_room"),
        *("routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank"),
        # code of the client's own
        *("custom_logit_processor", "custom_params"),
    }
)


class Call(NamedTuple):
    """A request that may go to the engine."""

    entry: Entry
    body: bytes


async def read_call(request: Request, routes: Routes, *, streams: bool = True) -> Call:
    """Read the request's body and address it to the model that it names; `streams`: the answer may be a stream.

    Raises:
        Refusal: as `read_asked`, or 400 for a key of the engine's own, or a stream where there is none.

    """
    entry, asked = await read_asked(request, routes)
    if asked.get("stream") and not streams:  # SGLang answers 500
        message = "'stream' is not accepted here: the answer comes at once."
        raise Refusal(400, "unsupported_parameter", message, param="stream", version=entry.version)
    return Call(entry, address(asked, entry))


async def read_asked(request: Request, routes: Routes) -> tuple[Entry, dict[str, Any]]:
    """The model that the request names, which is its own until the answer is over, and the whole body.

    Raises:
        Refusal: 413 too large, 408 too slow, 400 not a JSON object or one that would harm others, 403 not for this key,
            404 no such model.

    """
    asked = await bodies.read(request)
    entry = lease(request, routes, asked.get("model")).entry
    try:
        bounds.check(asked, bounds.facts(routes.base.path))
    except Refusal as refusal:
        refusal.version = entry.version
        raise
    return entry, asked


def lease(request: Request, routes: Routes, name: object) -> Lease:
    """Take the version that `name` means now, for as long as the request lasts (`observe.py` gives it back).

    Raises:
        Refusal: 403 not for this key, 404 no such model.

    """
    permit(request.scope, name)
    taken = routes.lease(name) if isinstance(name, str) else None
    if taken is None:
        raise unknown_model(name)
    request.scope[LEASE] = taken
    return taken


def address(asked: dict[str, Any], entry: Entry) -> bytes:
    """Write the engine's body: the same, with the adapter named in the one place that decides.

    Raises:
        Refusal: 400, a key of the engine's own.

    """
    for key in sorted(ENGINE_ONLY & asked.keys()):
        message = f"{key!r} is not accepted here: a model is chosen by 'model' alone."
        raise Refusal(400, "unsupported_parameter", message, param=key, version=entry.version)
    # Public names hold no colon, so `model` selects nothing in SGLang and is only repeated in its answer.
    sent = {**asked, "lora_path": entry.selector} if entry.selector else asked
    return json.dumps(sent).encode()
