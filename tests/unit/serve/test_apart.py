"""The preflight in a process of its own: it says what the preflight says, and survives what that does not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tuneship.core.errors import ArtifactError, PreflightError
from tuneship.core.model_source import ModelSource
from tuneship.serve import preflight
from tuneship.serve.preflight import Limits
from tuneship.serve.preflight.apart import Checker

ENDLESS = r"([a-z._0-9]+)+!"
"""As a pattern for `model.layers.0.self_attn.q_proj`, tried in 2^30 ways."""


@pytest.fixture
def checker(base: Path):
    made = Checker(ModelSource("the-base", "", base), Limits(max_rank=8))
    made.start()
    yield made
    made.stop()


async def test_it_says_what_the_preflight_says(checker, facts, make_adapter):
    sql = make_adapter("sql")
    assert await checker.check(sql) == preflight.check(sql, facts)
    with pytest.raises(PreflightError, match="has rank 16, the server takes at most 8") as refused:
        await checker.check(make_adapter("wide", rank=16))
    assert refused.value.hint == "restart with --max-rank 16"
    with pytest.raises(ArtifactError, match=r"has no adapter_config\.json"):
        await checker.check(sql.parent)
    with pytest.raises(ArtifactError):
        await checker.check(sql / "not-there")


async def test_a_pattern_without_end_is_given_up(checker, make_adapter):
    began = time.monotonic()
    with pytest.raises(PreflightError, match="could not be checked within 3 s"):
        await checker.check(make_adapter("endless", config={"target_modules": ENDLESS}), timeout_s=3)
    assert time.monotonic() - began < 10
    assert (await checker.check(make_adapter("sql"))).name == "sql"


async def test_who_is_killed_is_replaced(checker, make_adapter):
    sql = make_adapter("sql")
    await checker.check(sql)
    os.kill(checker.pid, signal.SIGKILL)
    await asyncio.sleep(0.5)
    assert (await checker.check(sql)).name == "sql"


async def test_one_after_the_other(checker, make_adapter):
    names = [f"a{number}" for number in range(8)]
    adapters = [make_adapter(name) for name in names]
    assert [found.name for found in await asyncio.gather(*map(checker.check, adapters))] == names


def test_tensors_that_the_settings_leave_out(make_adapter, refusal):
    """PEFT loads the adapter and ignores them; SGLang adds every tensor that it finds."""
    path = make_adapter("odd")
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    assert "which PEFT ignores and SGLang adds: model.layers.0.self_attn.v_proj" in refusal(path).message


async def test_an_answer_nobody_waited_for_is_not_the_next_ones(checker, make_adapter):
    left = asyncio.create_task(checker.check(make_adapter("left")))
    await asyncio.sleep(0.05)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    assert (await checker.check(make_adapter("sql"))).name == "sql"
    async with asyncio.timeout(5):
        await asyncio.get_running_loop().shutdown_default_executor()  # no thread waits for an answer


async def test_who_ends_before_it_read_the_question_is_replaced(checker, make_adapter):
    await checker.check(make_adapter("one"))
    os.kill(checker.pid, signal.SIGSTOP)
    asked = asyncio.create_task(checker.check(make_adapter("two")))
    await asyncio.sleep(0.2)
    os.kill(checker.pid, signal.SIGKILL)
    with pytest.raises(PreflightError, match="ended the process"):
        await asked
    assert (await checker.check(make_adapter("sql"))).name == "sql"


async def test_a_copy_is_proven_there_and_refused_in_the_same_words(checker, facts, make_adapter, tmp_path):
    def broken(tensors: dict[str, np.ndarray]) -> None:
        next(iter(tensors.values()))[0, 0] = np.inf

    good, bad = make_adapter("sql"), make_adapter("bad", change=broken)
    checked = await checker.check(good)
    assert await checker.sound(checked, good) == ()
    await checker.prove(checked, good)
    checked = await checker.check(bad)
    with pytest.raises(PreflightError) as wanted:
        preflight.check(bad, facts)
    with pytest.raises(PreflightError) as refused:
        await checker.sound(checked, bad)
    assert (refused.value.message, refused.value.hint) == (wanted.value.message, wanted.value.hint)
    with pytest.raises(ArtifactError, match="was changed while it was being loaded"):
        await checker.prove(checked, good)
    with pytest.raises(ArtifactError, match="was changed while it was being loaded"):
        await checker.prove(checked, tmp_path / "gone")


async def test_a_proof_that_takes_too_long_or_ends_its_process_is_given_up(checker, make_adapter):
    path = make_adapter("sql")
    checked = await checker.check(path)
    os.kill(checker.pid, signal.SIGSTOP)
    with pytest.raises(PreflightError, match="could not be checked within 0"):
        await checker.prove(checked, path, timeout_s=0.3)
    await checker.prove(checked, path)
    os.kill(checker.pid, signal.SIGSTOP)
    proving = asyncio.create_task(checker.prove(checked, path))
    await asyncio.sleep(0.2)
    os.kill(checker.pid, signal.SIGKILL)
    with pytest.raises(PreflightError, match="ended the process"):
        await proving
    await checker.prove(checked, path)
