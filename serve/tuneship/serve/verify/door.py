"""A `Scorer` over a server's URL: what clients reach is what is verified."""

from __future__ import annotations

from typing import Any, NamedTuple, Self
from urllib.parse import quote

import aiohttp

from tuneship.core.endpoint import VERSION_HEADER
from tuneship.core.errors import EndpointError
from tuneship.serve.verify.scorer import Message, ServerFault, Tool, batches, prompt_ids

_TIMEOUT_S = 600
_LONGEST_WORDS = 300


class Served(NamedTuple):
    """The public names of a server: the model that it was started with, and its adapters."""

    base: str
    adapters: tuple[str, ...]


class DoorScorer:
    """Selectors are public names; None is `base`, which is found out by `connect`."""

    def __init__(self, url: str, key: str = "") -> None:
        self.base = ""
        self.listed: dict[str, str] = {}
        """Which version each name has, by `served`."""
        self.versions: dict[str, str] = {}
        """{name: the version that answered to it}."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers=self._headers, timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S), trust_env=False
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def served(self) -> Served:
        """What it serves; from then on `base` is known, and which version each name has.

        Raises:
            EndpointError: no answer, a refused key, or not a server of ours.

        """
        try:
            cards = (await self._ask("GET", "/v1/models", None))["data"]
            models = [card["id"] for card in cards if card.get("parent") is None]
            if not models:
                raise EndpointError(
                    f"{self.url} shows no base: the floor is measured on it", hint="use a key that may ask every model"
                )
            self.base = models[0]
            self.listed = {card["id"]: str(card.get("version", "")) for card in cards}
            return Served(self.base, tuple(card["id"] for card in cards if card["id"] != self.base))
        except (ServerFault, LookupError, TypeError, AttributeError) as error:
            raise EndpointError(f"{self.url} does not say what it serves: {error}") from None

    async def knows(self, name: str) -> bool:
        """Whether it answers to `name`: it does to each version that is loaded, of which it lists the live ones.

        Raises:
            EndpointError: no answer, or one that is neither yes nor no: a refused key, a server that is closing.

        """
        path = f"/v1/models/{quote(name, safe='@')}"
        try:
            async with self._session.get(f"{self.url}{path}") as response:
                if response.status in {200, 404}:
                    return response.status == 200
                said = (await response.text())[:_LONGEST_WORDS]
        except (aiohttp.ClientError, OSError) as error:
            raise self._silent(error) from None
        raise self._refused(path, response.status, said)

    async def logprobs(self, selector: str | None, rows: list[list[int]], starts: list[int]) -> list[list[float]]:
        """As `Scorer`.

        Raises:
            EndpointError: the server refused, failed, or has no scoring verb.

        """
        model = selector or self.base
        found: list[list[float]] = []
        try:
            for batch in batches(rows):
                body = {"model": model, "input_ids": rows[batch], "start": starts[batch]}
                answer = await self._post("/v1/logprobs", body)
                found += [row["token_logprobs"] for row in answer["data"]]
        except (ServerFault, LookupError, TypeError) as error:
            raise EndpointError(f"{self.url} does not score: {error}") from None
        return found

    async def tokenize(self, messages: list[Message], tools: list[Tool] | None = None) -> list[int]:
        """As `Scorer`.

        Raises:
            EndpointError: as above.

        """
        try:
            return await prompt_ids(self._post, self.base, messages, tools)
        except (ServerFault, LookupError, TypeError) as error:
            raise EndpointError(f"{self.url} does not say how it renders a chat: {error}") from None

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        return await self._ask("POST", path, body)

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            async with self._session.request(method, f"{self.url}{path}", json=body) as response:
                if response.status == 200:
                    if body:
                        self.versions[body["model"]] = response.headers.get(VERSION_HEADER, "")
                    return await response.json()
                said = (await response.text())[:_LONGEST_WORDS]
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise self._silent(error) from None
        if response.status >= 500:
            raise ServerFault(f"{path} answered {response.status}: {said}")
        raise self._refused(path, response.status, said)

    def _refused(self, path: str, status: int, said: str) -> EndpointError:
        if status == 401:
            return EndpointError(f"{self.url} refused the key", hint="name its variable with --key-env")
        return EndpointError(f"{self.url} refused {path} ({status}): {said}")

    def _silent(self, error: Exception) -> EndpointError:
        return EndpointError(
            f"{self.url} does not answer: {error}", hint="is the server running? `tuneship serve` starts one"
        )
