"""What SGLang is not started with, by its own list of arguments: every name and every beginning that it would take."""

from __future__ import annotations

import ast
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
def arguments() -> dict[str, str]:
    """{name: name and help} of the installed SGLang's, from its source: importing it takes 15 s."""
    (sglang,) = find_spec("sglang").submodule_search_locations
    source = (Path(sglang) / "srt" / "server_args.py").read_text()
    others = re.findall(r'(?:add_argument\(\s*|aliases=\[|cli_name=)"(--[\w-]+)"', source)
    found = {name: name for name in others}
    (fields,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "ServerArgs"]
    for field in fields.body:
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation).startswith("A["):
            words = [node.value for node in ast.walk(field.annotation) if isinstance(node, ast.Constant)]
            name = f"--{field.target.id.replace('_', '-')}"
            found[name] = " ".join([name, *(word for word in words if isinstance(word, str))])
    return found


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
def test_each_argument_that_would_undo_a_promise(refused: str, arguments: dict[str, str]):
    assert refused in arguments, "SGLang has no such argument"
    for words in ((refused, "1"), (f"{refused}=1",), ("--tp", "1", refused)):
        with pytest.raises(PreflightError, match=f"SGLang is not given {refused} ") as error:
            launch.configure(Serve(extra_args=words), MERGED, CPU, 1)
        assert error.value.hint == startable.REFUSED[refused]


@pytest.mark.parametrize(
    "word",
    [
        "--enable-lora-overlap-loading",
        "--enable-lora-ov",
        "--hos",
        "--hos=0.0.0.0",
        "--admin-api",
        "--log-req",
        "--lora-pa",
        "--served",
        "--conf",
    ],
)
def test_a_beginning_is_taken_for_the_whole_as_sglang_does(word: str):
    with pytest.raises(PreflightError, match="SGLang is not given"):
        startable.require(Serve(extra_args=(word,)), CPU)


def test_all_other_arguments_are_handed_on(arguments: dict[str, str]):
    others = arguments.keys() - startable.REFUSED.keys()
    assert len(others) > 100
    startable.require(Serve(extra_args=tuple(others)), CPU)
    words = ("--attention-backend", "triton", "-1", "--", "--max-total-tokens=60000", "[--host]")
    startable.require(Serve(extra_args=words), CPU)


KIND = re.compile(
    r"--(ssl|grpc|smg|sidecar|log-requests|\S*api-key|lora-path|\S*-host\b|host|enable-http2)|"
    r"\bport\b|-(addr|urls?)\b|"
    r"zmq|publish|endpoints?\b|bootstrap|socket|dump|export-metrics|-(mode|only)\b.*disagg|\btrac(e|es|ing)\b|"
    r"storage backend|(lmcache|flexkv)|import path|transfer.engine|hooks?\b|delete|seed.instance|\bdaemon|tool server",
    re.IGNORECASE,
)
HARMLESS = {
    "--nccl-port": "moves a port that SGLang takes anyway",
    "--soft-watchdog-timeout": "dumps stacks, no prompts",
    "--load-snapshot-publish-interval": "how busy it is, in memory",
    **dict.fromkeys(("--asr-max-buffer-seconds", "--asr-max-concurrent-sessions"), "bounds of a route past the door"),
    **dict.fromkeys(
        (
            "--hicache-storage-prefetch-policy",
            "--load-balance-method",
            "--optimistic-prefill-attempts",
            "--remote-instance-weight-loader-backend",
            "--weight-cache-timeout",
        ),
        "says how, and does nothing without what is refused",
    ),
}
"""What sounds like it, and neither listens, sends, nor writes down what a client said."""


def test_where_it_listens_who_may_ask_what_it_logs_and_what_it_sends_is_all_there(arguments: dict[str, str]):
    """A new SGLang may bring more of a kind: of its name or its help one would tell."""
    found = {name for name, said in arguments.items() if KIND.search(said)}
    assert found - startable.REFUSED.keys() == HARMLESS.keys()


@pytest.mark.parametrize(
    "name", ["--kv-events-config", "--debug-tensor-dump-output-folder", "--enable-trace", "--otlp-traces-endpoint"]
)
def test_what_publishes_or_writes_down_prompts_would_be_found(arguments: dict[str, str], name: str):
    assert KIND.search(arguments[name])
    assert name in startable.REFUSED
