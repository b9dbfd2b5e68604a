"""What is said about a measurement."""

from __future__ import annotations

from typing import NamedTuple

from tuneship.serve.verify.judge import Finding, Measured
from tuneship.serve.verify.verdict import Fault

MORE_ROWS = (
    "`tuneship verify ARTIFACT` without --rows asks about all rows that its training held out; if these were all of "
    "them, put more rows into data.heldout and train again"
)
_BITS_OF_TRAINING = "serve the base in the bits of training (for QLoRA --quantization nf4, or dequantized)"


class Said(NamedTuple):
    """A sentence and what to do about it."""

    message: str
    hint: str = ""


def passed(measured: Measured, prompts: int, *, same_bits: bool = False) -> str:
    """The proof in one sentence."""
    rendered = "" if prompts else "; how chats are rendered was not compared, the evidence has none"
    power = f"the base would be {measured.power:.1f} limits away"
    return f"{_distance(measured)}; {power}{_bits(measured, same_bits)}{rendered}"


def _bits(measured: Measured, same_bits: bool) -> str:
    """What is to be said of a base that is farther from the stored one than arithmetic usually puts it."""
    away = f"{measured.base_noise.mean:.3f} nats per token"
    if not measured.other_bits:
        return ""
    if same_bits:
        return f"; this server's arithmetic puts the base {away} from training's: the limit is the wider for it"
    return (
        f"; the base is served in other bits than it was trained on, {away} away: the limit is the wider for it, and a "
        "wrong strength may pass"
    )


def too_weak(measured: Measured, *, merged: bool) -> Said:
    """Nothing is wrong, and nothing is proven."""
    apart = f"the trained model and its base cannot be told apart here ({measured.power:.2f} limits)"
    if measured.other_bits and not merged:
        return Said(
            f"{apart}: the served base is {measured.base_noise.mean:.3f} nats per token from the one of training",
            _BITS_OF_TRAINING,
        )
    return Said(
        f"{apart}: training changed these answers by no more than arithmetic may",
        f"{MORE_ROWS}; best are rows that show what was learnt",
    )


def hidden(measured: Measured) -> Said:
    """It is the base of training, and quantization changed it so much that nothing can be seen through it."""
    return Said(
        f"the base is served in other bits than it was trained on, {measured.base_noise.mean:.3f} nats per token away: "
        "too far to tell what answers",
        _BITS_OF_TRAINING,
    )


def too_few(tokens: int, measured: Measured) -> Said:
    """Chance may do as much with so few."""
    return Said(f"{tokens} tokens are too few to tell: {_distance(measured)}", MORE_ROWS)


def fault(finding: Finding, measured: Measured, *, merged: bool) -> Said:
    """What answers instead."""
    strength = f"{measured.effect.slope:.2f}"
    distance = _distance(measured)
    if finding.fault is Fault.BASE:
        return Said(
            f"the base answers in its place: {distance}",
            "this is the checkpoint before training" if merged else "the adapter is not applied: load it again",
        )
    if finding.fault is Fault.OTHER_ADAPTER:
        who = f"{finding.who!r} answers" if finding.who else "another model answers"
        return Said(f"{who} in its place: {distance}", "its files are not those that were trained: load it again")
    if finding.fault is Fault.SCALE:
        return Said(
            f"it answers with what it was trained to do, at another strength ({strength} of the effect): {distance}",
            "lora_alpha, r or use_rslora are not those of training, or it is another checkpoint of that training",
        )
    if finding.fault is Fault.OTHER_BASE:
        return Said(
            f"another base is served than it was trained on: {measured.base_noise.mean:.3f} nats per token from the "
            "stored one, more than any quantization makes",
            "serve the base that artifact.json names",
        )
    return Said(f"something else answers: {distance}, {strength} of the trained effect is there")


def template(prompt: int, position: int) -> Said:
    """The server renders a conversation differently."""
    return Said(
        f"the server renders conversation {prompt} differently than training did, from token {position} on",
        "serve the chat template of training (artifact.json: template), or train with the server's",
    )


def _distance(measured: Measured) -> str:
    deviation, limit = measured.deviation, measured.limit
    return (
        f"{deviation.mean:.4f} nats per token from the trained model (limit {limit.mean:.4f}), "
        f"0.95 quantile {deviation.high:.4f} (limit {limit.high:.4f})"
    )
