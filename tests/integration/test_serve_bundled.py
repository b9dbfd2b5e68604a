"""The same on a model that can speak: three adapters on the bundled SmolLM2-135M, held against transformers + PEFT."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tuneship.core.model_source import BUNDLED_ID, resolve

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

ANSWER_TOKENS = 8
SHORT = 60
"""Characters: a CPU's time goes into the prompts."""
EQUAL_SHARE = 0.95


@pytest.fixture(scope="module")
def bundled():
    """The bundled model's checkpoint, converted by `tuneship fetch` when it is not there yet."""
    subprocess.run([sys.executable, "-m", "tuneship", "fetch", BUNDLED_ID], check=True)
    return resolve(BUNDLED_ID).path


@pytest.fixture(scope="module")
def adapters(bundled, marker_adapter, markers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundled-adapters")
    for name, marker in markers.items():
        (folder / name).symlink_to(marker_adapter(bundled, name, marker))
    return folder


async def test_every_answer_is_its_own_models(start_server, ask_all, equal_share, chats, bundled, adapters, markers):
    server = start_server(BUNDLED_ID, "--adapters", str(adapters), "--dtype", "float32", threads=2)
    url = server.wait_ready()
    short = [chat for chat in chats(500, 99) if sum(len(message["content"]) for message in chat) < SHORT][:100]
    assert len(short) == 100
    asked = [(name, chat) for chat in short for name in markers]
    answers = await ask_all(url, asked, ANSWER_TOKENS)
    wrong = [(name, answer) for (name, _), answer in zip(asked, answers, strict=True) if answer.model != name]
    assert not wrong
    assert not [answer for answer in answers if not answer.text.startswith(markers[answer.model])]

    share = equal_share(bundled, adapters, answers)
    print(f"equal to transformers + PEFT, greedy, float32: {share}")
    assert min(share.values()) >= EQUAL_SHARE, share
