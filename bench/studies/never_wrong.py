"""Never the wrong one: a server whose adapters come, go and change under load, while its engine is killed.

Two versions each of eight adapters, every one with an answer of its own (a marker), on one tiny base. Requests to all
of them, the same prompts to each, 16 to 32 at a time, half of them streams; meanwhile loads, promotes, canaries,
rollbacks and unloads, and the engine killed with SIGKILL. Every answer is held against the version that its header
names, against the alias that was asked for, and against what the verbs had done when the request was sent
(`answering.py`): while a verb runs, what was and what shall be; after it, what it shall have done alone.

It fails if one answer came from another adapter or from the base, from a version that was unloaded or had no weight,
if a verb did something else than it says, if anything failed outside the kills, if a failure had another form than
OpenAI's error, or if fewer verbs were done than were asked for; those that were refused are counted apart.

Not shown: throughput. Two cores answer slowly, and the adapters are tiny.

    .venv/bin/python bench/studies/never_wrong.py --requests 5000 --out FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import aiohttp
from answering import Alias, Timeline
from made import made
from marker_server import ALIASES, BASE, contents, prepare, served

from tuneship.core import hardware
from tuneship.core.process import descendants
from tuneship.serve import running
from tuneship.serve.refusals import RETRY_S

TOKENS = 10
CLIENTS = 32
VICTIMS = ("sglang::scheduler", "sglang.launch_server", "sglang::detokenizer")
_VERB_S = 300


class Asked(NamedTuple):
    """One request and what came of it. Times of `time.monotonic`."""

    model: str
    began: float
    heard: float
    """When its first byte came: its version was chosen before."""
    ended: float
    status: int
    version: str
    text: str
    code: str
    """Of the error, in OpenAI's form; `?` where there was an error in another form."""


class Gone(NamedTuple):
    """A version that was out of the server from `since` until `until`."""

    version: str
    since: float
    until: float


