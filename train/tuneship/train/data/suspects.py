"""What training would take without a word, and what hardly anybody means: looked for row by row."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tuneship.core.errors import DataError
from tuneship.train.data.template import IGNORED, ChatTemplate, Conversation, Encoded


class Suspects:
    """Under one template; `end_ids` are where generation stops. Each method says what it found, or nothing."""

    def __init__(self, template: ChatTemplate, end_ids: Sequence[int]) -> None:
        self._tokenizer = template.tokenizer
        self._ends = set(end_ids)
        self._bos: int | None = template.tokenizer.bos_token_id
        self._bos_may_come_again = self._bos == template.tokenizer.eos_token_id or _writes_bos_per_turn(template)
        words = [str(token) for token in template.tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")
        self.notes = _notes(template)

    def without_end(self, row: Encoded) -> str:
        """Something that is learnt whose end is not: white space behind an end does not count."""
        learnt = np.asarray(row.labels) != IGNORED
        for last in np.flatnonzero(learnt & ~np.append(learnt[1:], False)):
            index = int(last)
            while row.input_ids[index] not in self._ends and index > 0 and self._is_blank(row.input_ids[index]):
                index -= 1
            if row.input_ids[index] not in self._ends:
                return f"ends with {self._decode(row.input_ids[max(0, index - 3) : index + 1])!r}"
        return ""

    def double_bos(self, row: Encoded) -> str:
        """Two at the start; or one later, where the template does not begin turns with it."""
        if self._bos is None:
            return ""
        if row.input_ids[:2] == [self._bos, self._bos]:
            return "begins with two"
        if not self._bos_may_come_again and self._bos in row.input_ids[1:]:
            return f"has one more as its token {row.input_ids.index(self._bos, 1) + 1}"
        return ""

    def special_text(self, conversation: Conversation) -> str:
        """In a message; a plain text may well be written with them."""
        for index, message in enumerate(conversation.messages):
            found = self._special.search(message.get("content") or "")
            if found:
                return f"message {index} ({message['role']}) has {found[0]}"
        return ""

    def _is_blank(self, token: int) -> bool:
        return not self._decode([token]).strip()

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _writes_bos_per_turn(template: ChatTemplate) -> bool:
    """Whether BOS is what the template begins turns with, as in SmolLM2's."""
    bos = template.tokenizer.bos_token
    if not bos or not template.text:
        return False
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        return template.render([*turns, *turns]).count(bos) > 1
    except DataError:
        return True


def _notes(template: ChatTemplate) -> list[str]:
    """What the template does to all rows."""
    dated = (
        "the chat template writes the day's date into every prompt: what is learnt today is asked for otherwise later"
    )
    return [dated] if "strftime_now" in template.text else []
