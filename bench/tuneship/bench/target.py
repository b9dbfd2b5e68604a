"""What is measured: a URL, a key, and the names of the models behind it; found out once, before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
from openai.types import Model

from tuneship.core.endpoint import Endpoint, key_in, read_endpoint
from tuneship.core.errors import EndpointError
from tuneship.core.progress import say

_TIMEOUT_S = 30


class Target(NamedTuple):
    """A server that answers. `url` is without `/v1`; `endpoint` is known when one of our servers wrote it down."""

    url: str
    key: str
    models: tuple[str, ...]
    endpoint: Endpoint | None = None

    @property
    def api_url(self) -> str:
        """Where the OpenAI verbs are."""
        return f"{self.url}/v1"

    @property
    def model(self) -> str:
        """The models in one string, as a report names them."""
        return ",".join(self.models)

    def as_record(self) -> dict[str, Any]:
        """For a report: what answers, without the engine's flags (the testbed has them, and keys may be among them)."""
        if self.endpoint is None:
            return {"url": self.url}
        return self.endpoint.model_dump(mode="json", include={"url", "kind", "mode", "started_at", "models"})


def resolve(where: str, model: str = "", key_env: str = "") -> Target:
    """Find the server `where` and check that it has `model`.

    Args:
        where: a URL, an `endpoint.json`, or a run directory with one.
        model: a name, or several with commas between; empty takes the only adapter that is served, saying so, or the
            only model where there is no adapter.
        key_env: the environment variable that holds the key; empty takes the one that `endpoint.json` names.

    Raises:
        EndpointError: neither URL nor endpoint file, no answer, a key that is missing or refused, no such model, or
            several of which none was named.

    """
    endpoint = _read_endpoint(where)
    url = _base_url(endpoint.url if endpoint else where)
    key = key_in(key_env or (endpoint.key_env if endpoint else ""))
    # No proxy from the environment: what is measured is the server itself.
    with httpx.Client(trust_env=False, timeout=_TIMEOUT_S) as http:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none", http_client=http, max_retries=1)
        cards = _served_models(url, client)
        served = tuple(card.id for card in cards)
        wanted = tuple(name.strip() for name in model.split(",") if name.strip()) or (_only(url, cards),)
        missing = [name for name in wanted if name not in served and not _is_known(client, name)]
    if missing:
        raise EndpointError(f"{url} serves no model {missing[0]!r}", hint=f"it serves: {', '.join(served)}")
    return Target(url, key, wanted, endpoint)


def _read_endpoint(where: str) -> Endpoint | None:
    if "://" in where:
        return None
    path = Path(where)
    if path.is_dir():
        path = path / "endpoint.json"
    if path.suffix == ".json":
        return read_endpoint(path)
    raise EndpointError(
        f"{where} is neither a URL nor an endpoint.json nor a run directory", hint=f"a URL looks like http://{where}"
    )


def _base_url(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def _only(url: str, cards: Sequence[Model]) -> str:
    """What is measured when no model is named; an adapter before its base, which is not what was trained.

    SGLang's own server lists adapters by names that it then answers with the base: there they are none to choose from.
    """
    adapters = [card.id for card in cards if _parent(card) and card.owned_by != "sglang"]
    choice = adapters or [card.id for card in cards if not _parent(card)] or [card.id for card in cards]
    if len(choice) > 1:
        raise EndpointError(
            f"{url} serves {len(choice)} {'adapters' if adapters else 'models'}",
            hint=f"say which with --model: {', '.join(card.id for card in cards)}",
        )
    if adapters:
        say(f"no --model: measuring {choice[0]}, the only adapter that is served")
    return choice[0]


def _parent(card: Model) -> str:
    """The base below an adapter; vLLM and SGLang say it as our door does."""
    return str((card.model_extra or {}).get("parent") or "")


def _served_models(url: str, client: openai.OpenAI) -> tuple[Model, ...]:
    """What `/v1/models` lists, in the server's order."""
    try:
        cards = tuple(card for card in client.models.list() if card.id)
    except (openai.APIConnectionError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        reason = error.__cause__ or error
        raise EndpointError(
            f"{url} does not answer: {reason}", hint="is the server running? `tuneship serve` starts one"
        ) from None
    except openai.AuthenticationError:
        raise EndpointError(f"{url} refused the key", hint="name its variable with --key-env") from None
    except openai.APIStatusError as error:
        raise EndpointError(
            f"{url}/v1/models answered {error.status_code}", hint="the URL of an OpenAI-compatible server is needed"
        ) from None
    except (openai.OpenAIError, ValueError, AttributeError, TypeError) as error:
        raise EndpointError(f"{url}/v1/models is no list of models: {type(error).__name__}") from None
    if not cards:
        raise EndpointError(f"{url} serves no model")
    return cards


def _is_known(client: openai.OpenAI, name: str) -> bool:
    """Of a name that is not listed: our door lists an alias, and answers to each version of it (`sql@3fa9c1d20b77`)."""
    try:
        return client.models.retrieve(name).id == name
    except (openai.OpenAIError, httpx.HTTPError, ValueError, AttributeError, TypeError):
        return False