class Storm:
    """One run: the server, the clients, the verbs, the kills."""

    def __init__(self, options: argparse.Namespace, folder: Path, markers: dict[str, str], chats: list[Any]) -> None:
        self.options, self.folder, self.markers, self.chats = options, folder, markers, chats
        self.draw = random.Random(options.seed)
        self.asked: list[Asked] = []
        self.in_flight = 0
        self.sampled: list[tuple[float, int]] = []
        """(when, how many requests were in flight)."""
        self.gone: list[Gone] = []
        self.kills: list[tuple[float, float]] = []
        self.verbs: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.refused_verbs: list[str] = []
        self.without_effect: list[str] = []
        self.by_content: dict[str, str] = {}

    async def run(self, url: str, admin: running.Running, pid: int) -> None:
        """Ask until all requests are answered."""
        self.pid = pid
        timeout = aiohttp.ClientTimeout(total=180)
        async with (
            aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as self.http,
            aiohttp.ClientSession(
                admin.admin_url,
                headers={"Authorization": f"Bearer {admin.admin_key}"},
                timeout=aiohttp.ClientTimeout(total=_VERB_S),
            ) as self.admin,
        ):
            self.timeline = Timeline(await self._listed(), time.monotonic())
            left = iter(range(self.options.requests))
            sampling = asyncio.create_task(self._sample())
            clients = [asyncio.create_task(self._client(left)) for _ in range(CLIENTS)]
            trouble = [asyncio.create_task(self._operate()), asyncio.create_task(self._kill())]
            await asyncio.gather(*clients, *trouble)
            sampling.cancel()

    async def _client(self, left: Any) -> None:
        for number in left:
            alias = self.draw.choice(ALIASES)
            model = BASE if self.draw.random() < 0.06 else alias
            asked = await self._ask(model, self.chats[number % len(self.chats)], stream=number % 2 == 0)
            self.asked.append(asked)
            if asked.code == "engine_unavailable":
                await asyncio.sleep(RETRY_S)  # as `Retry-After` says
            if number % 5 == 0:  # the number in flight moves between 16 and 32
                await asyncio.sleep(self.draw.random() * 0.3)

    async def _ask(self, model: str, chat: Any, *, stream: bool) -> Asked:
        body = {"model": model, "messages": chat, "max_tokens": TOKENS, "temperature": 0, "stream": stream}
        began = heard = time.monotonic()
        status, version, text, code = 0, "", "", ""
        self.in_flight += 1
        try:
            async with self.http.post("/v1/chat/completions", json=body) as answer:
                heard = time.monotonic()
                status, version = answer.status, answer.headers.get("x-tuneship-version", "")
                said = await answer.read()
            if status != 200:
                code = _code(said)
            elif stream:
                text, code = _streamed(said)
            else:
                text = json.loads(said)["choices"][0]["message"]["content"] or ""
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError) as error:
            code = f"? {type(error).__name__}: {error}"
        finally:
            self.in_flight -= 1
        return Asked(model, began, heard, time.monotonic(), status, version, text, code)

    async def _sample(self) -> None:
        while True:
            self.sampled.append((time.monotonic(), self.in_flight))
            await asyncio.sleep(0.05)

    async def _operate(self) -> None:
        """Change what is served, until `--verbs` changes are done, spread over the run."""
        while self.verbs.total() < self.options.verbs and len(self.asked) < self.options.requests:
            await self._until(self.verbs.total() / (self.options.verbs + 1))
            await self._change(self.draw.choice(ALIASES))

    async def _change(self, alias: str) -> None:
        """One verb to `alias`, of those that make sense now."""
        here = [v for v in await self._verb("GET", "/admin/adapters") if v["alias"] == alias]
        states = {v["version"]: v["state"] for v in here}
        beside = [name for name, state in states.items() if state in {"loaded", "canary"}]
        now = self.timeline.now[alias]
        choices: list[tuple[str, Any]] = [("rollback", alias)] if now.canaries or len(now.lives) > 1 else []
        choices += [(verb, name) for name in beside for verb in ("promote", "weight", "unload", "unload")]
        present = {name.rpartition("@")[2] for name, state in states.items() if state != "unloaded"}
        for path in (self.folder / f"{alias}-1", self.folder / f"{alias}-2"):
            if self._content(path) not in present:
                choices += [("load", path)] * 3
        if choices:
            await self._do(alias, *self.draw.choice(choices))

    async def _do(self, alias: str, verb: str, what: Any) -> None:
        """Send it, and write down who may answer meanwhile and afterwards."""
        weight: float | None = None
        url, body, version = f"/admin/adapters/{what}/{verb}", {}, str(what)
        if verb == "load":
            weight = self.draw.choice([None, 0.3, 1.0])
            version = f"{alias}@{self._content(what)}"
            url, body = "/admin/adapters", {"path": str(what), "alias": alias, "weight": weight}
        elif verb == "weight":
            weight = self.draw.choice([0.05, 0.5])
            body = {"weight": weight}
        before, began = self.timeline.now[alias], time.monotonic()
        planned = self.timeline.begin(alias, verb, version, weight, at=began)
        done = await self._verb("POST", url, body)
        ended = time.monotonic()
        listed = (await self._listed())[alias]
        if done:
            self.verbs[verb] += 1
            if listed.answering != planned.answering:
                self.without_effect.append(
                    f"{verb} {what}: {sorted(listed.answering)}, not {sorted(planned.answering)}"
                )
        else:  # it may have been given up on its way: what is listed is one of the two
            self.refused[verb] += 1
            planned = planned if listed.answering == planned.answering else before
        self.timeline.settle(alias, planned, at=ended)
        if verb == "load" and done:
            self.gone = [
                gone._replace(until=began) if gone.version == version and gone.until > began else gone
                for gone in self.gone
            ]
        elif verb == "unload" and done:
            self.gone.append(Gone(version, ended, float("inf")))

    async def _listed(self) -> dict[str, Alias]:
        """What the server says of itself: with it the timeline begins, and verbs that were refused are looked up."""
        rows = await self._verb("GET", "/admin/adapters")
        named = {name: [row for row in rows if row["alias"] == name] for name in ALIASES}
        return {
            name: Alias(
                tuple(row["version"] for row in here if row["state"] == "live"),
                frozenset(row["version"] for row in here if row["state"] == "canary"),
            )
            for name, here in named.items()
        }

    def _content(self, path: Path) -> str:
        return next(content for content, marked in self.by_content.items() if marked == self.markers[path.name])

    async def _verb(self, method: str, path: str, body: Any = None) -> Any:
        async with self.admin.request(method, path, json=body) as answer:
            said = await answer.json()
            if answer.status == 200:
                return said
            self.refused_verbs.append(f"{path}: {said['error']['message']}")
            return None

    async def _kill(self) -> None:
        """SIGKILL one of the engine's processes, `--kills` times, and wait until it answers again."""
        for number in range(self.options.kills):
            await self._until((number + 0.7) / (self.options.kills + 0.5))
            name = VICTIMS[number % len(VICTIMS)]
            (victim, *_) = [p for p in descendants(self.pid) if name in " ".join(p.cmdline())]
            began = time.monotonic()
            victim.kill()
            await asyncio.sleep(2)  # it is noticed within one
            while not await self._is_ready():  # noqa: ASYNC110 - the server is another process
                await asyncio.sleep(0.25)
            self.kills.append((began, time.monotonic()))

    async def _is_ready(self) -> bool:
        async with self.http.get("/ready") as answer:
            return answer.status == 200

    async def _until(self, share: float) -> None:
        """Until `share` of the requests is answered."""
        while len(self.asked) < share * self.options.requests:  # noqa: ASYNC110 - no event for each share
            await asyncio.sleep(0.05)

    def judge(self) -> dict[str, Any]:
        """What was found, the numbers that must be 0 first."""
        found: Counter[str] = Counter()
        examples: dict[str, Asked] = {}
        for asked in self.asked:
            for fault in self._faults(asked):
                found[fault] += 1
                examples.setdefault(fault, asked)
        failed = [asked for asked in self.asked if asked.code]
        # While there were requests to send: not the first that begin one by one, nor the last that end so.
        sent = sorted(asked.began for asked in self.asked)
        during = [(at, n) for at, n in self.sampled if sent[min(CLIENTS, len(sent) - 1)] <= at <= sent[-1]]
        return {
            "answered_by_another_adapter": found["another adapter"],
            "answered_by_the_base": found["the base"],
            "answered_after_unload": found["unloaded"],
            "answered_without_weight": found["weight"],
            "verbs_that_did_something_else": len(self.without_effect),
            "header_of_another_alias": found["header"],
            "failed_outside_the_kills": found["failed"],
            "failed_in_another_form": found["form"],
            "verbs_missing": max(self.options.verbs - self.verbs.total(), 0),
            "examples": {fault: asked._asdict() for fault, asked in examples.items()} | self._odd_verbs(),
            "requests": len(self.asked),
            "answered": len(self.asked) - len(failed),
            "failed_in_the_kills": dict(Counter(asked.code for asked in failed)),
            "kill_to_ready_s": [round(end - begin, 1) for begin, end in self.kills],
            # A client that was told to come back later does, so much after the engine is there again.
            "in_flight": _spread([n for at, n in during if not self._killed(at - RETRY_S, at)]),
            "in_flight_in_the_kills": _spread([n for at, n in during if self._killed(at - RETRY_S, at)]),
            "verbs_done": self.verbs.total(),
            "verbs": dict(sorted(self.verbs.items())),
            "verbs_refused": dict(sorted(self.refused.items())),
            "refused_verbs": sorted(set(self.refused_verbs)),
            "versions_that_answered": len({asked.version for asked in self.asked if asked.version}),
        }

    def _faults(self, asked: Asked) -> list[str]:
        if asked.code:
            inside = self._killed(asked.began, asked.ended)
            return [*([] if inside else ["failed"]), *(["form"] if asked.code.startswith("?") else [])]
        alias, _, content = asked.version.partition("@")
        if alias != asked.model:
            return ["header"]
        heard = next((marker for marker in self.markers.values() if asked.text.startswith(marker)), None)
        if asked.model == BASE:
            return ["another adapter"] if heard else []
        faults = []
        if heard != self.by_content[content]:
            faults.append("another adapter" if heard else "the base")
        if any(gone.version == asked.version and gone.since < asked.began < gone.until for gone in self.gone):
            faults.append("unloaded")
        elif asked.version not in self.timeline.allowed(alias, asked.began, asked.heard):
            faults.append("weight")
        return faults

    def _killed(self, since: float, until: float) -> bool:
        return any(since < end and until > begin for begin, end in self.kills)

    def _odd_verbs(self) -> dict[str, Any]:
        return {"verbs": self.without_effect[:5]} if self.without_effect else {}


