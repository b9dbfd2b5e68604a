"""The images' locks hold what the tests run with, and all that the images' code imports."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from tuneship.core.model_source import BUNDLED_PACKAGE, BUNDLED_RELEASE

ROOT = Path(__file__).parents[3]
LOCKS = sorted((ROOT / "docker").glob("*.lock"))
ROOMS = {"train": ("tuneship", "train"), "serve": ("tuneship", "serve")}
_PIN = re.compile(r"^(?P<name>[a-z0-9._-]+)==(?P<pin>.+?)\s*\\?$", re.MULTILINE)
ELSEWHERE = {"unsloth", "unsloth_zoo", "llmcompressor", "compressed_tensors"}
"""Imported by programs that run in an environment of their own (train/elsewhere)."""
OPTIONAL = {"wandb", "tensorboard", "trackio", "mlflow", "docker"}
"""Said by name where it is missing."""


def pins(lock: Path) -> dict[str, set[str]]:
    """Each package's version with its markers; some packages have one for each platform."""
    found: dict[str, set[str]] = {}
    for match in _PIN.finditer(lock.read_text(encoding="utf-8")):
        found.setdefault(match["name"], set()).add(match["pin"])
    return found


def test_there_is_a_lock_for_each_role():
    assert [lock.stem for lock in LOCKS] == ["build", "serve", "train"]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_agrees_with_requirements_lock(lock: Path):
    all_versions = {
        name: {pin.partition(" ;")[0] for pin in each} for name, each in pins(ROOT / "requirements.lock").items()
    }
    for name, each in pins(lock).items():
        assert {pin.partition(" ;")[0] for pin in each} <= all_versions.get(name, set()), name


@pytest.mark.parametrize("lock", [ROOT / "requirements.lock", *LOCKS], ids=lambda lock: lock.stem)
def test_every_file_is_known_by_its_hash_and_by_no_address(lock: Path):
    text = lock.read_text(encoding="utf-8")
    assert text.count(" \\\n    --hash=sha256:") >= sum(map(len, pins(lock).values()))
    assert "://" not in text
    assert "--index" not in text.replace("--no-emit-index-url", "")


def test_the_versions_that_ran_on_a_gpu_are_in_the_images():
    pinned = re.findall(r'"((?:bitsandbytes|peft|sglang|torch|transformers|trl)==[^"]+)"', pyproject())
    locked = {name: each for lock in LOCKS for name, each in pins(lock).items()}
    assert len(pinned) == 6
    for name, _, version in (pin.partition("==") for pin in pinned):
        assert locked[name] == {version}


@pytest.mark.parametrize("role", ROOMS)
def test_what_a_room_imports_its_lock_installs(role: str):
    """Also the proof that an extra names what its room imports: the lock is made of the extra."""
    provided = metadata.packages_distributions()
    locked = pins(ROOT / "docker" / f"{role}.lock")
    wanted = imported(*ROOMS[role]) - ELSEWHERE - OPTIONAL - set(sys.stdlib_module_names) - {"tuneship"}
    assert {"pydantic", "torch"} <= wanted
    for module in sorted(wanted):
        packages = {re.sub(r"[-_.]+", "-", name).lower() for name in provided.get(module, [module])}
        assert packages & locked.keys(), f"{module} is imported in {role}/, and no package of {packages} is in its lock"


def imported(*folders: str) -> set[str]:
    """The top-level modules that the Python files below `folders` import, inside functions too."""
    found = set()
    for folder in folders:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    found.add(node.module.partition(".")[0])
    return found


def test_the_hint_names_the_release_that_was_tested():
    assert f'"{BUNDLED_PACKAGE}=={BUNDLED_RELEASE}"' in pyproject()


def test_the_pythons_that_the_lock_installs_on_are_named_alike_everywhere():
    """SGLang's outlines-core has no wheel for 3.13: pip looks for a Rust compiler there."""
    assert tomllib.loads(pyproject())["project"]["requires-python"] == ">=3.11,<3.13"
    assert "PYTHON_RANGE := >=3.11,<3.13\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"Python :: (3\.\d+)", pyproject())
    assert named == ["3.11", "3.12"]
    for file in ("README.md", "Makefile", ".ci/run", "docs/reference/cli.md"):
        assert "3.11 or 3.12" in (ROOT / file).read_text(encoding="utf-8"), file


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")
