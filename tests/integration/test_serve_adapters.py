"""Several adapters on one base: every answer comes from the model that was asked for, whatever else is in flight."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import aiohttp
import httpx
import openai
import pytest

from tuneship.bench.load import engine_metrics, processes
from tuneship.bench.load.workload import Request

pytestmark = pytest.mark.integration

CHAT = "/v1/chat/completions"
BASE = "tiny-llama"
ANSWER_TOKENS = 16
EQUAL_SHARE = 0.95
MIX = ("alpha", "beta")
FOREIGN = ("stable", "thin", "uneven")
CROSS_CHECK = Path(__file__).parents[2] / "bench" / "studies" / "cross_check.py"
FACTOR = 8
"""A busy machine's noise; a time that is not divided by its tokens is 63 times too long, a wrong unit 1000 times."""


@pytest.fixture
def server(adapter_server):
    return adapter_server


@pytest.fixture
def url(server) -> str:
    return server.endpoint.url


@pytest.fixture
def versions(server) -> dict[str, str]:
    return {model.name: model.version for model in server.endpoint.models}


async def test_every_answer_is_its_own_models(
    url, ask_all, equal_share, versions, markers, chats, tiny_model, marker_adapters
):
    prompts = chats(100, 99)
    asked = [(name, chat) for chat in prompts for name in markers]  # interleaved: neighbours want different adapters
    answers = await ask_all(url, asked, ANSWER_TOKENS)
    assert len(answers) == 300
    for (name, _), answer in zip(asked, answers, strict=True):
        assert answer.model == name
        assert answer.version == versions[name]
        assert answer.text.startswith(markers[name]), (name, answer)

    from_base = await ask_all(url, [(BASE, chat) for chat in prompts], ANSWER_TOKENS)
    assert not any(answer.text.startswith(marker) for answer in from_base for marker in markers.values())
    assert {(answer.model, answer.version) for answer in from_base} == {(BASE, versions[BASE])}

    share = equal_share(tiny_model, marker_adapters, [*answers, *from_base])
    print(f"equal to transformers + PEFT, greedy, float32: {share}")
    assert min(share.values()) >= EQUAL_SHARE, share


async def test_what_other_trainers_wrote_answers_as_in_peft(
    url, ask_all, equal_share, markers, chats, tiny_model, adapters
):
    """rsLoRA, patterns of targets, ranks and alphas, which SGLang would ignore or refuse; one layer's q and v alone."""
    prompts = chats(20, 98)
    answers = await ask_all(url, [(name, chat) for chat in prompts for name in FOREIGN], ANSWER_TOKENS)
    for answer in answers:
        assert answer.text.startswith(markers["alpha"]) or answer.model != "stable", answer
    share = equal_share(tiny_model, adapters, answers)
    assert min(share.values()) >= EQUAL_SHARE, share


async def test_the_servers_prompt_is_the_templates(url, ask_all, chats, tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = chats(10, 5)
    for chat, answer in zip(prompts, await ask_all(url, [("alpha", chat) for chat in prompts], 1), strict=True):
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert answer.prompt_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_workers_are_forks(server):
    """Half of the start and of the memory; when this fails, a new thread in SGLang's main process makes it spawn."""
    assert "workers are spawned" not in (server.folder / "engine.log").read_text()


@pytest.mark.parametrize("name", ["delta", "tiny-llama:alpha", "x:alpha", "alpha@1", ""])
async def test_other_names_are_not_found(url, name):
    async with aiohttp.ClientSession(url) as session, session.post(CHAT, json={"model": name}) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "model_not_found"


async def test_the_engine_itself_would_have_answered(server):
    """Why the door exists: SGLang answers an unknown name with the base. When this fails, upstream has mended it."""
    flags = server.endpoint.engine.flags
    engine = f"http://127.0.0.1:{flags[flags.index('--port') + 1]}"
    body = {"model": "delta", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    async with aiohttp.ClientSession(engine) as session, session.post(CHAT, json=body) as response:
        assert response.status == 200


def test_the_openai_client_is_at_home(url, versions):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    hello = [{"role": "user", "content": "hello"}]
    assert [model.id for model in client.models.list()] == [BASE, "alpha", "beta", "gamma", *FOREIGN]
    assert client.models.retrieve("alpha").id == "alpha"

    raw = client.chat.completions.with_raw_response.create(
        model="alpha", messages=hello, temperature=0, max_tokens=8, n=2
    )
    assert raw.headers["x-tuneship-version"] == versions["alpha"]
    chat = raw.parse()
    assert len(chat.choices) == 2
    whole = chat.choices[0].message.content
    assert whole
    assert chat.usage
    assert chat.usage.completion_tokens > 0

    stream = client.chat.completions.create(
        model="alpha", messages=hello, temperature=0, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage

    completion = client.completions.create(model="beta", prompt="once upon", max_tokens=4, temperature=0)
    assert completion.model == "beta"

    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=hello)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=BASE, messages=hello, extra_body={"lora_path": "alpha"})
    assert refused.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="beta", prompt="a", max_tokens=-1)


