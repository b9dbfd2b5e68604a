"""The engine behind `DOCKER_HOST` (by default the local one), through the `docker` SDK (the extra `docker`)."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from tuneship.cli.console import talk
from tuneship.cli.containers.words import Bind, Build, Run
from tuneship.core.errors import TuneshipError


def build(wanted: Build) -> None:
    """Build an image; the builder's words go to stderr.

    Raises:
        TuneshipError: no SDK, no engine, or a step failed.

    """
    with _client() as api:
        for event in api.build(**wanted.arguments(), rm=True, forcerm=True, decode=True):
            if "error" in event:
                raise TuneshipError(f"{wanted.tag} was not built: {event['error'].strip()}")
            talk.out(event.get("stream", ""), end="", highlight=False)


def run(wanted: Run) -> int:
    """Run a container to its end, what it prints passed on; its exit code. However this is left, it is gone.

    Only in the main thread: signals are passed on, too.

    Raises:
        TuneshipError: no SDK, no engine, no such image, or it could not be started.

    """
    with _client() as api:
        container = _create(api, wanted)
        try:
            api.start(container)
            with _signals_to(api, container):
                for out, talked in api.attach(container, stream=True, logs=True, demux=True):
                    _pass_on(sys.stdout, out)
                    _pass_on(sys.stderr, talked)
                return int(api.wait(container)["StatusCode"])
        finally:
            api.remove_container(container, force=True)


def _create(api: Any, wanted: Run) -> str:
    errors = sdk().errors
    arguments = wanted.arguments()
    try:
        host_config = api.create_host_config(**_in_the_sdks_types(arguments.pop("host_config")))
        return str(api.create_container(**arguments, host_config=host_config)["Id"])
    except errors.ImageNotFound:
        role = wanted.image.removeprefix("tuneship-")
        raise TuneshipError(f"there is no image {wanted.image}", hint=f"tuneship docker build {role}") from None


def _in_the_sdks_types(host_config: dict[str, Any]) -> dict[str, Any]:
    types = sdk().types
    binds: tuple[Bind, ...] = host_config.pop("binds")
    gpus = host_config.pop("gpus")
    requests = []
    if gpus != "none":
        which = {"count": -1} if gpus == "all" else {"device_ids": list(gpus)}
        requests.append(types.DeviceRequest(**which, capabilities=[["gpu"]]))
    mounts = [types.Mount(str(path), str(path), type="bind", read_only=read_only) for path, read_only in binds]
    return {**host_config, "mounts": mounts, "device_requests": requests or None}


@contextlib.contextmanager
def _signals_to(api: Any, container: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to the container, as with `docker run`: it ends by itself, and says its last words."""

    def forward(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(sdk().errors.APIError):  # it has ended meanwhile
            api.kill(container, signal=number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(stream: Any, words: bytes | None) -> None:
    if words:
        stream.write(words.decode(errors="replace"))
        stream.flush()


@contextlib.contextmanager
def _client() -> Iterator[Any]:
    """The API of the engine.

    What it answers with an error is said without a traceback.
    """
    found = sdk()
    try:
        with contextlib.closing(found.from_env()) as client:
            client.ping()
            yield client.api
    except found.errors.APIError as error:
        raise TuneshipError(f"the Docker engine refuses: {error.explanation or error}") from error
    except found.errors.DockerException as error:
        hint = "is it running, and may you use it (DOCKER_HOST)? --dry-run prints the plain command and needs neither"
        raise TuneshipError(f"no Docker engine answers: {error}", hint=hint) from error


def sdk() -> Any:
    """The SDK.

    Without it a bare `import docker` still succeeds in this repository, and brings the folder `docker/`.
    """
    with contextlib.suppress(ModuleNotFoundError):
        sdk = importlib.import_module("docker")
        if hasattr(sdk, "from_env"):
            return sdk
    raise TuneshipError(
        "this verb needs the docker SDK",
        hint="pip install 'tuneship[docker]'; or run the command that is printed above",
    )
