"""Synthetic log-probabilities: what training stored, and what a server says with one fault or another."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

from tuneship.core.parity import ReferenceRow
from tuneship.serve.verify import Verdict, verify

Figures = dict[str | None, list[list[float]]]
PROMPT = 4


class World(NamedTuple):
    """Rows of evidence and what a server says about them, by selector; every figure over all of a row's tokens."""

    reference: list[ReferenceRow]
    server: Figures


class FakeServer:
    """A `Scorer` that gives prepared figures, and renders every chat as training did."""

    def __init__(self, world: World, prompt: list[int] | None = None) -> None:
        self.world, self.prompt, self.asked, self.tools = world, prompt, [], []
        self.by_ids = {tuple(row.input_ids): number for number, row in enumerate(world.reference)}

    async def logprobs(self, selector, rows, starts):
        self.asked.append(selector)
        numbers = [self.by_ids[tuple(ids)] for ids in rows]
        return [self.world.server[selector][n][start:] for n, start in zip(numbers, starts, strict=True)]

    async def tokenize(self, messages, tools=None):
        self.tools.append(tools)
        ids = self.world.reference[int(messages[0]["content"])].input_ids[:PROMPT]
        return ids if self.prompt is None else self.prompt


def make_world(
    seed: int = 0, *, rows: int = 16, answer: int = 30, signal: float = 0.8, noise: float = 0.02, bits: float = 0.0
) -> World:
    """A base, an adapter that changes it by some `signal`, and a server whose arithmetic differs by `noise`.

    `bits` is what another quantization of the served base changes, the same for whatever stands on that base.
    """
    draw = random.Random(seed)
    shapes = [PROMPT + max(1, int(answer * draw.uniform(0.3, 1.7))) for _ in range(rows)]

    def each(make: Callable[[], float]) -> list[list[float]]:
        return [[0.0, *(make() for _ in range(length - 1))] for length in shapes]

    def tuned(part: list[list[float]], power: float) -> list[list[float]]:
        """The base as it is with `part` on it; log p is multiplied, so that it stays one."""
        pairs = zip(base, part, strict=True)
        return [[b * math.exp(-e * power) for b, e in zip(*pair, strict=True)] for pair in pairs]

    def disturbed(figures: list[list[float]]) -> list[list[float]]:
        """On that server: logits move, and log p with them in proportion to 1 - p."""
        return [
            [
                f - math.expm1(f) * (q + draw.gauss(0, noise) * math.exp(draw.gauss(0, 0.5)))
                for f, q in zip(*row, strict=True)
            ]
            for row in zip(figures, quantized, strict=True)
        ]

    base = each(lambda: -draw.expovariate(0.4))
    change = each(lambda: abs(draw.gauss(0, signal)))
    foreign = each(lambda: draw.gauss(0, signal))
    quantized = each(lambda: draw.gauss(0, bits))
    trained = tuned(change, 1)
    reference = [
        ReferenceRow(
            input_ids=[number, *draw.choices(range(1000), k=length - 1)],
            loss_mask=[0] * PROMPT + [1] * (length - PROMPT),
            dtype="float32",
            base=base[number],
            trained=trained[number],
            merged=trained[number],
            messages=[{"role": "user", "content": str(number)}, {"role": "assistant", "content": "x"}],
        )
        for number, length in enumerate(shapes)
    ]
    server: Figures = {
        None: disturbed(base),
        "good": disturbed(trained),
        "half": disturbed(tuned(change, 0.5)),
        "double": disturbed(tuned(change, 2)),
        "other": disturbed(tuned(foreign, 1)),
        "broken": each(lambda: math.nan),
    }
    nearly = {"base": server[None], "alias": server["other"]}
    server |= {name: [[f + draw.gauss(0, noise / 10) for f in row] for row in rows] for name, rows in nearly.items()}
    return World(reference, server)


async def judged(world: World, selector: str | None, **options) -> Verdict:
    return await verify(FakeServer(world), selector, world.reference, **options)
