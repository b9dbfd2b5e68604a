"""The serving half of `images.py`: a merged model behind the door of a container, asked, scraped, told to end."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import stand_in_engine

from tuneship.bench.quality.tasks import find_scorer
from tuneship.cli.containers import engine
from tuneship.cli.containers.plan import Wishes, plan_run

PORT, PROMETHEUS_PORT = 31755, 31756
URL = f"http://127.0.0.1:{PORT}"
_READY_S, _SCRAPED_S = 600.0, 40.0
_ROWS = 16
_DOCKER = Path(__file__).parents[2] / "docker"


def serve(home: Path, user: int) -> dict[str, Any]:
    """Serve the merged model of the run in `home`, ask it, and end it with SIGTERM."""
    key = secrets.token_urlsafe(24)
    os.environ["TUNESHIP_API_KEY"] = key
    (merged,) = (home / "runs" / "invoice-json" / "artifacts").glob("merged-*")
    run = plan_run(("serve", str(merged.relative_to(home))), Wishes(port=PORT))._replace(user=f"{user}:{user}")
    found: dict[str, Any] = {}
    asker = threading.Thread(target=_ask_and_end, args=(home, key, time.monotonic(), found))
    asker.start()
    found["exit_code"] = engine.run(run)
    asker.join()
    found["stop_s"] = round(time.monotonic() - found.pop("told_to_end"), 1)
    with closing(engine.sdk().from_env()) as client:
        return found | {"containers_left": len(client.containers.list(all=True))}


def compose(home: Path) -> dict[str, Any]:
    """The same model by `docker/compose.yaml` with its CPU override; without Prometheus, whose image is not here."""
    client = shutil.which("docker-compose")
    if client is None:
        return {"run": "no docker-compose here"}
    artifacts = home / "runs" / "invoice-json" / "artifacts"
    (merged,) = artifacts.glob("merged-*")
    key = secrets.token_urlsafe(24)
    settings = {"TUNESHIP_API_KEY": key, "TUNESHIP_ARTIFACTS": str(artifacts), "TUNESHIP_MODEL": merged.name}
    files = [word for name in ("compose.yaml", "compose.cpu.yaml") for word in ("--file", str(_DOCKER / name))]
    environment = {**os.environ, **settings, "TUNESHIP_PORT": str(PORT)}

    def asked(*words: str) -> str:
        done = subprocess.run([client, *files, *words], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    begun = time.monotonic()
    try:
        asked("up", "--detach", "serve")
        found = {"version": asked("version", "--short"), "ready_s": _wait_until_ready(begun)} | _asked(home, key)
        begun = time.monotonic()
        asked("stop")
        return found | {"stop_s": round(time.monotonic() - begun, 1)}
    finally:
        asked("down", "--volumes")


def _ask_and_end(home: Path, key: str, begun: float, found: dict[str, Any]) -> None:
    try:
        found["ready_s"] = _wait_until_ready(begun)
        found |= _asked(home, key) | {"healthcheck_exit_code": _health(), "prometheus": _scraped(home, key)}
    finally:
        found["told_to_end"] = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)


def _wait_until_ready(begun: float) -> float:
    while time.monotonic() - begun < _READY_S:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{URL}/ready").status_code == httpx.codes.OK:
                return round(time.monotonic() - begun, 1)
        time.sleep(0.5)
    raise TimeoutError("it was never ready")


def _asked(home: Path, key: str) -> dict[str, Any]:
    """Without a key, by a wrong name, and the first held-out rows."""
    client = httpx.Client(base_url=URL, headers={"Authorization": f"Bearer {key}"}, timeout=120)
    with client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        wrong = client.post("/v1/chat/completions", json={"model": "nobody", "messages": []}).status_code
        rows = (home / "recipes" / "data" / "invoice-json.heldout.jsonl").read_text(encoding="utf-8").splitlines()
        scores = [_score(client, model, json.loads(row)["messages"]) for row in rows[:_ROWS]]
    without = httpx.get(f"{URL}/v1/models").status_code
    return {
        "model": model,
        "without_a_key": without,
        "unknown_model": wrong,
        "heldout_rows": len(scores),
        "fields_right": round(sum(scores) / len(scores), 3),
    }


def _score(client: httpx.Client, model: str, messages: list[dict[str, str]]) -> float:
    body = {"model": model, "messages": messages[:-1], "max_tokens": 64, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    return find_scorer("json-fields")(answer, messages[-1]["content"], {})


def _health() -> int:
    """The exit code of the image's own HEALTHCHECK, which Docker would ask every ten seconds."""
    with closing(engine.sdk().from_env()) as client:
        container = client.containers.list()[0]
        kind, *command = stand_in_engine.healthcheck("tuneship-serve")
        assert kind == "CMD"
        return int(container.exec_run(command).exit_code)


def _scraped(home: Path, key: str) -> dict[str, Any] | str:
    """What a real Prometheus says of our configuration and of its target; the address and the key's file are ours."""
    if not shutil.which("prometheus"):
        return "not here"
    folder = home.parent / "prometheus"
    folder.mkdir(exist_ok=True)
    (folder / "key").write_text(key)
    text = (_DOCKER / "prometheus.yml").read_text(encoding="utf-8")
    configuration = folder / "prometheus.yml"
    configuration.write_text(
        text.replace("/run/secrets/api_key", str(folder / "key")).replace("serve:30000", f"127.0.0.1:{PORT}")
    )
    checked = subprocess.run(["promtool", "check", "config", str(configuration)], capture_output=True, check=False)
    with _prometheus(folder) as address:
        deadline = time.monotonic() + _SCRAPED_S
        found: list[Any] = []
        while not found and time.monotonic() < deadline:
            time.sleep(1)
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.get(f"{address}/api/v1/query", params={"query": 'up{job="tuneship"} == 1'})
                found = answer.json()["data"]["result"]
        names = httpx.get(f"{address}/api/v1/label/__name__/values").json()["data"]
    ours = [name for name in names if name.startswith("tuneship_")]
    return {"promtool_exit_code": checked.returncode, "up": len(found), "series_of_ours": len(ours)}


@contextlib.contextmanager
def _prometheus(folder: Path) -> Iterator[str]:
    address = f"127.0.0.1:{PROMETHEUS_PORT}"
    flags = (f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data")
    command = ["prometheus", *flags, f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()
