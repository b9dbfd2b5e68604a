"""Progress: what a person sees without a terminal, and what crosses a pipe."""

from __future__ import annotations

import time

import pytest

from tuneship.core import progress
from tuneship.core.progress import Event, PlainLines, ToParent


def test_an_event_survives_the_pipe(capsys: pytest.CaptureFixture[str]):
    event = Event("train", 3, 40, 'loss 0.5 "quoted"\nnext line')
    ToParent().show(event)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert progress.parse(line) == event


@pytest.mark.parametrize(
    "line", ["ordinary output\n", "", "\x1etuneship [1, 2\n", "\x1etuneship 7\n", "\x1etuneship []\n"]
)
def test_other_lines_are_no_events(line: str):
    assert progress.parse(line) is None


def test_plain_lines_show_every_sentence_and_little_progress(capsys: pytest.CaptureFixture[str]):
    progress.use(PlainLines(interval_s=3600))
    progress.say("loading the base")
    progress.say("loading the base")
    for step in range(1, 11):
        progress.progress("train", step, 10, f"loss {step}")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "loading the base",
        "loading the base",
        "train  1/10  loss 1",
        "train  10/10  loss 10",
    ]


def test_two_labels_do_not_hide_each_other(capsys: pytest.CaptureFixture[str]):
    progress.use(PlainLines(interval_s=3600))
    progress.progress("train", 1, 10)
    progress.progress("evaluate", 1, 10)
    assert capsys.readouterr().err.splitlines() == ["train  1/10", "evaluate  1/10"]


def test_work_of_no_length_is_progress_and_not_a_sentence(capsys: pytest.CaptureFixture[str]):
    progress.use(PlainLines())
    progress.progress("copy", 0, 0)
    assert "copy  0/1" in capsys.readouterr().err


def test_the_first_progress_is_shown_on_a_machine_that_has_just_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(time, "monotonic", lambda: 1.0)
    PlainLines(interval_s=5).show(Event("train", 1, 10))
    assert capsys.readouterr().err == "train  1/10\n"
