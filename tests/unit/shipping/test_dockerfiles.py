"""What must hold of the images before any engine builds them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tuneship.cli.containers.words import PORT, STOP_S

DOCKER = Path(__file__).parents[3] / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
SECRET = re.compile(r"secret|token|password|passwd|api_?key|credential", re.IGNORECASE)
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


class Step(NamedTuple):
    """One instruction, continued lines joined."""

    word: str
    rest: str


def steps(file: Path) -> list[Step]:
    text = re.sub(r"^\s*#.*\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [Step(*line.split(maxsplit=1)) for line in lines if line.strip()]


def last_stage(file: Path) -> list[Step]:
    found = steps(file)
    return found[max(place for place, step in enumerate(found) if step.word == "FROM") :]


def test_there_is_one_for_each_role():
    assert [file.stem for file in FILES] == ["serve", "train"]


@each_file
def test_hadolint_finds_nothing(file: Path):
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, "--no-color", file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@each_file
def test_it_runs_as_a_user_who_is_not_root_and_has_a_number(file: Path):
    """A number: Kubernetes' runAsNonRoot cannot judge a name."""
    users = [step.rest for step in last_stage(file) if step.word == "USER"]
    assert users == ["10001:10001"]


@each_file
def test_it_says_whether_it_is_well(file: Path):
    checks = [step.rest for step in last_stage(file) if step.word == "HEALTHCHECK"]
    assert len(checks) == 1
    argv = json.loads(checks[0].rpartition("CMD ")[2])
    assert argv[0] in {"python", "sh"}
    if file.stem == "serve":
        assert f"http://127.0.0.1:{PORT}/ready" in argv[-1]
        assert Step("EXPOSE", str(PORT)) in last_stage(file)


@each_file
def test_two_stages_and_only_the_environment_goes_from_one_to_the_other(file: Path):
    assert [step.rest for step in steps(file) if step.word == "FROM"] == ["${BASE} AS build", "${BASE}"]
    copied = [step.rest for step in last_stage(file) if step.word == "COPY"]
    assert copied == ["--from=build /opt/tuneship /opt/tuneship"]


@each_file
def test_the_base_is_cuda_of_the_locked_torch(file: Path):
    base = next(step.rest for step in steps(file) if step.word == "ARG")
    toolkit = re.search(r"^cuda-toolkit==(\S+)", (DOCKER / f"{file.stem}.lock").read_text(), re.MULTILINE)
    assert toolkit
    assert re.fullmatch(rf"BASE=nvidia/cuda:{re.escape(toolkit[1])}-(base|devel)-ubuntu24\.04", base)


@each_file
def test_nothing_is_fetched_but_packages_that_a_lock_knows(file: Path):
    text = file.read_text(encoding="utf-8")
    assert "://" not in text.replace(f"http://127.0.0.1:{PORT}/", "")
    assert not [step for step in steps(file) if step.word == "ADD"]
    installs = re.findall(r"(?:pip install|pip sync)[^&\n]*", " ".join(step.rest for step in steps(file)))
    assert len(installs) == 3
    for install in installs:
        assert "--require-hashes" in install or "--no-deps" in install
    assert f"docker/{file.stem}.lock" in installs[1]


@each_file
def test_no_secret_has_a_place(file: Path):
    named = [step.rest for step in steps(file) if step.word in {"ARG", "ENV", "LABEL"}]
    assert not [rest for rest in named if SECRET.search(rest)]
    assert not [step for step in steps(file) if step.word == "COPY" and step.rest.startswith(". ")]


@each_file
def test_every_builder_understands_it(file: Path):
    """The SDK speaks to the builder that knows no BuildKit."""
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"--mount=|<<|^# *syntax=|--link|--chmod", text, re.MULTILINE)


def test_the_builder_is_sent_nothing_that_is_not_named():
    patterns = [
        line for line in (DOCKER.parent / ".dockerignore").read_text().splitlines() if line[:1] not in {"#", ""}
    ]
    assert patterns[0] == "*"
    copied = {
        word
        for file in FILES
        for step in steps(file)
        if step.word == "COPY" and "--from" not in step.rest
        for word in step.rest.split()[:-1]
    }
    allowed = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    for source in copied:
        assert any(Path(source).match(pattern) for pattern in allowed), source
    assert patterns[-1] == "**/__pycache__"


def test_compose_keeps_what_the_verb_keeps():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    serve, prometheus = compose["services"]["serve"], compose["services"]["prometheus"]
    assert (DOCKER / serve["build"]["context"] / serve["build"]["dockerfile"]).is_file()
    assert serve["stop_grace_period"] == f"{STOP_S}s"
    assert serve["init"]
    for service in (serve, prometheus):
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    scraped = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"] == [{"targets": [f"serve:{PORT}"]}]
    assert scraped[0]["authorization"] == {"credentials_file": f"/run/secrets/{prometheus['secrets'][0]}"}
    assert compose["secrets"]["api_key"] == {"environment": "TUNESHIP_API_KEY"}


def compose_client() -> list[str] | None:
    if found := shutil.which("docker-compose"):
        return [found]
    plugin = shutil.which("docker") and subprocess.run(
        ["docker", "compose", "version"], capture_output=True, check=False
    )
    return ["docker", "compose"] if plugin and plugin.returncode == 0 else None


def configured(*files: str, **settings: str) -> subprocess.CompletedProcess[str]:
    client = compose_client()
    if client is None:
        pytest.skip("no docker compose here")
    version = subprocess.run([*client, "version", "--short"], capture_output=True, text=True, check=False).stdout
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (2, 24):
        pytest.skip(f"docker compose {version.strip()} does not know !reset")
    named = [word for file in files for word in ("-f", str(DOCKER / file))]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TUNESHIP_")}
    command = [*client, *named, "config", "--format", "json"]
    return subprocess.run(command, env=clean | settings, capture_output=True, text=True, check=False)


SETTINGS = {"TUNESHIP_API_KEY": "k" * 20, "TUNESHIP_ARTIFACTS": "/srv/artifacts", "TUNESHIP_MODEL": "merged-1"}


def test_docker_compose_reads_it_and_the_override_takes_the_gpu_away():
    done = configured("compose.yaml", **SETTINGS)
    assert done.returncode == 0, done.stderr
    serve = json.loads(done.stdout)["services"]["serve"]
    assert serve["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert serve["command"] == ["serve", "/artifacts/merged-1", "--host", "0.0.0.0"]
    on_cpu = configured("compose.yaml", "compose.cpu.yaml", **SETTINGS)
    assert on_cpu.returncode == 0, on_cpu.stderr
    assert json.loads(on_cpu.stdout)["services"]["serve"].keys() == serve.keys() - {"deploy"}


@pytest.mark.parametrize("missing", SETTINGS)
def test_docker_compose_says_what_is_not_set(missing: str):
    done = configured("compose.yaml", **{name: value for name, value in SETTINGS.items() if name != missing})
    assert not done.stdout
    assert missing in done.stderr
