"""What OpenAI's client can ask of a real server, and what comes back. Where SGLang deviates, the comment says so."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import jsonschema
import openai
import pytest

from tuneship.serve import keys

pytestmark = pytest.mark.integration

BASE = "tiny-llama"
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "integer", "maximum": 99}, "currency": {"enum": ["EUR", "USD"]}},
    "required": ["total", "currency"],
    "additionalProperties": False,
}
# SGLang holds a call to its schema only where the tool says `strict`, as OpenAI does.
TOOL = {"type": "function", "function": {"name": "book", "description": "Book.", "parameters": SCHEMA, "strict": True}}
WITH_TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<tool_call></tool_call><|im_end|>\n{% endif %}"


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template that shows tools."""
    folder = tmp_path_factory.mktemp("with-tools") / BASE
    folder.mkdir()
    for path in tiny_model.iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).symlink_to(path)
    template = (tiny_model / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(WITH_TOOLS + template)
    return folder


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A keys file; a key for everything; one for the base alone."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    return path, keys.add(path, "all"), keys.add(path, "base-only", [BASE])


@pytest.fixture(scope="module")
def server(start_module_server, model: Path, marker_adapter, tiny_model: Path, secrets):
    adapter = marker_adapter(tiny_model, "alpha", "<alpha>")
    files = ("--keys", str(secrets[0]))
    running = start_module_server(str(model), "--adapters", str(adapter), "--dtype", "float32", *files)
    running.wait_ready()
    return running


@pytest.fixture(scope="module")
def client(server, secrets):
    with openai.OpenAI(base_url=f"{server.endpoint.url}/v1", api_key=secrets[1], max_retries=0) as found:
        yield found


def test_models(client):
    assert [model.id for model in client.models.list()] == [BASE, "alpha"]
    assert client.models.retrieve("alpha").object == "model"


@pytest.mark.parametrize("name", [BASE, "alpha"])
def test_a_chat(client, name):
    answer = client.chat.completions.create(model=name, messages=HELLO, max_tokens=6, temperature=0, seed=1)
    assert answer.model == name
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content.startswith("<alpha>") == (name == "alpha")
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


def test_a_stream_is_the_same_answer(client):
    asked = {"model": "alpha", "messages": HELLO, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 6
    assert not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_completions(client):
    answer = client.completions.create(model="alpha", prompt=["once upon", "a time"], max_tokens=3, temperature=0)
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1]
    by_ids = client.completions.create(model="alpha", prompt=[5, 6, 7], max_tokens=3, temperature=0)
    assert by_ids.usage.prompt_tokens == 3
    echoed = client.completions.create(model=BASE, prompt="once upon", max_tokens=1, echo=True)
    assert echoed.choices[0].text.startswith("once upon")


def test_stop_ends_before_the_word(client):
    asked = {"model": "alpha", "messages": HELLO, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stopped = client.chat.completions.create(**asked, stop=["pha>"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == whole[: whole.index("pha>")]


def test_several_choices(client):
    answer = client.chat.completions.create(model=BASE, messages=HELLO, max_tokens=4, n=2, temperature=1.0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens == 8


def test_logprobs(client):
    asked = {"model": BASE, "messages": HELLO, "max_tokens": 3, "temperature": 0, "logprobs": True, "top_logprobs": 4}
    tokens = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(tokens) == 3
    for token in tokens:
        # Not always 4: SGLang keeps one of several tokens of the same text, such as halves of characters.
        assert 1 <= len(token.top_logprobs) <= 4
        assert max(other.logprob for other in token.top_logprobs) <= token.logprob + 1e-4 <= 1e-4, "it was the best"
    older = client.completions.create(model=BASE, prompt="a", max_tokens=2, temperature=0, logprobs=2)
    assert len(older.choices[0].logprobs.token_logprobs) == 2


def test_json_by_schema(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "invoice", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model=BASE, messages=HELLO, max_tokens=200, temperature=1.0, seed=seed, response_format=wanted
        )
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}], ids=str)
def test_a_tool_that_must_be_called(client, choice):
    """Constrained decoding makes even a model of random weights call it rightly."""
    asked = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    answer = client.chat.completions.create(
        model=BASE, messages=HELLO, max_tokens=300, temperature=1.0, **asked
    ).choices[0]
    # SGLang lets the model talk on after its call, and one of random weights seldom ends: then it says `length`.
    assert answer.finish_reason in {"tool_calls", "length"}
    assert answer.message.tool_calls, answer
    (call,) = answer.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "book"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_a_tool_that_may_be_called(client):
    answer = client.chat.completions.create(
        model=BASE, messages=HELLO, max_tokens=4, temperature=0, tools=[TOOL], tool_choice="auto"
    )
    assert answer.choices[0].message.content, "it does not know how to call one"
    plain = client.chat.completions.create(model=BASE, messages=HELLO, max_tokens=4, temperature=0)
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens, "and it was shown the tool"


def test_errors_are_the_clients_classes(client, server, secrets):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=BASE, messages=HELLO, extra_body={"lora_path": "alpha"})
    assert refused.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=BASE, messages=HELLO, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model=BASE, prompt="a", max_tokens=100_000)
    with pytest.raises(openai.AuthenticationError) as unknown:
        client.with_options(api_key="ts-nobody").models.list()
    assert unknown.value.code == "invalid_api_key"
    narrow = client.with_options(api_key=secrets[2])
    assert [model.id for model in narrow.models.list()] == [BASE]
    narrow.chat.completions.create(model=BASE, messages=HELLO, max_tokens=1)
    for forbidden in (
        lambda: narrow.chat.completions.create(model="alpha", messages=HELLO),
        lambda: narrow.models.retrieve("alpha"),
    ):
        with pytest.raises(openai.PermissionDeniedError) as denied:
            forbidden()
        assert denied.value.code == "model_not_allowed"


