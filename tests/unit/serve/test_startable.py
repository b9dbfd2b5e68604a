"""What SGLang is not started with, by its own list of arguments: every name and every beginning that it would take."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tuneship.core.errors import PreflightError
from tuneship.core.hardware import Gpu, Hardware
from tuneship.core.recipe import Serve
from tuneship.serve import launch, startable
from tuneship.serve.catalog import Catalog, Entry

CPU = Hardware((), "", "a processor", 2, 8 << 30)
MERGED = Catalog("merged", (Entry("m", "m@1", None, Path("/m"), "", "m"),))


def card(name: str, capability: tuple[int, int]) -> Gpu:
    return Gpu(name, 16 << 30, capability)


@pytest.fixture(scope="module")
def arguments() -> set[str]:
    """Those of the installed SGLang, from its source: importing it takes 15 s."""
    (sglang,) = find_spec("sglang").submodule_search_locations
    source = (Path(sglang) / "srt" / "server_args.py").read_text()
    fields = re.findall(r"^    ([a-z]\w*): A\[", source, re.MULTILINE)
    others = re.findall(r'(?:add_argument\(\s*|aliases=\[|cli_name=)"(--[\w-]+)"', source)
    return {f"--{field.replace('_', '-')}" for field in fields} | {*others}


@pytest.mark.parametrize("cards", [[("T4", (7, 5))], [("V100", (7, 0))], [("A10", (8, 6)), ("T4", (7, 5))]], ids=str)
def test_a_card_that_sglang_has_no_kernels_for(cards):
    machine = CPU._replace(gpus=tuple(card(*each) for each in cards))
    with pytest.raises(
        PreflightError, match=r"does not serve on (T4|V100) \(compute capability 7.\d\): .* at 8.0"
    ) as no:
        launch.configure(Serve(), MERGED, machine, 1)
    assert "serve on a card of compute capability 8.0 or newer" in no.value.hint


@pytest.mark.parametrize("gpus", [(), (card("A100", (8, 0)),), (card("H100", (9, 0)),), (card("B200", (10, 0)),)])
def test_where_it_serves(gpus):
    startable.require(Serve(), CPU._replace(gpus=gpus))


@pytest.mark.parametrize("refused", sorted(startable.REFUSED))
def test_each_argument_that_would_undo_a_promise(refused: str, arguments: set[str]):
    assert refused in arguments, "SGLang has no such argument"
    for words in ((refused, "1"), (f"{refused}=1",), ("--tp", "1", refused)):
        with pytest.raises(PreflightError, match=f"SGLang is not given {refused} ") as error:
            launch.configure(Serve(extra_args=words), MERGED, CPU, 1)
        assert error.value.hint == startable.REFUSED[refused]


@pytest.mark.parametrize(
    "word", ["--hos", "--hos=0.0.0.0", "--admin-api", "--log-req", "--lora-pa", "--served", "--conf"]
)
def test_a_beginning_is_taken_for_the_whole_as_sglang_does(word: str):
    with pytest.raises(PreflightError, match="SGLang is not given"):
        startable.require(Serve(extra_args=(word,)), CPU)


def test_all_other_arguments_are_handed_on(arguments: set[str]):
    others = arguments - startable.REFUSED.keys()
    assert len(others) > 100
    startable.require(Serve(extra_args=tuple(others)), CPU)
    words = ("--attention-backend", "triton", "-1", "--", "--max-total-tokens=60000", "[--host]")
    startable.require(Serve(extra_args=words), CPU)


def test_where_it_listens_who_may_ask_and_what_it_logs_is_all_there(arguments: set[str]):
    """A new SGLang may bring more of a kind."""
    kind = re.compile(r"--(?:ssl|grpc|smg|sidecar|log-requests|.*api-key|lora-path|.*-host$|host|enable-http2)")
    assert {name for name in arguments if kind.match(name)} <= startable.REFUSED.keys()
