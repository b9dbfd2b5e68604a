# /// script
# requires-python = ">=3.11"
# dependencies = ["pyte==0.8.2", "rich>=14"]
# ///
"""The pictures of the README, of real runs: `make images`, some 20 minutes on two cores without a GPU.

    up      `tuneship up recipes/quickstart.toml` in a terminal of 110 columns -> docs/images/terminal.svg
    report  the report that it wrote, in chromium                             -> docs/images/report.png
    top     a server with its adapter and one of recipes/triage.toml, under load -> docs/images/top.svg

Names on the command line choose some of them. All is recorded anew, in /tmp/tuneship, a path that pictures may show;
the converted model in its cache stays. Wants chromium and a font (Debian: chromium, fonts-liberation).
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import terminal

ROOT = Path(__file__).parents[2]
WORK = Path("/tmp/tuneship")  # noqa: S108 - short, and of no machine in particular
IMAGES = ROOT / "docs" / "images"
TUNESHIP = ROOT / ".venv" / "bin" / "tuneship"

COLUMNS = 110
QUICKSTART = ["up", "recipes/quickstart.toml"]
TRIAGE = ["train", "recipes/triage.toml", "--train.steps", "12"]
BASE = "bundled:smollm2-135m-instruct"
ADAPTERS = "--adapters runs/invoice-json --adapters runs/triage"
PORT = 30507
URL = f"http://127.0.0.1:{PORT}"
SERVE = f"serve {BASE} --quantization dequantized {ADAPTERS} --port {PORT} --state state".split()
LOAD = f"bench load {URL} --model invoice-json,triage --adapters invoice-json=3,triage=1 --out load".split()
LEVEL = ["--rates", "0.8", "--duration-s", "75", "--input-tokens", "48", "--output-tokens", "16"]
TOP_S = 70
"""Its figures are of the last minute."""

# A page of 1,000 CSS pixels at 1.6 times as many: sharp where a README shows it 900 wide.
PAGE = {"width": 1000, "height": 1130, "scale": 1.6}
CUT = "<style>.example ~ *, #heldout { display: none } section { margin-top: 40px }</style>"
"""From headline to charts on one screen: of the answers the first, and no table of held-out text."""
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]


def main() -> None:
    """Make those that are named, or all."""
    chosen = sys.argv[1:] or ["up", "report", "top"]
    WORK.mkdir(mode=0o700, exist_ok=True)
    if WORK.stat().st_uid != os.getuid():
        sys.exit(f"error: {WORK} is somebody else's")
    for before in ("runs", "state", "load"):
        shutil.rmtree(WORK / before, ignore_errors=True)
    for cast in WORK.glob("*.cast"):
        cast.unlink()
    IMAGES.mkdir(exist_ok=True)
    recipes = WORK / "recipes"  # the commands are typed as in a checkout; their runs lie apart
    if not recipes.is_symlink():
        recipes.symlink_to(ROOT / "recipes")
    os.environ["TUNESHIP_CACHE"] = str(WORK / "cache")  # as on the first day
    for name in chosen:
        {"up": up, "report": report, "top": top}[name]()


def up() -> None:
    """The whole way in a terminal."""
    cast = _quickstart()
    _write("terminal.svg", terminal.picture(cast, "tuneship", f"tuneship {' '.join(QUICKSTART)}"))


def report() -> None:
    """Its report from the top, cut to one screen."""
    _quickstart()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("error: no chromium on this machine\n\nhint: Debian: apt install chromium fonts-liberation")
    file = IMAGES / "report.png"
    with tempfile.TemporaryDirectory() as profile:
        shot = [f"--user-data-dir={profile}", f"--screenshot={file}", "--virtual-time-budget=20000"]
        size = [f"--window-size={PAGE['width']},{PAGE['height']}", f"--force-device-scale-factor={PAGE['scale']}"]
        page = Path(profile) / "report.html"
        whole = (WORK / "runs/invoice-json/report.html").read_text(encoding="utf-8")
        page.write_text(whole.replace("</head>", f"{CUT}</head>"), encoding="utf-8")
        command = [browser, *BROWSER, *QUIET, *shot, *size, page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    _say(file)


def top() -> None:
    """A busy server on one screen."""
    _quickstart()
    subprocess.run([TUNESHIP, *TRIAGE], cwd=WORK, check=True)
    cast = WORK / "top.cast"
    with (WORK / "serve.log").open("w") as log, contextlib.ExitStack() as stack:
        server = subprocess.Popen([TUNESHIP, *SERVE], cwd=WORK, stdout=log, stderr=log)
        stack.callback(_end, server)
        _wait(server)
        load = subprocess.Popen([TUNESHIP, *LOAD, *LEVEL], cwd=WORK, stdout=log, stderr=log)
        stack.callback(_end, load)
        terminal.record([str(TUNESHIP), "top", "--url", URL], cast, WORK, COLUMNS, seconds=TOP_S)
    _write("top.svg", terminal.picture(cast, "tuneship top", "tuneship top"))


def _quickstart() -> Path:
    cast = WORK / "up.cast"
    if not cast.is_file():
        terminal.record([str(TUNESHIP), *QUICKSTART], cast, WORK, COLUMNS)
    return cast


def _wait(server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if server.poll() is not None:
            sys.exit(f"error: the server ended: see {WORK / 'serve.log'}")
        door = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
        try:
            door.request("GET", "/ready")
            if door.getresponse().status == http.client.OK:
                return
        except OSError:
            pass
        finally:
            door.close()
        time.sleep(1)
    sys.exit("error: the server is not ready after 10 minutes")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(120)


def _write(name: str, svg: str) -> None:
    (IMAGES / name).write_text(svg, encoding="utf-8")
    _say(IMAGES / name)


def _say(file: Path) -> None:
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