@pytest.mark.parametrize(
    ("asked", "what_sglang_does"),
    [
        # OpenAI refuses top_logprobs without logprobs; SGLang ignores it.
        ({"top_logprobs": 2}, lambda answer: answer.choices[0].logprobs is None),
        # OpenAI refuses fields that it does not know; SGLang ignores them.
        ({"extra_body": {"nonsense": 1}}, lambda answer: answer.choices[0].message.content),
        # OpenAI allows -2 to 2 and no other sampling; SGLang has more of its own.
        ({"extra_body": {"top_k": 1, "repetition_penalty": 1.1}}, lambda answer: answer.choices[0].message.content),
        # OpenAI refuses max_tokens = 0; SGLang answers with nothing.
        ({"max_tokens": 0}, lambda answer: answer.choices[0].message.content == ""),
    ],
    ids=["top_logprobs alone", "unknown fields", "own sampling", "no tokens"],
)
def test_where_sglang_is_another(client, asked, what_sglang_does):
    assert what_sglang_does(client.chat.completions.create(model=BASE, messages=HELLO, **{"max_tokens": 2, **asked}))


def test_a_client_that_leaves_ends_the_engines_work(client, server, secrets):
    def counted(name: str) -> float:
        page = httpx.get(f"{server.endpoint.url}/metrics", headers={"Authorization": f"Bearer {secrets[1]}"}).text
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"sglang:{name}{{"))

    finished = counted("num_requests_total")
    asked = {"model": BASE, "messages": HELLO, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(**asked, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(**asked)
    # The engine's figures follow its work: every look needs some. SGLang ends a stream's work 2 s after its reader.
    deadline, looks = time.monotonic() + 20, 0
    while looks == 0 or counted("num_running_reqs"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
        client.chat.completions.create(model=BASE, messages=HELLO, max_tokens=1)
        looks += 1
    assert counted("num_requests_total") - finished == looks, "neither came to its end"


def test_no_prompt_was_written_down(client, server):
    secret = "xyzzy-the-prompt-nobody-may-read"
    client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": secret}], max_tokens=1)
    for broken in ({"temperature": -1}, {"messages": [{"role": secret, "content": secret}]}, {"max_tokens": secret}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(
                **{"model": BASE, "messages": [{"role": "user", "content": secret}], **broken}
            )
    assert secret not in server.said
    assert secret not in (server.folder / "engine.log").read_text()
