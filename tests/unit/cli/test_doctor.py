"""`tuneship doctor`: what each fact about a machine means, and the whole verb on this one."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

import pytest

from tuneship.cli import doctor
from tuneship.cli.doctor import GIB, Facts, judge
from tuneship.core.errors import TuneshipError
from tuneship.core.hardware import Gpu, Hardware

LIBRARIES = {
    "torch": {"version": "2.11.0", "cuda": "13.0", "sees_gpu": True},
    "bitsandbytes": {"version": "0.50.2", "device": "cuda"},
    "sglang": {"version": "0.5.17", "plugin": True},
}
H100 = Gpu("NVIDIA H100", 80 * GIB, (9, 0))
T4 = Gpu("Tesla T4", 16 * GIB, (7, 5))


def facts(*gpus: Gpu, **changes: Any) -> Facts:
    """A machine where everything is fine, with `changes`."""
    machine = Hardware(gpus or (H100,), "580.1", "CPU", 8, 64 * GIB)
    return Facts((3, 12), machine, LIBRARIES, 32 * GIB, {"/runs": 100 * GIB}, 30000, True)._replace(**changes)


def test_a_fit_machine_has_nothing_to_do():
    findings = list(judge(facts()))
    assert {finding.verdict for finding in findings} == {"fine"}
    assert not any(finding.advice for finding in findings)
    assert [f.what for f in findings] == [
        *("Python", "GPU", "memory", "disk", "port", "torch", "bitsandbytes", "SGLang"),
    ]


@pytest.mark.parametrize(
    ("changed", "what", "verdict", "advice"),
    [
        (facts(python=(3, 10)), "Python", "broken", "3.11 or 3.12"),
        (facts(python=(3, 13)), "Python", "broken", "3.11 or 3.12"),
        (facts(T4), "GPU", "limited", "train here, serve on a card of compute capability 8.0"),
        (facts(memory_free_bytes=3 * GIB), "memory", "limited", "8 GiB"),
        (facts(disk_free_bytes={"/runs": GIB}), "disk", "limited", "TUNESHIP_CACHE"),
        (facts(port_is_free=False), "port", "limited", "serve.port"),
        (facts(libraries=LIBRARIES | {"torch": {"error": "ModuleNotFoundError"}}), "torch", "broken", "[train]"),
        (facts(libraries=LIBRARIES | {"sglang": {"error": "ImportError"}}), "SGLang", "broken", "[serve]"),
        (
            facts(libraries=LIBRARIES | {"sglang": {"version": "0.5.17", "plugin": False}}),
            *("SGLang", "broken", "install tuneship itself"),
        ),
        (
            facts(libraries=LIBRARIES | {"torch": {"version": "2.11.0", "cuda": "", "sees_gpu": False}}),
            *("torch", "broken", "driver 580.1"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_fine_says_what_to_do(changed: Facts, what: str, verdict: str, advice: str):
    (found,) = [finding for finding in judge(changed) if finding.verdict != "fine"]
    assert (found.what, found.verdict) == (what, verdict)
    assert advice in found.advice


def test_the_t4_is_said_to_train_and_not_to_serve():
    (card,) = [finding for finding in judge(facts(T4)) if finding.what == "GPU"]
    assert "no bf16; it can train, not serve" in card.detail


def test_the_verb_on_this_machine():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "tuneship", "doctor", "--port", str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert f"{port} is in use" in done.stdout
    assert "quantizes to NF4" in done.stdout
    assert "with our plugin" in done.stdout
    at_once, _, later = done.stdout.partition("importing torch, bitsandbytes and SGLang\n")
    assert "memory" in at_once
    assert "torch  " in later, "a line is printed when it is known, not when all are"


def test_libraries_that_end_python_are_three_lines(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(doctor, "_PROBE", 'print("hello"); print(\'["torch", {"error": "none"}]\', flush=True); 1 / 0')
    with pytest.raises(TuneshipError, match="not fit yet: torch, bitsandbytes, SGLang"):
        doctor.doctor(port=0)
    said = capsys.readouterr()
    assert said.out.count("crashed or hung") == 2
    assert said.err.count("importing") == 1
