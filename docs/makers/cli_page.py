"""docs/reference/cli.md: every verb, as cyclopts writes its own help in Markdown."""

from __future__ import annotations

from tuneship.cli.app import app
from tuneship.core.errors import ExitCode

_HEAD = """\
# The command line

Made by `make reference` from what `--help` of each verb says; not written by hand. Verbs that read a recipe (`up`,
`train`, `plan`, `data`, `bench train`) also take any key of it: `--lora.rank 8 --train.steps 20` ([keys](recipe.md)).
Data goes to stdout, everything else to stderr.

| exit code | |
|---|---|
"""
_CODES = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "it failed; `error:` says what, `hint:` what to do ([every message](../troubleshooting.md))",
    ExitCode.USAGE: "the command or the recipe makes no sense",
    ExitCode.CANNOT_TELL: "`bench compare` cannot tell whether the candidate is worse",
    ExitCode.RESUMABLE: "training was told to stop and can go on: `--resume`",
    ExitCode.INTERRUPTED: "Ctrl-C",
}


def page() -> str:
    """The page, as Markdown."""
    codes = "\n".join(f"| {code.value} | {_CODES[code]} |" for code in ExitCode)
    _, _, verbs = app.generate_docs(output_format="markdown", recursive=True).partition("## tuneship up")
    lines = f"## tuneship up{verbs}".splitlines()
    return f"{_HEAD}{codes}\n\n" + "\n".join(_without_html(lines)) + "\n"


def _without_html(lines: list[str]) -> list[str]:
    """`<name>` is a placeholder, and Markdown would take it for HTML."""
    return [line.rstrip().replace("<", "&lt;") for line in lines]