async def test_a_stream_is_what_the_engine_sends(url):
    body = {"model": "gamma", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "stream": True}
    async with aiohttp.ClientSession(url) as session, session.post(CHAT, json=body) as response:
        assert response.content_type == "text/event-stream"
        events = (await response.read()).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    for event in events[:-2]:
        chunk = json.loads(event.removeprefix(b"data: "))
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["model"] == "gamma"


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_a_stream_that_says_no_usage_is_counted_by_its_events_with_text(url, path):
    body = {"model": "gamma", "max_tokens": 32, "temperature": 0, "ignore_eos": True, "stream": True}
    body |= {"messages": [{"role": "user", "content": "hello"}]} if path == CHAT else {"prompt": "hello"}
    async with aiohttp.ClientSession(url) as session:
        before = await _chunks(session)
        async with session.post(path, json=body) as response:
            events = (await response.read()).split(b"\n\n")[:-2]
        for _ in range(100):  # the door counts when the answer is over, a moment after its last byte
            if counted := await _chunks(session) - before:
                break
            await asyncio.sleep(0.1)
    choices = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events]
    texts = [choice["delta"].get("content") if path == CHAT else choice["text"] for choice in choices]
    print(f"{counted:.0f} events, {sum(map(bool, texts))} of them with text, for 32 tokens")
    assert sum(map(bool, texts)) <= counted <= 32


async def _chunks(session: aiohttp.ClientSession) -> float:
    async with session.get("/metrics") as answer:
        page = await answer.text()
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("tuneship_chunks_total{"))


async def test_what_the_engine_counted_is_what_was_asked(server, url, tiny_model, marker_adapters):
    asked = [Request(0.0, name, [{"role": "user", "content": f"a secret {n}"}], 8) for n in range(3) for name in MIX]
    before = engine_metrics.scrape(url)
    recording = await asyncio.to_thread(processes.run, url, "", asked, drain_s=60)
    page = (await asyncio.to_thread(httpx.get, f"{url}/metrics", trust_env=False)).text
    counted = engine_metrics.change(before, engine_metrics.parse(page))

    assert not [record.error for record in recording.records if record.error]
    assert counted["sglang:num_requests_total"] == len(asked)
    assert counted["sglang:prompt_tokens_total"] == sum(record.input_tokens for record in recording.records)
    assert counted["sglang:generation_tokens_total"] == len(asked) * 8
    assert counted["sglang:max_total_num_tokens"] == 20_000  # a gauge, and one that is known: launch.py sets it
    e2e_s = [record.end_s - record.sent_s for record in recording.records]
    # It says seconds, and does not see the way through the door.
    assert 0 < counted["sglang:e2e_request_latency_seconds"] <= statistics.fmean(e2e_s)
    assert 0 < counted["sglang:time_to_first_token_seconds"] < counted["sglang:e2e_request_latency_seconds"]
    assert counted["sglang:generation_tokens_histogram"] == 8
    assert all(map(math.isfinite, counted.values()))
    for private in ("secret", str(tiny_model), str(marker_adapters), str(server.folder)):
        assert private not in page


def test_sglangs_own_benchmark_measures_the_same(url, tiny_model, tmp_path):
    """The same load by both: equal token counts, and medians that rule out another unit or definition."""
    load = ("--concurrency", "2", "--requests", "8", "--input-words", "24", "--output-tokens", "64", "--rounds", "1")
    found = tmp_path / "found.json"
    server = ("--url", url, "--model", "alpha", "--tokenizer", str(tiny_model))
    subprocess.run([sys.executable, CROSS_CHECK, *server, *load, "--out", found], check=True)
    (level,) = json.loads(found.read_text())["levels"]
    ours, theirs = level["runs"]["tuneship"], level["runs"]["sglang"]
    for run in (*ours, *theirs):
        assert run["completed"] == 8
        assert run["output_tokens"] == run["engine_output_tokens"] == 8 * 64
        assert run["engine_prompt_tokens"] == ours[0]["input_tokens"] > 8 * 24
        # What is cached is the template's beginning: nobody was answered from another run's prompts.
        assert run["engine_cached_tokens"] < run["engine_prompt_tokens"] / 2
    for name in ("ttft_ms_p50", "tpot_ms_p50", "e2e_ms_p50"):
        best, their_best = (min(run[name] for run in runs) for runs in (ours, theirs))
        assert 1 / FACTOR < best / their_best < FACTOR, name


async def test_sigterm_finishes_what_is_in_flight(server, url):
    """It ends the server: last, or the next test starts another."""
    body = {"model": "alpha", "prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession(url) as session, session.post("/v1/completions", json=body) as response:
        first = await response.content.readany()
        server.signal(signal.SIGTERM)
        rest = await response.read()
    assert (first + rest).endswith(b"data: [DONE]\n\n")
    assert server.exit_code() == 0
    assert not server.endpoint_file.exists()
    server.assert_no_orphans()
    assert not list(server.folder.glob("*.counters*")), "what the engine counted lies about"
