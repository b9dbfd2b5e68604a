"""Podman as a stand-in for Docker's engine, and a debootstrapped Debian for the CUDA base; for `images.py`.

Podman serves Docker's API on a socket, so `tuneship docker` and the SDK talk to it as they would to Docker. It is not
Docker: another builder (buildah), another runtime (crun), no BuildKit, no NVIDIA runtime.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BASE = "localhost/stand-in:bookworm"
_SUITE = "bookworm"
_NEEDED = ("podman", "crun", "debootstrap", "iptables", "unshare")
_MOST_PROCESSES = 30000
_START_S = 30.0


@contextmanager
def serving(work: Path) -> Iterator[str]:
    """Podman's Docker API while the block runs; its DOCKER_HOST.

    Layers of the stage that only builds are not kept: `BUILDAH_LAYERS`.
    """
    for program in _NEEDED:
        if shutil.which(program) is None:
            raise SystemExit(
                f"{program} is missing: apt-get install podman crun debootstrap netavark iptables catatonit"
            )
    os.environ.update(_settings(work))
    socket = work / "podman.sock"
    socket.unlink(missing_ok=True)
    # crun refuses a machine with both versions of cgroups: in a mount namespace of its own there is one.
    serve = f"umount /sys/fs/cgroup/unified 2>/dev/null; exec podman system service --time=0 unix://{socket}"
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", serve]
    with (work / "podman.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "BUILDAH_LAYERS": "false"})
    try:
        deadline = time.monotonic() + _START_S
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        yield f"unix://{socket}"
    finally:
        process.terminate()
        process.wait()


def make_base(work: Path) -> None:
    """A minimal Debian as an image, with this machine's certificates."""
    root = work / "base"
    subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=ca-certificates", _SUITE, str(root)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    inside = "etc/ssl/certs/ca-certificates.crt"
    trusted = ssl.get_default_verify_paths().cafile
    if trusted:
        shutil.copy(trusted, root / inside)
    change = shlex.quote(f"ENV SSL_CERT_FILE=/{inside}")
    bring = f"tar -C {shlex.quote(str(root))} -c . | podman import --change {change} - {BASE}"
    subprocess.run(bring, shell=True, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S602
    shutil.rmtree(root)


def forget(image: str) -> None:
    """Remove `image` and what building it left: the next build begins with the base."""
    subprocess.run(["podman", "rmi", "--force", image], check=False, capture_output=True)
    subprocess.run(["podman", "image", "prune", "--force"], check=True, capture_output=True)


def healthcheck(image: str) -> list[str]:
    """Its test; Podman's Docker API leaves it out."""
    shown = subprocess.run(["podman", "inspect", image], check=True, capture_output=True, text=True).stdout
    test: list[str] = json.loads(shown)[0]["Healthcheck"]["Test"]
    return test


def _settings(work: Path) -> dict[str, str]:
    """Podman's own folders, and limits that this machine can set."""
    for name in ("store", "run"):
        (work / name).mkdir(parents=True, exist_ok=True)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    (work / "containers.conf").write_text(
        f'[containers]\ncgroups = "disabled"\n'
        f'default_ulimits = ["nofile={files}:{files}", "nproc={_MOST_PROCESSES}:{_MOST_PROCESSES}"]\n'
        f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "crun"\n'
    )
    (work / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{work}/store"\nrunroot = "{work}/run"\n'
    )
    return {"CONTAINERS_CONF": f"{work}/containers.conf", "CONTAINERS_STORAGE_CONF": f"{work}/storage.conf"}
