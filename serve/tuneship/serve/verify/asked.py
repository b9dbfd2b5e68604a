"""What a server is asked about: which artifact of a run, and under which name.

A name that clients use leads from one version to the next, and to several while there is a canary. So an adapter is
asked for as `NAME@id`, whoever answers to NAME at the moment.
"""

from __future__ import annotations

from pathlib import Path

from tuneship.core import rundir
from tuneship.core.artifact import Artifact
from tuneship.core.errors import ArtifactError, EndpointError
from tuneship.core.quoting import on_one_line, quoted
from tuneship.serve import running
from tuneship.serve.dressed import dressed_version
from tuneship.serve.verify.door import DoorScorer, Served


def of_run(path: Path, scorer: DoorScorer, served: Served) -> Path:
    """Of a run the merged model, where the server was started with it, else what was trained; other paths as they are.

    Raises:
        ArtifactError: neither is there any more.

    """
    if not rundir.RunDir(path).state().stages:
        return path
    merged, trained = rundir.made(path, "merge"), rundir.made(path, "train")
    if merged != path:
        is_served = _id(scorer.listed[served.base]) == merged.name.rpartition("-")[2]
        if is_served or trained == path:
            return merged
    if trained == path:
        raise ArtifactError(
            f"what the run {path} trained is not there any more", hint=f"tuneship train RECIPE --run {path}"
        )
    return trained


async def name_of(opened: Artifact | None, path: Path, scorer: DoorScorer, served: Served) -> str:
    """The name under which exactly this model is asked for; of one without a manifest that of its folder.

    Raises:
        EndpointError: the server has another version of it, or none.

    """
    if opened is None:
        return known(path.name, scorer, served)
    if opened.manifest.kind != "adapter":
        return served.base
    name = opened.manifest.name or path.name
    # Its own name last where it is not listed: a key for other models may not ask for it.
    for alias in sorted(dict.fromkeys((name, *served.adapters)), key=lambda each: each not in served.adapters):
        if await scorer.knows(f"{alias}@{opened.id12}"):
            return f"{alias}@{opened.id12}"
    known(name, scorer, served, load=path)
    raise EndpointError(
        f"{scorer.url} answers {quoted(name)} with {scorer.listed.get(name, 'another version')}, "
        f"and {on_one_line(name)}@{opened.id12} is not loaded there",
        hint=f"tuneship adapters load {path} --alias {on_one_line(name)} puts it beside that one"
        if name in served.adapters
        else "that is a model of its own: verify its folder, or serve its base with --adapters",
    )


def known(model: str, scorer: DoorScorer, served: Served, load: Path | None = None) -> str:
    """`model`, if it or the alias of that version is served.

    Raises:
        EndpointError: it is not.

    """
    if model.partition("@")[0] in (served.base, *served.adapters):
        return model
    listed, way = ", ".join((served.base, *served.adapters)), ""
    if load:
        takes = served.adapters or running.mode(scorer.url) == "adapters"
        way = f"tuneship adapters load {load}, or " if takes else f"serve its base with --adapters {load}, or "
    raise EndpointError(f"{scorer.url} serves no model {quoted(model)}", hint=f"{way}say which with --model: {listed}")


def others(model: str, scorer: DoorScorer, served: Served) -> dict[str, str]:
    """{version: version} of the adapters beside `model`, the live one of its own alias among them where it is another.

    They are what may answer in its place.
    """
    asked = scorer.listed.get(model, model)
    versions = [scorer.listed[name] or name for name in served.adapters if name != model]
    return {version: version for version in versions if version != asked}


def on_own_base(opened: Artifact | None, scorer: DoorScorer, served: Served) -> bool:
    """Whether the server's base is the one of training, by its hash; also under the template of training."""
    if opened is None:
        return False
    plain = f"{served.base}@{opened.manifest.base.weights_sha256[:12]}"
    under_template = dressed_version(plain, opened.manifest.template.text)
    return _id(scorer.listed[served.base]) in {_id(plain), under_template}


def _id(version: str) -> str:
    return version.rpartition("@")[2]
