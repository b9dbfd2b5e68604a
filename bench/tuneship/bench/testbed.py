"""Where a figure was measured, and whether two figures were measured on the same thing."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from tuneship.bench.target import Target
from tuneship.core import hardware
from tuneship.core.report import Testbed

_PACKAGES = ("tuneship", "sglang", "torch", "transformers", "bitsandbytes", "aiohttp", "uvloop")
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
# What is served and where: two candidates differ in it and are comparable all the same. Keys belong in no report.
_NOT_THE_TESTBED = {
    "--model",
    "--model-path",
    "--tokenizer-path",
    "--served-model-name",
    "--lora-paths",
    "--chat-template",
    "--host",
    "--port",
    "--nccl-port",
    "--dist-init-addr",
    "--api-key",
    "--admin-api-key",
}


def describe(target: Target) -> Testbed:
    """This machine, the library versions, and the engine's flags where an `endpoint.json` tells them.

    A server elsewhere has hardware that we cannot see: its host stands in for it.
    """
    machine = hardware.detect()
    versions = hardware.versions(_PACKAGES)
    host = urlsplit(target.url).hostname or ""
    if host not in _LOOPBACK:
        here = f"client: {machine.cpu}, {machine.cores} cores"
        return Testbed.build(gpu=f"unknown, at {host}", cpu=here, driver="", versions=versions, flags=[])
    engine = target.endpoint.engine if target.endpoint else None
    return Testbed.build(
        gpu=machine.gpu,
        cpu=f"{machine.cpu}, {machine.cores} cores",
        driver=machine.driver,
        versions=versions | ({engine.name: engine.version} if engine else {}),
        flags=comparable_flags(engine.flags) if engine else [],
    )


def comparable_flags(argv: list[str]) -> list[str]:
    """The engine's flags with their values, sorted, without those that only say what is served and where."""
    return sorted(" ".join(group) for group in _groups(argv) if group[0] not in _NOT_THE_TESTBED)


def differences(a: Testbed, b: Testbed) -> list[str]:
    """What differs, such as `gpu: none / 1 x NVIDIA L4`; empty when figures can be compared."""
    if a.digest == b.digest:
        return []
    found = [
        f"{name}: {getattr(a, name) or 'none'} / {getattr(b, name) or 'none'}"
        for name in ("gpu", "cpu", "driver")
        if getattr(a, name) != getattr(b, name)
    ]
    found += [
        f"{name}: {a.versions.get(name, 'none')} / {b.versions.get(name, 'none')}"
        for name in sorted(a.versions.keys() | b.versions.keys())
        if a.versions.get(name) != b.versions.get(name)
    ]
    found += [f"{flag}: only one of the two" for flag in sorted(set(a.flags) ^ set(b.flags))]
    return found or [f"digest: {a.digest} / {b.digest}"]


def _groups(argv: list[str]) -> Iterator[list[str]]:
    """`--flag value value` and `--flag=value` as [flag, value...]; what comes before the first flag is dropped."""
    group: list[str] = []
    for word in argv:
        if word.startswith("--"):
            if group:
                yield group
            group = word.split("=", 1)
        elif group:
            group.append(word)
    if group:
        yield group
