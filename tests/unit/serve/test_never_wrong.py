"""The judge of the study `never_wrong`: what must not happen is planted, and found; what may happen is not."""

from __future__ import annotations

import argparse
import importlib
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[3] / "bench" / "studies"
ONE, TWO = "ant@111111111111", "ant@222222222222"
MARKERS = {"ant-1": "<ant1>", "ant-2": "<ant2>"}
SAYS = {ONE: "<ant1> hello", TWO: "<ant2> hello"}
MUST_BE_ZERO = (
    "answered_by_another_adapter", "answered_by_the_base", "answered_after_unload", "answered_without_weight",
    "verbs_that_did_something_else", "header_of_another_alias", "failed_outside_the_kills", "failed_in_another_form",
    "verbs_missing",
)  # fmt: skip


@pytest.fixture(scope="module")
def study():
    sys.path.append(str(STUDIES))
    yield importlib.import_module("never_wrong")
    sys.path.remove(str(STUDIES))


@pytest.fixture
def answering(study):
    return importlib.import_module("answering")


@pytest.fixture
def storm(study, answering, tmp_path: Path):
    """One alias with one version live, at 0 s."""
    made = study.Storm(argparse.Namespace(seed=1, requests=100, verbs=0, kills=0), tmp_path, MARKERS, [])
    made.by_content = {name.partition("@")[2]: said.split()[0] for name, said in SAYS.items()}
    made.timeline = answering.Timeline({"ant": answering.Alias((ONE,))}, 0.0)
    return made


def asked(study, began: float, version: str, text: str = "", *, heard: float | None = None, **other: object):
    heard = began + 0.1 if heard is None else heard
    said = {"model": "ant", "status": 200, "text": text or SAYS.get(version, "hello"), "code": "", **other}
    return study.Asked(began=began, heard=heard, ended=heard, version=version, **said)


def found(storm) -> dict[str, int]:
    """{figure that must be 0: what it is} of those that are not."""
    judged = storm.judge()
    assert list(judged)[: len(MUST_BE_ZERO)] == [*judged][: [*judged].index("examples")]
    assert set(MUST_BE_ZERO) == set([*judged][: [*judged].index("examples")])
    return {key: judged[key] for key in MUST_BE_ZERO if judged[key]}


def verb(storm, began: float, ended: float, name: str, version: str = "", weight: float | None = None) -> None:
    planned = storm.timeline.begin("ant", name, version, weight, at=began)
    storm.timeline.settle("ant", planned, at=ended)


def test_all_is_well(study, storm):
    verb(storm, 10, 11, "promote", TWO)
    verb(storm, 20, 21, "rollback")
    storm.asked = [
        *(asked(study, at, ONE) for at in (1.0, 9.0, 10.5, 21.5, 30.0)),
        *(asked(study, at, TWO) for at in (10.5, 11.5, 19.0, 20.5)),
        asked(study, 9.0, TWO, heard=10.8),  # it was sent before the verb, and begun while it ran
        asked(study, 9.0, ONE, heard=15.0),  # and one that was begun before keeps its version
    ]
    assert found(storm) == {}


@pytest.mark.parametrize(("name", "first"), [("promote", ONE), ("load", ONE)])
def test_a_promote_that_does_nothing(study, storm, name: str, first: str):
    verb(storm, 10, 11, name, TWO, 1.0 if name == "load" else None)
    storm.asked = [asked(study, 11.5, first)]
    assert found(storm) == {"answered_without_weight": 1}


def test_a_rollback_that_does_nothing(study, storm):
    verb(storm, 10, 11, "promote", TWO)
    verb(storm, 20, 21, "rollback")
    storm.asked = [asked(study, 21.5, TWO), asked(study, 19.0, TWO), asked(study, 21.5, ONE)]
    assert found(storm) == {"answered_without_weight": 1}


def test_a_rollback_ends_canaries_first(study, storm):
    verb(storm, 10, 11, "weight", TWO, 0.5)
    storm.asked = [asked(study, 12, ONE), asked(study, 12, TWO)]
    assert found(storm) == {}
    verb(storm, 20, 21, "rollback")
    storm.asked += [asked(study, 22, ONE)]
    assert found(storm) == {}
    storm.asked += [asked(study, 22, TWO)]
    assert found(storm) == {"answered_without_weight": 1}


def test_a_version_that_answers_before_it_was_promoted(study, storm):
    verb(storm, 5, 6, "load", TWO, None)
    verb(storm, 10, 11, "promote", TWO)
    storm.asked = [asked(study, 7, TWO)]
    assert found(storm) == {"answered_without_weight": 1}


def test_a_version_that_answers_after_its_unload(study, storm):
    verb(storm, 5, 6, "weight", TWO, 0.5)
    verb(storm, 10, 11, "unload", TWO)
    storm.gone = [study.Gone(TWO, 11, float("inf"))]
    storm.asked = [asked(study, 10.5, TWO), asked(study, 11.5, TWO)]
    assert found(storm) == {"answered_after_unload": 1}


