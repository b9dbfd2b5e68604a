"""`python:FILE.py:function`: a scorer of the user's own, `function(answer, reference, row) -> 0..1`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tuneship.core.errors import DataError

PREFIX = "python:"


def load_own(name: str) -> Callable[[str, str, Mapping[str, Any]], float]:
    """The function that `name` means, in a module of its own.

    Raises:
        DataError: no such file or function, or the file fails when it is imported.

    """
    file, _, function = name.removeprefix(PREFIX).rpartition(":")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(f"tuneship_own_{path.stem}", path)
    if not file or not path.is_file() or spec is None or spec.loader is None:
        raise DataError(f"{name}: no such Python file", hint="write python:FILE.py:function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - the user's code may fail in any way
        raise DataError(f"{path} cannot be imported: {type(error).__name__}: {error}") from None
    own = getattr(module, function, None)
    if not callable(own):
        raise DataError(f"{path} has no function {function!r}")

    def score(answer: str, reference: str, extra: Mapping[str, Any]) -> float:
        try:
            value = float(own(answer, reference, extra))
        except Exception as error:  # noqa: BLE001
            raise DataError(f"{path}: {function} failed on {answer[:80]!r}: {type(error).__name__}: {error}") from None
        if not 0 <= value <= 1:
            raise DataError(f"{path}: {function} gave {value:g}, which is not in 0..1")
        return value

    return score
