"""From a conversation to token ids, and which of those tokens are the assistant's.

The ids must be those that a server will see: the whole conversation is rendered by the chat template and tokenized once
without added special tokens (the template writes its own; twice would be a double BOS). A token carries loss from the
first of an assistant's turn to its end-of-turn token, included: leave that out and generation never ends.

No `{% generation %}` markers are needed. The text before an assistant's turn is what the template renders with
`add_generation_prompt`; the turn ends at the last special token before whatever comes next.

A row of plain text has no turns: it is tokenized as it is, with the tokens that a tokenizer puts around a text, and all
of it is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from tuneship.core.errors import DataError
from tuneship.core.files import sha256_text
from tuneship.train.data import served

Loss = Literal["assistant", "completion", "all"]
Message = dict[str, Any]
Tools = list[dict[str, Any]]

IGNORED = -100
"""The label of a token without loss, as PyTorch's cross-entropy has it."""


class Conversation(NamedTuple):
    """One row as it was read: messages, and the tools that they may call; or a plain `text` and no messages."""

    messages: list[Message]
    tools: Tools | None = None
    text: str = ""


class Encoded(NamedTuple):
    """One row of T tokens. `labels` are `input_ids` where there is loss, else `IGNORED`."""

    input_ids: list[int]
    labels: list[int]
    messages: Sequence[Message] = ()
    """What was rendered, where it is known; empty for plain text."""
    lengths: Sequence[int] = ()
    """Of the rows that were packed into this one; empty: it is one row."""
    tools: Tools | None = None
    """What was rendered beside `messages`."""

    @property
    def loss_tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def loss_mask(self) -> list[int]:
        """1 where a token carries loss, else 0."""
        return [int(label != IGNORED) for label in self.labels]


