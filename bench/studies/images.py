"""Both images, built and run for real where there is no Docker engine: Podman's Docker API, on a stand-in base.

What is asked through `tuneship docker`'s own code: are they built, do they run as a user who is in no passwd file, does
the quickstart train and merge in one and serve in the other, does it stop when it is told to. What it cannot tell: the
CUDA base, a GPU, BuildKit, Docker's own engine. It needs root, Debian, a package index, 30 GB of disk and 20 minutes:

    apt-get install podman crun debootstrap netavark iptables catatonit prometheus
    .venv/bin/python bench/studies/images.py --work /var/tmp/images --out bench/baselines/images-stand-in.json

Steps that are named (`base build-train train build-serve serve compose`) are done again, the others' figures are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import stand_in_engine
from images_served import compose, serve

from tuneship.cli.containers import engine
from tuneship.cli.containers.plan import Wishes, plan_run
from tuneship.cli.containers.words import Build, Role
from tuneship.core import hardware
from tuneship.core.artifact import open_artifact

ROOT = Path(__file__).parents[2]
SOMEBODY = 4242
"""Who is in no image's passwd file."""
STEPS = ("base", "build-train", "train", "build-serve", "serve", "compose")


def main() -> None:
    """Do the steps that are named, or all; write what was found after each."""
    options = argparse.ArgumentParser()
    options.add_argument("steps", nargs="*", choices=(*STEPS, []), default=[])
    options.add_argument("--work", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    asked = options.parse_args()
    work: Path = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    found = json.loads(asked.out.read_text()) if asked.out.is_file() and asked.steps else {}
    found |= {
        "command": "python bench/studies/images.py --work /var/tmp/images --out bench/baselines/images-stand-in.json",
        "hardware": hardware.detect().as_record(),
        "engine": subprocess.run(["podman", "--version"], capture_output=True, text=True, check=True).stdout.strip(),
        "stand_in": stand_in_engine.BASE,
    }
    with stand_in_engine.serving(work) as host:
        os.environ["DOCKER_HOST"] = host
        for step in asked.steps or STEPS:
            begun = time.monotonic()
            found[step] = _do(step, work) | {"seconds": round(time.monotonic() - begun, 1)}
            asked.out.write_text(json.dumps(found, indent=1) + "\n")
            print(step, json.dumps(found[step]))


def _do(step: str, work: Path) -> dict[str, Any]:
    if step == "base":
        stand_in_engine.make_base(work)
        return {"image_bytes": _inspect(stand_in_engine.BASE)["Size"]}
    if step in {"build-train", "build-serve"}:
        return _build("train" if step == "build-train" else "serve")
    home = _at_home(work)
    if step == "train":
        return _train(home)
    return serve(home, SOMEBODY) if step == "serve" else compose(home)


def _build(role: Role) -> dict[str, Any]:
    wanted = Build(role, ROOT, f"tuneship-{role}", stand_in_engine.BASE)
    stand_in_engine.forget(wanted.tag)
    begun = time.monotonic()
    engine.build(wanted)
    seconds = time.monotonic() - begun
    config = _inspect(wanted.tag)
    return {
        "build_s": round(seconds, 1),
        "image_bytes": config["Size"],
        "user": config["Config"]["User"],
        "healthcheck": stand_in_engine.healthcheck(wanted.tag),
        "inside": _look_inside(wanted.tag),
    }


def _look_inside(image: str) -> dict[str, str]:
    """What the image's own user finds; each a line of shell."""
    questions = {
        "user": "id -u",
        "version": "tuneship --version",
        "writes_its_environment": "touch /opt/tuneship/x 2>/dev/null && echo yes || echo no",
        "environment_mb": "du -sm /opt/tuneship | cut -f1",
        "source_or_runs_left": "ls -d /src /runs /work /opt/build 2>/dev/null | wc -l",
        "compiler": "g++ --version | head -1",
    }
    with closing(engine.sdk().from_env()) as client:
        return {
            name: client.containers.run(image, ["-c", line], entrypoint="sh", remove=True).decode().strip()
            for name, line in questions.items()
        }


def _inspect(image: str) -> dict[str, Any]:
    with closing(engine.sdk().from_env()) as client:
        attributes: dict[str, Any] = client.images.get(image).attrs
        return attributes


def _at_home(work: Path) -> Path:
    """Where somebody works: the recipes, and folders that are his own; we stand in it."""
    home = work / "home"
    if not home.is_dir():
        shutil.copytree(ROOT / "recipes", home / "recipes")
    for variable, name in (("TUNESHIP_CACHE", "cache"), ("TUNESHIP_STATE", "state"), ("HF_HOME", "hub")):
        os.environ[variable] = str(home / name)
        (home / name / "container").mkdir(parents=True, exist_ok=True)
    for path in (home, *home.rglob("*")):
        os.chown(path, SOMEBODY, SOMEBODY)
    os.chdir(home)
    return home


def _train(home: Path) -> dict[str, Any]:
    shutil.rmtree(home / "runs", ignore_errors=True)
    seconds = {}
    for verb, what in (("train", "recipes/quickstart.toml"), ("merge", "runs/invoice-json")):
        begun = time.monotonic()
        code = engine.run(plan_run((verb, what), Wishes())._replace(user=f"{SOMEBODY}:{SOMEBODY}"))
        seconds[f"{verb}_s"] = round(time.monotonic() - begun, 1)
        if code:
            raise SystemExit(f"{verb} ended with {code}")
    (merged,) = (home / "runs" / "invoice-json" / "artifacts").glob("merged-*")
    metrics = open_artifact(merged, kind="merged").manifest.metrics
    strangers = [str(path) for path in (home / "runs").rglob("*") if path.stat().st_uid != SOMEBODY]
    return seconds | {"merged": merged.name, "metrics": metrics, "files_of_others": strangers}


if __name__ == "__main__":
    main()
