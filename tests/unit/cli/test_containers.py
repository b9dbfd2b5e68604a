"""`tuneship docker`: the plain command that it prints is what it does through the SDK."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.cli.engine_that_records import Asked, recording
from tuneship.cli.containers import engine, verbs
from tuneship.cli.containers.plan import ROLES, Wishes, plan_run
from tuneship.cli.containers.words import Build, Run
from tuneship.core.cache import keys_file
from tuneship.core.errors import PreflightError, TuneshipError

ROOT = Path(__file__).parents[3]
KEY = "k" * 24
ONLY_OF_THE_CLIENT = {"AutoRemove", "ConsoleSize"}
"""`docker run --rm` lets the engine remove the container; we do it ourselves, once its exit code was read."""

with_client = pytest.mark.skipif(not shutil.which("docker"), reason="no docker client here")


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A caller with folders of his own, in one with a blank and a comma in its name."""
    for name in ("TUNESHIP_CACHE", "TUNESHIP_STATE", "TUNESHIP_KEYS", "HF_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_TOKEN", "TUNESHIP_API_KEY", "HF_HUB_OFFLINE", "HF_ENDPOINT", "DOCKER_TLS_VERIFY"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "my, runs"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    return folder


def planned(*command: str, **wishes: object) -> Run:
    return plan_run(command, Wishes(**wishes))


SERVED = {"image": "mine", "port": 31000, "gpus": "0,1"}


@with_client
@pytest.mark.parametrize(
    ("command", "wishes"),
    [
        (("serve", "runs/a b"), {}),
        (("serve", "merged-1", "--name", "x y"), SERVED),
        (("serve", "merged-1"), {"host": "::1", "mounts": (Path("/usr/share"), Path("/opt"))}),
        (("train", "r.toml", "--lora.rank", "8"), {"gpus": "all", "env": ("WANDB_API_KEY", "NOT_SET")}),
    ],
)
def test_the_printed_command_asks_the_engine_for_what_the_sdk_asks(command, wishes, monkeypatch):
    monkeypatch.setenv("TUNESHIP_API_KEY", KEY)
    monkeypatch.setenv("WANDB_API_KEY", "secret of mine")
    run = planned(*command, **wishes)
    with recording() as (host, asked):
        monkeypatch.setenv("DOCKER_HOST", host)
        with pytest.raises(TuneshipError, match="noted"):
            engine.run(run)
        subprocess.run(shlex.split(shlex.join(run.words())), capture_output=True, timeout=60, check=False)
    by_sdk, by_client = asked
    assert by_sdk.path == by_client.path == "/containers/create"
    ours, theirs = without_defaults(by_sdk), without_defaults(by_client)
    assert theirs["HostConfig"].keys() - ours["HostConfig"].keys() <= ONLY_OF_THE_CLIENT
    for name in ONLY_OF_THE_CLIENT:
        theirs["HostConfig"].pop(name, None)
    assert ours == theirs
    assert f"TUNESHIP_API_KEY={KEY}" in ours["Env"]
    assert ours["Cmd"][: len(command)] == list(command)


def without_defaults(asked: Asked) -> dict:
    """What was asked for, in the engine's words; both clients write down other defaults."""

    def said(value: object) -> object:
        if isinstance(value, dict):
            return {key: found for key, inner in value.items() if (found := said(inner)) not in unsaid}
        return [said(inner) for inner in value] if isinstance(value, list) else value

    unsaid = (None, "", [], {}, False, 0, -1, "default", "no")
    told = {key: value for key, value in asked.json.items() if key != "NetworkingConfig"}
    # `--gpus all` is a count of -1, which is not the default of a device request.
    counts = [request.pop("Count", 0) for request in told["HostConfig"].get("DeviceRequests") or ()]
    return {**said(told), "Env": sorted(told["Env"]), "counts": counts}


@with_client
def test_both_builders_are_sent_the_same_and_no_secret(tmp_path, monkeypatch):
    checkout = checkout_with_secrets(tmp_path / "checkout")
    wanted = Build("serve", checkout, "mine:1", "debian:12")
    with recording() as (host, asked):
        monkeypatch.setenv("DOCKER_HOST", host)
        with pytest.raises(TuneshipError, match="noted"):
            engine.build(wanted)
        plain = {**os.environ, "DOCKER_BUILDKIT": "0"}  # BuildKit talks gRPC; the files and options are the same
        subprocess.run(wanted.words(), env=plain, capture_output=True, timeout=60, check=False)
    by_sdk, by_client = asked
    for name in ("t", "dockerfile"):
        assert by_sdk.query[name] == by_client.query[name]
    assert by_sdk.query["buildargs"][0].replace(" ", "") == by_client.query["buildargs"][0] == '{"BASE":"debian:12"}'
    assert by_sdk.files == by_client.files
    sent = b"".join(by_sdk.files.values()) + "\n".join(by_sdk.files).encode()
    assert b"tuneship/core/extras.py" in sent
    assert b"SECRET" not in sent
    assert b"runs/" not in b"\n".join(name.encode() for name in by_sdk.files)


def checkout_with_secrets(checkout: Path) -> Path:
    """What an image is made of, among what a work tree collects."""
    for folder in ("tuneship", "train/tuneship", "serve/tuneship", "bench/tuneship", "docker"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE", ".dockerignore"):
        shutil.copy(ROOT / file, checkout / file)
    for place in (
        "runs/x/report.json",
        "keys.toml",
        ".env",
        "docker/.env",
        ".git/config",
        "train/rows.jsonl",
        "id_rsa",
    ):
        (checkout / place).parent.mkdir(parents=True, exist_ok=True)
        (checkout / place).write_text("SECRET")
    return checkout


def test_no_value_of_a_secret_is_printed(monkeypatch, capfd):
    monkeypatch.setenv("TUNESHIP_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    verbs.run("serve", "merged-1", gpus="none", dry_run=True)
    printed = capfd.readouterr().out
    assert shlex.split(printed) == planned("serve", "merged-1").words()
    assert "--env TUNESHIP_API_KEY --env HF_TOKEN" in printed
    assert KEY not in printed
    assert "hf_secret" not in printed


def test_a_container_is_the_caller_in_his_folder(at_home):
    run = planned("train", "r.toml")
    assert run.user == f"{os.getuid()}:{os.getgid()}"
    assert run.folder == at_home
    assert run.binds[0] == (at_home, False)
    for variable in ("HOME", "TUNESHIP_CACHE", "TUNESHIP_STATE", "HF_HOME"):
        place = Path(run.settings[variable])
        assert place.is_dir()
        assert any(place.is_relative_to(bind.path) and not bind.read_only for bind in run.binds)
    assert len({bind.path for bind in run.binds}) == len(run.binds)


def test_a_server_reads_and_is_published_on_loopback(at_home, monkeypatch):
    monkeypatch.setenv("TUNESHIP_API_KEY", KEY)
    run = planned("serve", "merged-1")
    assert run.binds[0] == (at_home, True)
    assert "127.0.0.1:30000:30000" in run.words()
    assert run.command == ("serve", "merged-1", "--host", "0.0.0.0", "--port", "30000")
    assert planned("train", "r.toml").publish is None


def test_a_server_needs_a_key():
    with pytest.raises(PreflightError, match="no API key") as refused:
        planned("serve", "merged-1")
    assert "TUNESHIP_API_KEY" in refused.value.hint


def test_a_file_of_keys_is_where_serve_looks_for_it():
    from tuneship.serve import keys, keys_commands

    keys_commands.add("verb")
    assert list(keys.read(keys_file())) == ["verb"]
    secret = keys.add(keys_file(), "ci")
    run = planned("serve", "merged-1")
    assert secret not in run.words()
    assert run.settings["TUNESHIP_KEYS"] == str(keys_file())
    assert (keys_file().parent, True) in run.binds


def test_one_mount_a_path_and_who_must_write_decides(monkeypatch, at_home):
    monkeypatch.setenv("TUNESHIP_API_KEY", KEY)
    monkeypatch.setenv("TUNESHIP_CACHE", str(at_home))
    run = planned("serve", "merged-1", mounts=(at_home,))
    assert [bind.read_only for bind in run.binds if bind.path == at_home] == [False]


def test_every_folder_that_a_server_is_given_is_mounted(monkeypatch, at_home, tmp_path):
    monkeypatch.setenv("TUNESHIP_API_KEY", KEY)
    base, one, two = (tmp_path / name for name in ("base", "one", "two"))
    for path in (base, one, two, at_home / "inside"):
        path.mkdir()
    run = planned(
        "serve", str(base), "--adapters", "../one", f"--adapters={two}", "--adapters", "inside", "--name", "x"
    )
    assert {(path, True) for path in (base, one, two)} <= set(run.binds)
    assert not [bind for bind in run.binds if bind.path == at_home / "inside"]
    (state := tmp_path / "state").mkdir()  # what is to be written to is not mounted to be read alone
    assert state not in {bind.path for bind in planned("serve", str(base), "--state", str(state)).binds}
    assert base not in {bind.path for bind in planned("train", str(base)).binds}


@pytest.mark.parametrize("verb", ["up", "bench", "", "--help"])
def test_a_verb_of_no_image_is_refused_by_name(verb):
    with pytest.raises(TuneshipError) as refused:
        planned(*([verb] if verb else []))
    assert all(role in refused.value.hint for role in ROLES)


def test_the_root_folder_is_not_mounted(monkeypatch):
    monkeypatch.chdir("/")
    with pytest.raises(TuneshipError, match="cannot be mounted"):
        planned("train", "r.toml")


@pytest.mark.parametrize("wish", ["", "0,", ",1"])
def test_gpus_are_none_all_or_ids(wish):
    with pytest.raises(TuneshipError, match="--gpus"):
        planned("train", "r.toml", gpus=wish)


def test_a_build_needs_a_checkout(at_home):
    with pytest.raises(TuneshipError, match=r"no docker/train\.Dockerfile"):
        verbs.build("train")


def test_no_engine_is_said_with_the_plain_command_before_it(at_home, monkeypatch, capfd):
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")  # the SDK leaks a Unix socket that it cannot connect
    with pytest.raises(TuneshipError, match="no Docker engine answers"):
        verbs.run("train", "r.toml", gpus="none")
    assert capfd.readouterr().err.startswith("docker run --rm --init")