class ChatTemplate:
    """How training makes ids of conversations: the tokenizer's own chat template, or the recipe's.

    The recipe's `text` (Jinja source) is set on the tokenizer too, so that `save_pretrained` writes it. Without any,
    `text` is empty and only rows of plain text can be encoded.
    """

    def __init__(self, tokenizer: Any, text: str = "") -> None:
        if text:
            tokenizer.chat_template = text
        own = tokenizer.chat_template or ""
        if not isinstance(own, str):
            raise DataError(
                f"the model has several chat templates: {', '.join(own)}", hint="write the one to use as data.template"
            )
        self.tokenizer = tokenizer
        self.text = own
        self.sha256 = sha256_text(own)
        self.source: Literal["model", "recipe"] = "recipe" if text else "model"
        self._ends = _ends(tokenizer)

    def render(self, messages: list[Message], *, tools: Tools | None = None, for_generation: bool = False) -> str:
        """The conversation as the model reads it from a server.

        Raises:
            DataError: there is no template, or it refuses these messages, in its own words.

        """
        if not self.text:
            raise DataError(
                "the base model has no chat template",
                hint='data.template = "alpaca" gives it one; rows of plain text need none',
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [served.message(message) for message in messages],
                tools=[served.tool(tool) for tool in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=for_generation,
            )
        except Exception as error:  # noqa: BLE001 - templates raise what they like: jinja errors, ValueError, TypeError
            raise DataError(f"the chat template refuses the row: {error}") from None
        return str(text)

    def encode(self, conversation: Conversation, loss: Loss = "assistant") -> Encoded:
        """Token ids and labels of one conversation; of a plain text, all of whose tokens carry loss.

        Raises:
            DataError: nothing would carry loss, a turn's start is not where the server's prompt ends, a turn has no
                end-of-turn token, or the template leaves out tools or calls of them.

        """
        if not conversation.messages:
            ids = self._text_ids(conversation.text)
            return Encoded(ids, list(ids))
        messages, tools = conversation.messages, conversation.tools
        self._require_tools(conversation)
        text = self._whole(conversation)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoding["input_ids"]
        if loss == "all":
            return Encoded(ids, list(ids), messages, tools=tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError("no assistant message: nothing would be learnt")
        labels = [IGNORED] * len(ids)
        for turn in turns if loss == "assistant" else turns[-1:]:
            first, last = self._turn(conversation, turn, text, ids, encoding["offset_mapping"])
            labels[first : last + 1] = ids[first : last + 1]
        return Encoded(ids, labels, messages, tools=tools)

    def _whole(self, conversation: Conversation) -> str:
        """The last prompt as a server renders it, and the answer.

        Some templates (Mistral's from v0.3 on) write the system message into the user's turn only while that waits for
        its answer, so that a whole conversation shows none of it. What such a template writes for the answer is taken
        from the same conversation without a system message.
        """
        messages, tools = conversation.messages, conversation.tools
        text = self.render(messages, tools=tools)
        if messages[-1]["role"] != "assistant":
            return text
        prompt = self.render(messages[:-1], tools=tools, for_generation=True)
        if text.startswith(prompt) or messages[0]["role"] != "system":
            return text
        answered = self._renders(messages[1:], tools)
        asked = self._renders(messages[1:-1], tools, for_generation=True)
        if answered is None or asked is None or not answered.startswith(asked):
            return text
        return prompt + answered.removeprefix(asked)

    def _turn(
        self, conversation: Conversation, turn: int, text: str, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[int, int]:
        """Index of the first token of an assistant's turn, and of its end-of-turn token."""
        messages, tools = conversation.messages, conversation.tools
        is_last = turn == len(messages) - 1
        prompt = self.render(messages[:turn], tools=tools, for_generation=True)
        through = text if is_last else self.render(messages[: turn + 1], tools=tools)
        if is_last and not text.startswith(prompt):
            raise DataError(
                f"the chat template renders what is before message {turn} differently once that is the answer",
                hint="no server would prefill this row; data.template can give it a template that does not",
            )
        if not text.startswith(prompt):
            raise DataError(
                f"the chat template renders what is before message {turn} differently once the conversation goes on",
                hint='no server would prefill it so; data.loss = "completion" learns the last answer alone, '
                'and data.template can give it a template that does not, as "mistral" for Mistral\'s family',
            )
        if not (text.startswith(through) and through.startswith(prompt)):
            raise DataError(
                f"the chat template renders message {turn} differently in mid-conversation",
                hint='data.loss = "completion" learns the last answer alone',
            )
        first = next((i for i, (start, _) in enumerate(offsets) if start >= len(prompt)), len(ids))
        inside = [i for i, (start, end) in enumerate(offsets) if first <= i and end <= len(through) and start < end]
        if ids[:first] != self.tokenizer(prompt, add_special_tokens=False)["input_ids"]:
            raise DataError(
                f"message {turn}: the tokenizer joins the end of the prompt and the start of the answer into one token",
                hint="remove white space at the start of the answer",
            )
        ends = [i for i in inside if ids[i] in self._ends]
        if not ends:
            raise DataError(
                f"message {turn}: the chat template writes no end-of-turn token after the answer",
                hint='it has to write {{ eos_token }} there, as data.template = "alpaca" does',
            )
        return first, ends[-1]

    def _require_tools(self, conversation: Conversation) -> None:
        """A template that knows no tools leaves them out without a word: then the model would learn to do without."""
        messages, tools = conversation.messages, conversation.tools
        with_calls = any(message.get("tool_calls") for message in messages)
        if not tools and not with_calls:
            return
        text = self.render(messages, tools=tools)
        if tools and self._renders(messages, None) == text:
            raise DataError(
                "the chat template writes no tools",
                hint="name them in a system message, or give data.template one that does",
            )
        bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        if with_calls and self._renders(bare, tools) == text:
            raise DataError(
                "the chat template writes no tool calls",
                hint="write them as the message's content, or give data.template one that does",
            )

    def _renders(self, messages: list[Message], tools: Tools | None, *, for_generation: bool = False) -> str | None:
        try:
            return self.render(messages, tools=tools, for_generation=for_generation)
        except DataError:
            return None

    def _text_ids(self, text: str) -> list[int]:
        """As a server prefills a text (with BOS where the tokenizer puts one, never twice), and the end token."""
        bos, end = self.tokenizer.bos_token, self.tokenizer.eos_token_id
        if end is None:
            raise DataError("the tokenizer has no end token: a text would have no end")
        has_bos = bool(bos) and text.startswith(bos)
        ids: list[int] = self.tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
        return ids if ids and ids[-1] == end else [*ids, end]


def end_token_ids(template: ChatTemplate, configured: list[int]) -> tuple[int, ...]:
    """The ids at which generation must stop: the template's end of turn first, then what the model's config names.

    Without a template it is the token that ends a text.
    """
    if template.text:
        example = template.encode(
            Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        )
        first = next(label for label in reversed(example.labels) if label != IGNORED)
    else:
        first = template.encode(Conversation([], text="a")).input_ids[-1]
    return tuple(dict.fromkeys([first, *configured]))


def _ends(tokenizer: Any) -> set[int]:
    """Tokens that may end a turn: special and added ones, but not pairs such as `<tool_call>` and `</tool_call>`."""
    added = tokenizer.added_tokens_decoder
    plain = {str(token) for token in added.values() if not token.special}
    closing = {text for text in plain if text.startswith("</") and text.replace("</", "<", 1) in plain}
    pairs = closing | {text.replace("</", "<", 1) for text in closing}
    return set(tokenizer.all_special_ids) | {index for index, token in added.items() if str(token) not in pairs}
