"""`tuneship verify`."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import Parameter
from cyclopts.validators import Number

if TYPE_CHECKING:
    from tuneship.core.artifact import Artifact
    from tuneship.serve.verify.statistics import Spread
    from tuneship.serve.verify.verdict import Verdict


class _Asked(NamedTuple):
    """A verdict, and what it is about."""

    model: str
    version: str
    verdict: Verdict


def verify(
    artifact: Path,
    *,
    url: str = "",
    model: str = "",
    rows: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    key_env: str = "",
    record: bool = False,
) -> None:
    """Prove that what a server answers with is what was trained: exit 0 proven, 1 it is not, 3 cannot tell.

    Its held-out rows are replayed through the server; nothing is generated.

    Parameters
    ----------
    artifact
        The directory of an adapter or a merged checkpoint, or of the run that made them: of these the one that is
        served. An adapter without evidence is only seen to be applied.
    url
        The server; without it, the only one that runs here.
    model
        What the server calls it. Default: of an adapter exactly this version, NAME@id, whichever one is live; of a
        merged model what the server was started with.
    rows
        Held-out rows at most, 0 is all of them.
    key_env
        The environment variable that holds an API key.
    record
        Keep the verdict in the artifact's evidence.

    """
    from tuneship.core import artifact as artifacts  # noqa: PLC0415 - `--help` starts without all of this
    from tuneship.core.endpoint import key_in  # noqa: PLC0415
    from tuneship.core.errors import ExitCode  # noqa: PLC0415
    from tuneship.core.progress import say  # noqa: PLC0415

    url, key = url or _only_server(), key_in(key_env)
    opened, asked = asyncio.run(_ask(artifact, url, model, rows or sys.maxsize, key, record=record))
    _show(asked)
    if record and opened:
        say(f"recorded in {artifacts.add_evidence(opened, 'verify', _record(asked))}")
    if opened and not asked.verdict.passed and not asked.version.endswith(f"@{opened.id12}"):
        say(f"{asked.version} answered, not {opened.id12}: --model NAME@{opened.id12} asks this one, if it is loaded")
    asked.verdict.require()
    if not asked.verdict.passed:
        say(f"{asked.verdict.outcome}: {asked.verdict.message}")
        if asked.verdict.hint:
            say(f"hint: {asked.verdict.hint}")
        sys.exit(ExitCode.CANNOT_TELL)


async def _ask(
    path: Path, url: str, model: str, rows: int, key: str, *, record: bool
) -> tuple[Artifact | None, _Asked]:
    from tuneship.core import artifact as artifacts  # noqa: PLC0415
    from tuneship.core.errors import ArtifactError  # noqa: PLC0415
    from tuneship.serve import verify as face  # noqa: PLC0415
    from tuneship.serve.verify import asked  # noqa: PLC0415
    from tuneship.serve.verify.door import DoorScorer  # noqa: PLC0415

    async with DoorScorer(url, key) as scorer:
        served = await scorer.served()
        path = asked.of_run(path, scorer, served)
        opened = artifacts.open_artifact(path) if artifacts.is_artifact(path) else None
        if record and not opened:
            raise ArtifactError(f"{path} has no {artifacts.MANIFEST}: there is no evidence to add to")
        evidence = path / artifacts.EVIDENCE
        reference = face.read_evidence(evidence, face.Budget(rows, sys.maxsize, sys.maxsize))
        if model:
            asked.known(model, scorer, served)
        else:
            model = await asked.name_of(opened, path, scorer, served)
        if opened and opened.manifest.kind != "adapter":
            left = face.read_deferred(evidence)
            verdict = await face.verify_merged(scorer, reference, selector=model, left=left)
        else:
            beside, own_base = asked.others(model, scorer, served), asked.on_own_base(opened, scorer, served)
            verdict = await face.verify(scorer, model, reference, others=beside, own_base=own_base)
        return opened, _Asked(model, scorer.versions.get(model, ""), verdict)


def _only_server() -> str:
    from tuneship.serve import running  # noqa: PLC0415

    return running.find().url


def _show(asked: _Asked) -> None:
    from tuneship.serve.verify.verdict import Outcome  # noqa: PLC0415

    verdict = asked.verdict
    lines = {
        "model": asked.model,
        "version": asked.version,
        "verdict": f"{verdict.outcome} ({verdict.fault})" if verdict.fault else str(verdict.outcome),
    }
    if verdict.outcome is not Outcome.NO_EVIDENCE:  # else there is nothing to measure against
        lines |= {
            "rows": f"{verdict.rows}, {verdict.tokens} tokens",
            "prompts": f"{verdict.prompts} rendered as in training" if verdict.prompts else "not compared",
            "noise floor": _nats(verdict.noise_floor),
            "deviation": _nats(verdict.deviation),
            "limit": _nats(verdict.limit),
            "power": f"the base is {verdict.power:.1f} limits away",
            "effect": "" if verdict.scale is None else f"{verdict.scale:.3f} of what training did",
        }
    for name, value in lines.items():
        print(f"{name:<12} {value}")


def _nats(spread: Spread) -> str:
    return f"{spread.mean:.4f} nats per token, 0.95 quantile {spread.high:.4f}"


def _record(asked: _Asked) -> str:
    from tuneship.core.parity import Verification  # noqa: PLC0415

    verdict = asked.verdict
    return Verification(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        model=asked.model,
        version=asked.version,
        outcome=verdict.outcome,
        fault=verdict.fault,
        message=verdict.message,
        rows=verdict.rows,
        tokens=verdict.tokens,
        prompts=verdict.prompts,
        noise_floor=verdict.noise_floor._asdict(),
        deviation=verdict.deviation._asdict(),
        limit=verdict.limit._asdict(),
        power=verdict.power,
        scale=verdict.scale,
    ).model_dump_json(indent=1, by_alias=True)