def main() -> None:
    """Run the storm; exit 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--verbs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="never-wrong-") as name:
        folder = Path(name)
        markers, chats = prepare(folder)
        storm = Storm(options, folder, markers, chats)
        with served(folder) as (url, process):
            admin = running.find(url)
            storm.by_content = contents(folder, markers)
            began = time.monotonic()
            asyncio.run(storm.run(url, admin, process.pid))
            took_s = time.monotonic() - began
        judged = storm.judge()
    result = {
        "what": "requests to 8 aliases of 16 marker adapters in 9 slots during verbs and kills; must-be-zero first",
        "command": shlex.join([".venv/bin/python", *sys.argv]),
        **made(),
        "hardware": hardware.detect().cpu,
        "cores": os.cpu_count(),
        "versions": {name: metadata.version(name) for name in ("sglang", "torch", "tuneship")},
        **judged,
        "duration_s": round(took_s, 1),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    wrong = sum(result[key] for key in list(judged)[: list(judged).index("examples")])
    raise SystemExit(1 if wrong else 0)


def _spread(counts: list[int]) -> dict[str, float]:
    """Of samples, 20 a second."""
    return {"min": min(counts), "median": median(counts), "max": max(counts)} if counts else {}


def _code(said: bytes) -> str:
    try:
        return str(json.loads(said)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return f"? {said[:100]!r}"


def _streamed(said: bytes) -> tuple[str, str]:
    """The text of a stream, and the code of the error that it ends with, if it does."""
    *events, rest = said.split(b"\n\n")
    if rest or not events:
        return "", f"? torn: {said[-100:]!r}"
    text = ""
    for event in events:
        data = event.removeprefix(b"data: ")
        if data == b"[DONE]":
            return text, ""
        chunk = json.loads(data)
        if "error" in chunk:
            return text, str(chunk["error"]["code"])
        text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    return text, "? it ended without [DONE]"


if __name__ == "__main__":
    main()
