"""The last lines of `up`: what was trained, where everything lies, and how to talk to it."""

from __future__ import annotations

import shlex

from rich.markup import escape

from tuneship.cli.console import out
from tuneship.cli.pipeline import Target
from tuneship.core.artifact import Artifact
from tuneship.core.endpoint import curl, read_endpoint
from tuneship.core.files import short
from tuneship.core.rundir import RunDir

_PORT = 30000
"""Of `tuneship serve`, unless it is told another."""


def show(run: RunDir, target: Target, adapter: Artifact) -> None:
    """Print them; the server's own address when it runs, else the command that starts it."""
    for name, text in _lines(run, target, adapter):
        out.print(f"[dim]{name:<8}[/]{escape(text)}", soft_wrap=True, highlight=False)  # whole lines, to be copied


def _lines(run: RunDir, target: Target, adapter: Artifact) -> list[tuple[str, str]]:
    manifest = adapter.manifest
    data = manifest.data
    assert data is not None, "an adapter that this run trained"
    trained = f"{data.rows:,} rows, {data.loss_tokens:,} tokens with loss, on {manifest.base.id}"
    lines = [("trained", trained), (manifest.kind, short(adapter.path))]
    if target.adapters is None and manifest.kind == "adapter":
        lines.append(("merged", short(target.model)))
    if run.endpoint.exists():
        url = read_endpoint(run.endpoint).url
    else:
        url = f"http://127.0.0.1:{_PORT}"
        lines.append(("serve", _serve_command(target)))
    return [*lines, ("ask", curl(url, manifest.name))]


def _serve_command(target: Target) -> str:
    adapters = ["--adapters", short(target.adapters)] if target.adapters else []
    return shlex.join(["tuneship", "serve", short(target.model), *adapters])
