"""What is sent, and when: prompts of a fixed length on an absolute schedule, the same for the same seed.

    requests = plan(rate=4, duration_s=30, arrivals="poisson", input_tokens=128, output_tokens=64, models=("sql",))

A prompt is a row of common English words, which most tokenizers turn into one token each; the token counts of a result
are the server's own. `salt` changes only the first words of every prompt: two runs with the same seed then send the
same lengths at the same times, but the second is not answered from the server's prefix cache.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Arrivals = Literal["constant", "poisson"]
Messages = list[dict[str, Any]]
"""A chat: {"role": ..., "content": ...}."""

_SALT_WORDS = 4

_TEXT = """
    about above across action after again against age ago agree air all allow almost alone along already also always
    among amount animal answer any appear apple area arm around arrive art ask away back bad ball bank base be bear
    beat because become bed before begin behind believe below best better between big bird black blood blue board
    boat body book both bottom box boy branch bread break bright bring brother brown build burn busy but buy by call
    camp can car care carry case catch cause center chance change check child choose church circle city claim class
    clean clear climb close cloth cloud cold color come common company complete condition consider contain continue
    control cook cool copy corn corner correct cost count country course cover cross crowd cry current cut dance
    dark day dead deal decide deep describe desert design develop differ direct discuss distant divide doctor dog
    dollar door down draw dream dress drink drive drop dry during each ear early earth east easy eat edge effect
    egg eight either electric else end energy engine enough enter equal even evening event every exact example
    except excite exercise expect experience eye face fact fair fall family famous far farm fast father favor fear
    feed feel few field fight figure fill final find fine finger finish fire first fish fit five flat floor flow
    flower fly follow food foot for force forest form forward four free fresh friend from front fruit full fun game
    garden gas gather general gentle get girl give glad glass go gold good govern grand grass gray great green
"""
_WORDS = tuple(_TEXT.split())


class Request(NamedTuple):
    """One request of a load: when it leaves (seconds from the start), to which model, and how much it asks for."""

    at_s: float
    model: str
    messages: Messages
    output_tokens: int
    ignore_eos: bool = True
    """Force `output_tokens` tokens; else the model may stop earlier."""


def plan(
    *,
    rate: float,
    duration_s: float,
    arrivals: Arrivals,
    input_tokens: int,
    output_tokens: int,
    models: Sequence[str],
    seed: int = 0,
    salt: str = "",
) -> list[Request]:
    """Every request of one load level; each goes to one of `models`, drawn uniformly.

    Args:
        rate: requests per second offered.
        duration_s: arrivals fall in [0, duration_s); the first is at 0.
        arrivals: evenly spaced, or with exponential gaps.
        input_tokens: words a prompt; the chat template comes on top.
        output_tokens: asked for, and forced with `ignore_eos`.
        models: names to send as `model`.
        seed: the same seed gives the same times, models and prompts.
        salt: see above.

    """
    times = schedule(arrivals, rate, duration_s, seed)
    choose = random.Random(f"model {seed} {rate}")
    return [
        Request(
            at_s, choose.choice(models), ask(make_prompt(input_tokens, f"{seed} {rate} {index}", salt)), output_tokens
        )
        for index, at_s in enumerate(times)
    ]


def schedule(arrivals: Arrivals, rate: float, duration_s: float, seed: int = 0) -> list[float]:
    """Arrival times in seconds from the start, ascending, in [0, duration_s)."""
    if arrivals == "constant":
        count = max(1, int(rate * duration_s))
        return [index / rate for index in range(count)]
    gaps = random.Random(f"arrivals {seed} {rate}")
    times = [0.0]
    while (following := times[-1] + gaps.expovariate(rate)) < duration_s:
        times.append(following)
    return times


def ask(text: str) -> Messages:
    """A chat of one question."""
    return [{"role": "user", "content": text}]


def make_prompt(words: int, seed: str, salt: str = "") -> str:
    """A row of `words` common words."""
    salted = min(_SALT_WORDS, words) if salt else 0
    head = random.Random(f"{salt} {seed}").choices(_WORDS, k=salted)
    body = random.Random(f"prompt {seed}").choices(_WORDS, k=words)
    return " ".join(head + body[salted:])


def describe(input_tokens: int, output_tokens: int) -> str:
    """The workload's name in a report: levels of two reports are compared when it agrees."""
    return f"fixed {input_tokens} in, {output_tokens} out"
