"""What `tuneship verify` can tell apart with a given adapter, on a given base: the table of docs/decisions/0011-*.

    tuneship train recipes/quickstart.toml --run runs/a         # the adapter, with its evidence
    tuneship train recipes/triage.toml --run runs/b             # another one on the same base
    python bench/studies/verify_power.py bundled:smollm2-135m-instruct runs/a/artifacts/adapter-* \
        runs/b/artifacts/adapter-* -- --dtype bfloat16          # what follows -- goes to `tuneship serve`

One server serves the adapter as it was trained, with half and twice its alpha, and the other one. Each of them and the
base is held against the adapter's evidence. One line each: verdict, floor, deviation and limit in nats per token.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STRENGTHS = {"trained": 1.0, "half": 0.5, "double": 2.0}
SHOWN = ("verdict", "noise floor", "deviation", "limit", "power", "effect")


def main() -> None:
    """Serve the variants and verify each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("serve", nargs="*", help="after --")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, strength in STRENGTHS.items():
            write_variant(asked.adapter, work / "adapters" / name, strength)
        write_variant(asked.other, work / "adapters" / "other", 1.0)
        argv = ["serve", asked.base, "--adapters", str(work / "adapters"), "--name", "base", "--port", "0"]
        files = ["--endpoint-file", str(work / "endpoint.json"), "--log", str(work / "engine.log")]
        server = subprocess.Popen([sys.executable, "-m", "tuneship", *argv, *files, *asked.serve])
        try:
            url = wait_for(server, work / "endpoint.json")
            for name in (*STRENGTHS, "other", "base"):
                print(f"{name}: {verdict(asked.adapter, url, name)}", flush=True)
        finally:
            server.terminate()
            server.wait(60)


def write_variant(source: Path, path: Path, strength: float) -> None:
    """The adapter in `source` with another alpha, and without its evidence: the server itself asks no questions."""
    path.mkdir(parents=True)
    config = json.loads((source / "adapter_config.json").read_text())
    config["lora_alpha"] *= strength
    (path / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(source / "adapter_model.safetensors", path)


def wait_for(server: subprocess.Popen[bytes], file: Path) -> str:
    """The server's URL, once it answers."""
    while not file.exists():
        if server.poll() is not None:
            sys.exit("the server did not start")
        time.sleep(0.2)
    url: str = json.loads(file.read_text())["url"]
    return url


def verdict(adapter: Path, url: str, model: str) -> str:
    """What the verb says of `model`, in one line."""
    argv = [sys.executable, "-m", "tuneship", "verify", str(adapter), "--url", url, "--model", model, "--rows", "16"]
    said = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    lines = {line[:12].strip(): line[13:].strip() for line in said.splitlines()}
    return "; ".join(f"{name} {lines[name]}" for name in SHOWN)


if __name__ == "__main__":
    main()
