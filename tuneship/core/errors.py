"""What can go wrong, as types.

    TuneshipError
    ├── RecipeError       a key or value in the recipe
    ├── DataError         a row, a file, a format
    ├── PlanError         it does not fit this machine
    ├── TrainError        the run itself (NaN, out of memory)
    ├── Checkpointed      training was told to stop, and can go on
    ├── ArtifactError     missing, changed, or made for another base
    ├── ParityError       what was merged is not what was trained
    ├── PreflightError    this adapter cannot be served here
    ├── RegistryError     a version that is not there, or in no state for what is asked
    ├── EngineError       SGLang did not start, died, or hung
    ├── EndpointError     a URL that does not answer as it should
    ├── StageError        a stage's process ended without saying why
    └── RegressionFound   slower or worse than the baseline

Each carries a `message` (what happened, in one sentence) and a `hint` (what to do about it). They are expected: the
command line prints them without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a shell or a CI job sees."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CANNOT_TELL = 3
    RESUMABLE = 75
    INTERRUPTED = 130


class TuneshipError(Exception):
    """An expected failure: printed as `error:` and `hint:`, never as a traceback."""

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(TuneshipError):
    """The recipe cannot be read, or says something that makes no sense."""

    exit_code = ExitCode.USAGE


class DataError(TuneshipError):
    """The training or held-out data cannot be used as it is."""


class PlanError(TuneshipError):
    """The run does not fit this machine."""


class TrainError(TuneshipError):
    """Training itself failed."""


class Checkpointed(TuneshipError):
    """Training was told to stop: what it had learnt is kept, and `--resume` goes on from there."""

    exit_code = ExitCode.RESUMABLE


class ArtifactError(TuneshipError):
    """An artifact is missing, was changed after it was written, or belongs to another base."""


class ParityError(TuneshipError):
    """The model to be served is not the model that was trained."""


class PreflightError(TuneshipError):
    """This adapter cannot be served on this base, or on this server."""


class RegistryError(TuneshipError):
    """The registry of served versions refuses: no such version, a state that does not allow it, no way to write."""


class EngineError(TuneshipError):
    """SGLang did not start, died, or stopped answering."""


class EndpointError(TuneshipError):
    """A URL does not answer as an OpenAI-compatible endpoint should."""


class StageError(TuneshipError):
    """A stage's process ended without a report of its own: a crash, or the kernel ended it."""


class RegressionFound(TuneshipError):
    """The candidate is slower or worse than the baseline by more than the margin."""


def by_name(name: str) -> type[TuneshipError]:
    """The error class called `name`, so that a child process's failure can be raised again in its parent."""
    known = {cls.__name__: cls for cls in TuneshipError.__subclasses__()}
    return known.get(name, TuneshipError)
