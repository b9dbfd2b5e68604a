"""From messages to token ids, and which of those tokens are the assistant's.

The ids must be those that a server will see: the whole conversation is rendered by the chat template and tokenized once
without added special tokens (the template writes its own; twice would be a double BOS). A token carries loss from the
first of an assistant's turn to its end-of-turn token, included: leave that out and generation never ends.

No `{% generation %}` markers are needed. The text before an assistant's turn is what the template renders with
`add_generation_prompt`; the turn ends at the last special token before whatever comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from tuneship.core.errors import DataError
from tuneship.core.files import sha256_text

Loss = Literal["assistant", "completion", "all"]
Message = dict[str, Any]

IGNORED = -100
"""The label of a token without loss, as PyTorch's cross-entropy has it."""


class Encoded(NamedTuple):
    """One row of T tokens. `labels` are `input_ids` where there is loss, else `IGNORED`."""

    input_ids: list[int]
    labels: list[int]
    messages: Sequence[Message] = ()
    """What was rendered, where it is known."""
    lengths: Sequence[int] = ()
    """Of the rows that were packed into this one; empty: it is one row."""

    @property
    def loss_tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def loss_mask(self) -> list[int]:
        """1 where a token carries loss, else 0."""
        return [int(label != IGNORED) for label in self.labels]


class ChatTemplate:
    """A tokenizer's chat template, as training uses it."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the base model has no chat template",
                hint="choose its instruct variant (data.template is not yet supported)",
            )
        self.tokenizer = tokenizer
        self.text: str = tokenizer.chat_template
        self.sha256 = sha256_text(self.text)
        self._special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)

    def render(self, messages: list[Message], *, for_generation: bool = False) -> str:
        """The conversation as the model reads it.

        Raises:
            DataError: the template refuses these messages, in its own words.

        """
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_generation)
        except Exception as error:  # noqa: BLE001 - templates raise what they like: jinja errors, ValueError, TypeError
            raise DataError(f"the chat template refuses the row: {error}") from None
        return str(text)

    def encode(self, messages: list[Message], loss: Loss = "assistant") -> Encoded:
        """Token ids and labels of one conversation.

        Raises:
            DataError: nothing would carry loss, a turn's start is not where the server's prompt ends, or a turn has no
                end-of-turn token.

        """
        text = self.render(messages)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoding["input_ids"]
        if loss == "all":
            return Encoded(ids, list(ids), messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError("no assistant message: nothing would be learnt")
        labels = [IGNORED] * len(ids)
        for turn in turns if loss == "assistant" else turns[-1:]:
            first, last = self._turn(messages, turn, text, ids, encoding["offset_mapping"])
            labels[first : last + 1] = ids[first : last + 1]
        return Encoded(ids, labels, messages)

    def _turn(
        self, messages: list[Message], turn: int, text: str, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[int, int]:
        """Index of the first token of an assistant's turn, and of its end-of-turn token."""
        prompt = self.render(messages[:turn], for_generation=True)
        through = self.render(messages[: turn + 1])
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
        ends = [i for i in inside if ids[i] in self._special]
        if not ends:
            raise DataError(f"message {turn}: the chat template writes no end-of-turn token after the answer")
        return first, ends[-1]


def end_token_ids(template: ChatTemplate, configured: list[int]) -> tuple[int, ...]:
    """The ids at which generation must stop: the template's end of turn first, then what the model's config names."""
    example = template.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    end_of_turn = next(label for label in reversed(example.labels) if label != IGNORED)
    return tuple(dict.fromkeys([end_of_turn, *configured]))
