"""What is said of a library that is not installed; in a real empty environment: tests/unit/shipping/test_wheel.py."""

from __future__ import annotations

import pytest

from tuneship.core import extras
from tuneship.core.errors import TuneshipError

LIBRARY = "no_library_of_this_name"


def missing_in(*modules: str, library: str = LIBRARY) -> ModuleNotFoundError:
    """The error of an import in the last of `modules`, each of which calls the next."""
    code = f"def go():\n    import {library}"
    functions: list = []
    for module in reversed(modules):
        space = {"__name__": module, "then": functions[-1] if functions else None}
        exec(code if not functions else "def go():\n    then()", space)
        functions.append(space["go"])
    with pytest.raises(ModuleNotFoundError) as caught:
        functions[-1]()
    return caught.value


@pytest.mark.parametrize(
    ("modules", "room"),
    [
        (("tuneship.cli.app", "tuneship.serve.verify.commands"), "serve"),
        (("tuneship.cli.up", "tuneship.train.prepare", "tuneship.core.model_source"), "train"),
        (("tuneship.bench.commands", "jinja2"), "bench"),
    ],
)
def test_the_room_that_asked_for_it_is_named(modules, room):
    said = extras.lacking(missing_in(*modules))
    assert said is not None
    assert said.message == f"this verb needs {LIBRARY}"
    assert said.hint == f"pip install 'tuneship[{room}]'"


@pytest.mark.parametrize(
    "modules", [("tuneship.cli.app",), ("tuneship.core.stage",), ("tuneshipping.serve.x",), ("x",)]
)
def test_no_extra_is_to_blame_outside_the_rooms(modules):
    assert extras.lacking(missing_in(*modules)) is None


def test_a_module_of_ours_that_is_not_there_is_a_bug():
    assert extras.lacking(missing_in("tuneship.serve.commands", library="tuneship.no_module")) is None


def test_all_that_is_missing_is_named_at_once(monkeypatch):
    extras.require("train", "serve", "bench")  # here everything is installed
    monkeypatch.setattr(extras, "_SIGNS", {"train": LIBRARY, "serve": "sglang", "bench": f"{LIBRARY}_2"})
    with pytest.raises(TuneshipError, match=f"{LIBRARY} and {LIBRARY}_2") as refused:
        extras.require("train", "serve", "bench")
    assert refused.value.hint == "pip install 'tuneship[train,bench]'"


def test_another_packages_module_needs_no_extra(monkeypatch):
    monkeypatch.setattr(extras, "_SIGNS", dict.fromkeys(("train", "serve", "bench"), LIBRARY))
    extras.require_of("tests.unit.core.test_stage")
    with pytest.raises(TuneshipError, match="this needs"):
        extras.require_of("tuneship.train")
