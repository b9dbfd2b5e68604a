"""`ask`: one request of a verb to a running server's admin side, and what went wrong there as its own kind."""

from __future__ import annotations

from typing import Any

import httpx

from tuneship.core.errors import EndpointError, by_name
from tuneship.serve.running import ADMIN_KEY_VARIABLE, Running

_SLOWEST_S = 4000.0
"""Beyond what a server takes for any verb: it gives up by itself, and says why."""


def ask(
    server: Running, method: str, path: str, body: dict[str, Any] | None = None, patience_s: float = _SLOWEST_S
) -> Any:
    """The JSON that `server` answers.

    Raises:
        TuneshipError: what the server says went wrong, as its own kind; EndpointError if it says nothing, or refuses
            the key.

    """
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    try:
        answer = httpx.request(
            method, f"{server.admin_url}{path}", json=body, headers=headers, timeout=patience_s, trust_env=False
        )
        if answer.status_code == 401:
            raise EndpointError(
                f"{server.admin_url} refuses this admin key", hint=f"set {ADMIN_KEY_VARIABLE} to the server's"
            )
        said = answer.json()
        failure = None if answer.status_code == 200 else said["error"]
        failed = by_name(failure["type"])(failure["message"], hint=failure["hint"]) if failure else None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise silent(server, str(error) or "no answer") from None
    if failed:
        raise failed
    return said


def silent(server: Running, why: str) -> EndpointError:
    """The error of a server that does not answer as one of ours."""
    return EndpointError(
        f"{server.admin_url} does not answer as a server's admin side: {why}",
        hint="is it still running, and is this its admin address?",
    )
