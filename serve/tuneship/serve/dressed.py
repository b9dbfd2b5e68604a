"""A base that is served under another chat template than its own, such as that of a recipe for a model without one.

What is served is a folder of links to the base, with the template in it. So whoever reads a base from its folder (the
preflight, the door, SGLang) reads that template, and nobody has to be told of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tuneship.core import artifact, checkpoint
from tuneship.core.files import sha256_text
from tuneship.serve import scratch
from tuneship.serve.preflight import is_adapter

_OWN = (checkpoint.TEMPLATE_FILE, "chat_templates", "generation_config.json")


class Dress(NamedTuple):
    """A template (Jinja), and beside which log the folder is made."""

    template: str
    log: Path

    def version(self, base: str) -> str:
        """That of a `base` in it."""
        return dressed_version(base, self.template)

    def put_on(self, base: Path, adapters: Iterable[Path] = ()) -> Path:
        """The folder in which `base` has this template; its answers end where those of `adapters` do too."""
        folder = scratch.fresh(self.log, "base")
        for file in base.iterdir():
            if file.name not in _OWN:
                (folder / file.name).symlink_to(file.absolute())
        (folder / checkpoint.TEMPLATE_FILE).write_text(self.template, encoding="utf-8")
        settings = base / "generation_config.json"
        written = json.loads(settings.read_bytes()) if settings.is_file() else {}
        ends = [*checkpoint.end_token_ids(base), *(end for path in adapters for end in _ends(path))]
        if ends:
            written["eos_token_id"] = list(dict.fromkeys(ends))
        (folder / settings.name).write_text(json.dumps(written, indent=1), encoding="utf-8")
        return folder

    def take_off(self) -> None:
        """Remove the folder."""
        shutil.rmtree(scratch.folder(self.log, "base"), ignore_errors=True)


def dressed_version(base: str, template: str) -> str:
    """Which version `base` (NAME@id) is under `template`: twelve hex digits, as every version has."""
    return sha256_text(f"{base}\n{template}")[:12]


@contextmanager
def dress(template: str, log: Path) -> Iterator[Dress | None]:
    """That of a server with this `template`, and the folder's end; None where it is empty."""
    wanted = Dress(template, log) if template else None
    try:
        yield wanted
    finally:
        if wanted:
            wanted.take_off()


def _ends(path: Path) -> tuple[int, ...]:
    known = is_adapter(path) and artifact.is_artifact(path)
    return artifact.read_manifest(path).end_token_ids if known else ()