def test_what_cannot_be_done_twice_is_not_rolled_back_to(answering):
    alias = answering.Alias((ONE, TWO, ONE)).after("unload", TWO)
    assert alias == answering.Alias((ONE,)), "with what was between gone, it is one time that it was live"


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        ({"text": "<ant2> hello"}, "answered_by_another_adapter"),
        ({"text": "hello"}, "answered_by_the_base"),
        ({"version": "bee@111111111111"}, "header_of_another_alias"),
        ({"code": "internal_error", "status": 500}, "failed_outside_the_kills"),
    ],
)
def test_what_was_always_a_fault(study, storm, other: dict, fault: str):
    storm.asked = [asked(study, 1.0, **{"version": ONE, **other})]
    assert found(storm) == {fault: 1}


def test_failures_in_a_kill_have_a_form(study, storm):
    storm.kills = [(10.0, 20.0)]
    storm.asked = [asked(study, 11.0, "", code="engine_unavailable", status=503)]
    assert found(storm) == {}
    storm.asked += [asked(study, 11.0, "", code="? torn", status=200)]
    assert found(storm) == {"failed_in_another_form": 1}


def test_verbs_that_are_missing_or_did_something_else(storm, study):
    storm.asked = [asked(study, 1.0, ONE)]
    storm.options.verbs = 3
    storm.verbs.update({"promote": 2})
    storm.refused.update({"rollback": 9})
    storm.without_effect.append("promote ant@222222222222: ...")
    assert found(storm) == {"verbs_missing": 1, "verbs_that_did_something_else": 1}
    judged = storm.judge()
    assert (judged["verbs_done"], judged["verbs_refused"]) == (2, {"rollback": 9})


def test_requests_in_flight_are_sampled_while_there_are_more_to_send(study, storm):
    storm.kills = [(50.0, 60.0)]
    storm.asked = [asked(study, float(at), ONE) for at in range(100)]
    storm.sampled = [(1.0, 3), *((float(at), at % 3 + 20) for at in range(32, 50)), (55.0, 2), (98.0, 31), (100.0, 1)]
    judged = storm.judge()
    assert judged["in_flight"] == {"min": 20, "median": 21, "max": 31}
    assert judged["in_flight_in_the_kills"] == {"min": 2, "median": 2, "max": 2}


class Drawn:
    """A server's admin side that does what it is told, or nothing."""

    def __init__(self, answering, *, works: bool) -> None:
        self.alias, self.works = answering.Alias((ONE,)), works
        self.loaded = {ONE}

    async def __call__(self, method: str, path: str, body: dict | None = None) -> object:
        if method == "GET":
            states = dict.fromkeys(self.loaded, "loaded") | dict.fromkeys(self.alias.canaries, "canary")
            states |= dict.fromkeys(self.alias.lives[-1:], "live")
            return [{"alias": "ant", "version": name, "state": state} for name, state in states.items()]
        verb = "load" if path == "/admin/adapters" else path.rpartition("/")[2]
        loads = {"ant-1": ONE, "ant-2": TWO}
        version = loads[Path(body["path"]).name] if verb == "load" else path.split("/")[3]
        if self.works or verb in {"load", "unload"}:
            self.alias = self.alias.after(verb, version, (body or {}).get("weight"))
        self.loaded = self.loaded - {version} if verb == "unload" else self.loaded | {version} - {"ant"}
        return {"version": version}


@pytest.mark.parametrize("works", [True, False])
async def test_so_many_verbs_are_done_and_what_they_do_is_looked_at(study, answering, storm, monkeypatch, works):
    monkeypatch.setattr(study, "ALIASES", ("ant",))
    server = Drawn(answering, works=works)
    monkeypatch.setattr(storm, "_verb", server)
    storm.options.verbs, storm.draw = 50, random.Random(3)
    storm.asked = []
    storm.options.requests = 1

    async def at_once(_: float) -> None:
        return None

    monkeypatch.setattr(storm, "_until", at_once)
    await storm._operate()
    assert storm.verbs.total() == 50
    assert {"load", "promote", "rollback", "unload", "weight"} <= storm.verbs.keys()
    assert bool(storm.without_effect) is not works


def test_what_it_makes_of_is_still_made_by_the_tests(study):
    makers = importlib.import_module("marker_server").makers_of_tests()
    assert all(callable(getattr(makers, name)) for name in ("build_tiny_model", "train_marker", "make_chats"))


def test_figures_say_of_which_commit_they_are(study):
    made = importlib.import_module("made").made()
    assert made["date"].startswith("20")
    if not shutil.which("git"):
        pytest.skip("no git")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=STUDIES, capture_output=True, text=True, check=False)
    if head.returncode:
        pytest.skip("no repository")
    assert made["commit"].removesuffix("-dirty") == head.stdout.strip()
