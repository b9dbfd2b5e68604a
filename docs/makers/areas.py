"""Where a message of the page on errors stands: by the file that raises it, in the order in which a run meets them."""

from __future__ import annotations

from typing import NamedTuple


class Area(NamedTuple):
    """A section. `about` is Markdown; where it `is_enough`, a message of it needs no hint of its own."""

    title: str
    about: str
    places: tuple[str, ...]
    is_enough: bool = False


_CORE, _CLI = "tuneship/core/", "tuneship/cli/"
_TRAIN, _SERVE, _BENCH = "train/tuneship/train/", "serve/tuneship/serve/", "bench/tuneship/bench/"

AREAS = (
    Area(
        "The recipe",
        "Each names the keys that do not go together, and stands behind the file and the table: "
        "`recipe.toml: in [train]: ...`. Change one of the keys ([all of them](reference/recipe.md)).",
        (f"{_CORE}recipe", f"{_CORE}chat_templates.py", f"{_CLI}overrides.py", f"{_SERVE}adapters_commands.py"),
        is_enough=True,
    ),
    Area(
        "The machine and what is installed",
        "`tuneship doctor` looks at all of it at once.",
        (f"{_CLI}doctor.py", f"{_CLI}failures.py", f"{_CORE}extras.py", f"{_CORE}rundir.py"),
    ),
    Area(
        "Rows",
        "What is wrong with one row stands behind its file and line. Mend the row, or leave such rows out with "
        '`data.on_bad_row = "skip"`; `tuneship data check RECIPE` counts them all by reason before anything is loaded, '
        "`tuneship data show RECIPE` prints what a row becomes.",
        (f"{_TRAIN}data/", f"{_CORE}data_source.py", f"{_CLI}data.py"),
        is_enough=True,
    ),
    Area(
        "Models, artifacts and files",
        "An artifact is never changed. One that was is made again by the command that made it (`tuneship up`, `train` "
        "and `merge` look at the bytes of what they made before), or restored from a copy.",
        (
            *(f"{_CORE}{name}.py" for name in ("artifact", "checkpoint", "model_source", "parity", "versioned")),
            *(f"{_TRAIN}{name}.py" for name in ("fetch", "model", "base", "commands")),
            *(f"{_SERVE}{name}.py" for name in ("catalog", "tensors")),
            f"{_CLI}up.py",
            f"{_CLI}settling.py",
        ),
    ),
    Area(
        "What does not fit",
        "Said before anything is loaded. `tuneship plan RECIPE` prints the figures; the hint names what would fit.",
        (f"{_TRAIN}planning/", *(f"{_SERVE}{name}.py" for name in ("choice", "footprint", "plan"))),
        is_enough=True,
    ),
    Area(
        "Training",
        "What a library raised is printed as one line, `train: ...`; all of it is in the log that the hint names.",
        (
            *(f"{_TRAIN}{name}" for name in ("fitting/", "stages.py", "speed.py", "elsewhere/own", "elsewhere/uns")),
            f"{_CORE}stage.py",
        ),
    ),
    Area(
        "Merging",
        "The adapter is as it was: merge again with `tuneship merge RUN`, or serve it as an adapter.",
        (f"{_TRAIN}merging/", f"{_TRAIN}elsewhere/compress.py"),
    ),
    Area(
        "An adapter or a base that cannot be served",
        "Messages that begin with a verb go on from `adapter 'NAME'`; all reasons are named at once. What SGLang would "
        "misread is refused before a server starts ([why](sglang-gaps.md)).",
        (
            f"{_SERVE}preflight/",
            *(f"{_SERVE}{name}.py" for name in ("packed", "quantized", "startable")),
            f"{_CORE}servable.py",
        ),
    ),
    Area(
        "What `verify` says",
        "Of an adapter when it is loaded, of a merged model when it starts, and of `tuneship verify`. What failed "
        "gets no request; `cannot tell` is no fault ([how it is measured](how-it-works.md)).",
        (f"{_SERVE}verify/",),
    ),
    Area(
        "Versions and aliases",
        "`tuneship adapters list` shows every version and its state, `tuneship adapters history` who changed what.",
        tuple(
            f"{_SERVE}{name}"
            for name in (
                *("registry/", "deploy.py", "store.py", "running.py", "admin_client.py", "engine_adapters.py"),
                *("state.py", "kept_evidence.py", "judging.py"),
            )
        ),
    ),
    Area(
        "The server",
        "The engine's log is named when the server starts. While the engine is started again the door answers 503 with "
        "`Retry-After`.",
        (
            *(f"{_SERVE}{name}.py" for name in ("engine", "supervisor", "upstream", "server", "commands")),
            *(f"{_SERVE}{name}.py" for name in ("guard", "keys")),
            f"{_CORE}endpoint.py",
        ),
    ),
    Area(
        "What a client of the door gets",
        'In OpenAI\'s form: `{"error": {"message", "type", "param", "code"}}`, with the status and code below. 4xx: '
        "the request has to be changed. 429, 503: the same request later (`Retry-After`). 500, 502, 504: the engine's "
        "log.",
        tuple(
            f"{_SERVE}{name}.py" for name in ("bodies", "bounds", "calls", "gateway", "protocol", "refusals", "scoring")
        ),
        is_enough=True,
    ),
    Area(
        "A task's rows, prompts and scorers",
        "What is wrong stands behind its file and line: mend it there. It is looked for before a model is asked; a "
        "reference answer has to score 1 against itself.",
        (
            f"{_BENCH}quality/tasks/",
            f"{_BENCH}quality/evaluate.py",
            f"{_BENCH}load/prompts.py",
            f"{_BENCH}load/arrivals.py",
        ),
        is_enough=True,
    ),
    Area(
        "Measuring",
        "A bench needs a URL and nothing else. What was measured before a failure is kept in its folder.",
        (f"{_BENCH}load/", f"{_BENCH}quality/", f"{_BENCH}commands.py", f"{_BENCH}target.py", f"{_CORE}report.py"),
    ),
    Area("Comparing", "See [the gate](jobs/gate.md).", (f"{_BENCH}compare/",)),
    Area("Containers", "See [in containers](docker.md).", (f"{_CLI}containers/",)),
)


def area_of(place: str) -> Area:
    """The first whose files `place` is of.

    Raises:
        LookupError: none.

    """
    found = next((area for area in AREAS if place.startswith(area.places)), None)
    if found is None:
        raise LookupError(f"{place} raises an error and is in no area of docs/makers/areas.py")
    return found


def shown_in(place: str, kind: str) -> Area:
    """Where a message is shown: an answer over HTTP with its like, whoever gives it."""
    return area_of(f"{_SERVE}refusals.py" if kind[0].isdigit() else place)
