"""What is sent, and when: prompts on an absolute schedule, each to one of the models, the same for the same seed.

prompts = source("fixed", input_tokens=128, output_tokens=64)
requests = plan(schedule("poisson", 4, 30), prompts, level="4/s", models=("sql",), input_tokens=128, output_tokens=64)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tuneship.bench.load.arrivals import Arrival
from tuneship.bench.load.prompts import Messages, Prompts
from tuneship.core.errors import EndpointError

Mix = str | Mapping[str, float]
"""`uniform`, `zipf` (the first model most often), or a weight for each model."""


class Request(NamedTuple):
    """One request of a load: when it leaves (seconds from the start), to which model, and how much it asks for."""

    at_s: float
    model: str
    messages: Messages
    output_tokens: int
    ignore_eos: bool = True
    """Force `output_tokens` tokens; else the model may stop earlier."""


def plan(
    arrivals: Sequence[Arrival],
    prompts: Prompts,
    *,
    level: str,
    models: Sequence[str],
    input_tokens: int,
    output_tokens: int,
    mix: Mix = "uniform",
    seed: int = 0,
) -> list[Request]:
    """Every request of one load level, in order of time.

    Args:
        arrivals: when; one with lengths or messages of its own keeps them.
        prompts: what else is asked.
        level: part of every seed, so that no two levels ask the same.
        models: names to send as `model`.
        input_tokens: of an arrival that does not say.
        output_tokens: of an arrival that does not say.
        mix: how requests are spread over `models`.
        seed: of the models drawn.

    Raises:
        EndpointError: `mix` weighs other models.

    """
    chosen = random.Random(f"model {seed} {level}").choices(models, weigh(models, mix), k=len(arrivals))
    return [
        Request(
            arrival.at_s,
            model,
            arrival.messages or prompts.make(level, index, arrival.input_tokens or input_tokens),
            arrival.output_tokens or output_tokens,
            prompts.ignore_eos and not arrival.messages,
        )
        for index, (arrival, model) in enumerate(zip(arrivals, chosen, strict=True))
    ]


def weigh(models: Sequence[str], mix: Mix) -> list[float]:
    """How often each of `models` is asked, up to a factor; Zipf's law with exponent 1, in their order.

    Raises:
        EndpointError: `mix` weighs other models.

    """
    if isinstance(mix, str):
        return [1 / rank if mix == "zipf" else 1.0 for rank, _ in enumerate(models, 1)]
    if missing := set(mix) ^ set(models):
        raise EndpointError(
            f"the weights and the models differ: {', '.join(sorted(missing))}",
            hint=f"weigh each of: {', '.join(models)}",
        )
    return [mix[model] for model in models]
