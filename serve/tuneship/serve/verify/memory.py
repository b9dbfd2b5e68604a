"""What the base of the running engine said: it does not depend on the adapter that is judged beside it.

    memory = Memory(lambda: supervisor.engine)
    said = await memory.ask(answers.asked, lambda: answers.score(scorer, None))     # of this engine, once
    memory.known(answers.asked)                                                     # None: not asked yet

Another engine is another server: whatever the one before said is forgotten.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

_T = TypeVar("_T")
_MOST = 16
"""Sets of figures that are kept: the held-out rows of so many data sets."""


class Memory:
    """Of the engine that `engine` is at the moment."""

    def __init__(self, engine: Callable[[], object] = lambda: None) -> None:
        self._engine = engine
        self._whose = engine()
        self._said: dict[Hashable, Any] = {}

    def known(self, about: Hashable) -> Any | None:
        """What it said about it when it was asked; None where it was not."""
        self._forget_others()
        return self._said.get(about)

    async def ask(self, about: Hashable, question: Callable[[], Awaitable[_T]]) -> _T:
        """The answer to `question`, which is kept unless another engine came meanwhile."""
        self._forget_others()
        whose = self._whose
        answer = await question()
        self._forget_others()
        if self._whose is whose:
            self._said.pop(about, None)
            self._said[about] = answer
            while len(self._said) > _MOST:
                del self._said[next(iter(self._said))]
        return answer

    def _forget_others(self) -> None:
        engine = self._engine()
        if engine is not self._whose:
            self._whose = engine
            self._said.clear()
