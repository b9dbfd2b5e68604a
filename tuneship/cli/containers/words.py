"""What `tuneship docker` asks of an engine, as data: its words on a command line, and its arguments for the SDK.

shlex.join(run.words())     # docker run --rm ... tuneship-serve serve ...
run.arguments()             # the same for create_container, but for --rm
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

Role = Literal["train", "serve"]
PORT = 30000
"""Of the door inside the image: its health check asks there."""
STOP_S = 60
"""From SIGTERM to SIGKILL: a server drains for 30 s and closes, a training writes a checkpoint."""
SHM_BYTES = 8 * 2**30


class Build(NamedTuple):
    """An image to be built. `base` empty: the Dockerfile's own."""

    role: Role
    context: Path
    tag: str
    base: str = ""

    @property
    def dockerfile(self) -> Path:
        """Below the context."""
        return Path("docker") / f"{self.role}.Dockerfile"

    def words(self) -> list[str]:
        """The plain command."""
        base = ["--build-arg", f"BASE={self.base}"] if self.base else []
        file = ["--file", str(self.context / self.dockerfile)]
        return ["docker", "build", *file, "--tag", self.tag, *base, str(self.context)]

    def arguments(self) -> dict[str, Any]:
        """For the SDK's `APIClient.build`."""
        return {
            "path": str(self.context),
            "dockerfile": str(self.dockerfile),
            "tag": self.tag,
            "buildargs": {"BASE": self.base} if self.base else {},
        }


class Bind(NamedTuple):
    """A folder of this machine, at the same path inside."""

    path: Path
    read_only: bool

    def word(self) -> str:
        """For `--mount`, which is a line of CSV."""
        line = io.StringIO()
        ends = (f"source={self.path}", f"target={self.path}", *(["readonly"] if self.read_only else []))
        csv.writer(line, lineterminator="").writerow(("type=bind", *ends))
        return line.getvalue()


class Run(NamedTuple):
    """A container to be run in the foreground and removed at its end."""

    image: str
    command: tuple[str, ...]
    user: str
    folder: Path
    binds: tuple[Bind, ...]
    settings: Mapping[str, str]
    """Environment variables with their values."""
    passed: tuple[str, ...]
    """Environment variables that the caller has, by name."""
    publish: tuple[str, int] | None
    """Address and port of this machine for the door."""
    gpus: str | tuple[str, ...]
    """none, all, or ids."""

    def words(self) -> list[str]:
        """The plain command."""
        return [
            *("docker", "run", "--rm", "--init", "--user", self.user, "--workdir", str(self.folder)),
            *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--shm-size", str(SHM_BYTES), "--stop-timeout", str(STOP_S)),
            *(["--gpus", _gpus_word(self.gpus)] if self.gpus != "none" else []),
            *(["--publish", f"{published(self.publish)}:{PORT}"] if self.publish else []),
            *(word for bind in self.binds for word in ("--mount", bind.word())),
            *(word for name, value in self.settings.items() for word in ("--env", f"{name}={value}")),
            *(word for name in self.passed for word in ("--env", name)),
            self.image,
            *self.command,
        ]

    def arguments(self) -> dict[str, Any]:
        """For `APIClient.create_container`; `host_config` is for `create_host_config`."""
        environment = {**self.settings, **{name: os.environ[name] for name in self.passed}}
        return {
            "image": self.image,
            "command": list(self.command),
            "user": self.user,
            "working_dir": str(self.folder),
            "environment": environment,
            "ports": [PORT] if self.publish else None,
            "stop_timeout": STOP_S,
            "host_config": {
                "init": True,
                "cap_drop": ["ALL"],
                "security_opt": ["no-new-privileges"],
                "shm_size": SHM_BYTES,
                "port_bindings": {PORT: self.publish} if self.publish else None,
                "binds": self.binds,
                "gpus": self.gpus,
            },
        }


def _gpus_word(gpus: str | tuple[str, ...]) -> str:
    return gpus if isinstance(gpus, str) else f'"device={",".join(gpus)}"'


def published(place: tuple[str, int]) -> str:
    """Address and port in one word."""
    address, port = place
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
