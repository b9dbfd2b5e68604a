"""The steps of a verification: score, measure, and where something is wrong find out what answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from tuneship.core.parity import Deferred, ReferenceRow
from tuneship.serve.verify import deferred, judge, rendering, unknown, words
from tuneship.serve.verify.judge import OTHER_BITS, SAME_BITS, Figures, Finding, Measured
from tuneship.serve.verify.rendering import Rendering
from tuneship.serve.verify.rows import Answers
from tuneship.serve.verify.scorer import Scorer
from tuneship.serve.verify.statistics import finite
from tuneship.serve.verify.unknown import Memory
from tuneship.serve.verify.verdict import Fault, Outcome, Verdict
from tuneship.serve.verify.words import Said


async def verify(
    scorer: Scorer,
    selector: str | None,
    reference: Sequence[ReferenceRow],
    *,
    others: Mapping[str, str] | None = None,
    same_bits: bool = False,
    own_base: bool = False,
    memory: Memory | None = None,
) -> Verdict:
    """Hold the adapter `selector` of this server against `reference`, the evidence of what was trained.

    The floor is the served base against the stored one, the limit twice that.

    Args:
        scorer: the server.
        selector: the adapter's name there.
        reference: `read_evidence` of its artifact; empty for an adapter from elsewhere.
        others: {public name: selector} of the server's other adapters, so that one that answers instead is named;
            asked only when something is wrong.
        same_bits: the base is known to be served in the quantization of training, so that less may lie between both.
        own_base: the base is known, by its weights' hash, to be the checkpoint of training, in whatever bits. Then what
            lies between both is quantization, however much it is.
        memory: what earlier verifications of adapters from elsewhere found out about this server's base.

    Raises:
        TuneshipError: the server does not answer, or refuses to score.

    """
    if not reference:
        return await unknown.verify(scorer, selector, memory)
    answers = Answers.of(reference)
    served_base, served, rendered = await asyncio.gather(
        answers.score(scorer, None), answers.score(scorer, selector), rendering.compare(scorer, reference)
    )
    figures = Figures(answers.base, answers.trained, served_base, served)
    measured = judge.measure_adapter(figures)
    finding = Finding(Fault.NONE)
    far = judge.is_other_base(figures, SAME_BITS if same_bits else OTHER_BITS)
    quantized = far and own_base and not same_bits  # so much can quantization do
    hidden = False
    if far and not quantized:
        finding = Finding(Fault.OTHER_BASE)
    elif quantized and judge.is_missing(figures):
        finding = Finding(Fault.BASE)
    elif measured.wrong:
        known = {name: await answers.score(scorer, other) for name, other in (others or {}).items()}
        finding = judge.diagnose(figures, measured, known)
        hidden = quantized and finite(served) and not finding.who and finding.fault is not Fault.BASE
        finding = Finding(Fault.NONE) if hidden else finding
    return _verdict(answers, measured, finding, rendered, hidden=hidden, merged=False, same_bits=same_bits)


async def verify_merged(
    scorer: Scorer,
    reference: Sequence[ReferenceRow],
    *,
    selector: str | None = None,
    float32: bool = False,
    left: Deferred | None = None,
) -> Verdict:
    """Hold the model of this server against `reference`, the evidence of the merged checkpoint.

    There is no base to measure a floor on. It is what arithmetic is known to do to one checkpoint, or what this server
    does to the same rows in other batches, whichever is more; `float32` says that both sides computed in it. Where
    merging measured nothing, `left` says so, and the trained model is what it is held against.

    Raises:
        TuneshipError: as `verify`.

    """
    if left and reference and all(row.merged is None for row in reference):
        return await deferred.verify(scorer, selector, reference, left)
    if not reference or any(row.merged is None for row in reference):
        return Verdict(Outcome.NO_EVIDENCE, Fault.NONE, "nobody stored what the merged model says")
    answers = Answers.of(reference, merged=True)
    served, rendered = await asyncio.gather(answers.score(scorer, selector), rendering.compare(scorer, reference))
    again = await answers.score_apart(scorer, selector)
    figures = Figures(answers.base, answers.trained, answers.base, served)
    measured = judge.measure_merged(figures, again, float32=float32)
    finding = judge.diagnose(figures, measured, {}) if measured.wrong else Finding(Fault.NONE)
    return _verdict(answers, measured, finding, rendered, hidden=False, merged=True)


def _verdict(
    answers: Answers,
    measured: Measured,
    finding: Finding,
    rendered: Rendering,
    *,
    hidden: bool,
    merged: bool,
    same_bits: bool = False,
) -> Verdict:
    """What answers is worse than how it is asked, and both are worse than to know too little."""
    outcome, fault, said = (
        Outcome.PASSED,
        Fault.NONE,
        Said(words.passed(measured, rendered.prompts, same_bits=same_bits)),
    )
    if answers.tokens < judge.LEAST_TOKENS:
        outcome, said = Outcome.CANNOT_TELL, words.too_few(answers.tokens, measured)
    elif finding.fault:
        outcome, fault, said = Outcome.FAILED, finding.fault, words.fault(finding, measured, merged=merged)
    elif rendered.first_other:
        outcome, fault, said = Outcome.FAILED, Fault.TEMPLATE, words.template(*rendered.first_other)
    elif hidden:
        outcome, said = Outcome.CANNOT_TELL, words.hidden(measured)
    elif not measured.strong:
        outcome, said = Outcome.CANNOT_TELL, words.too_weak(measured, merged=merged)
    elif not measured.close:
        outcome, said = Outcome.CANNOT_TELL, words.too_few(answers.tokens, measured)
    return Verdict(
        outcome,
        fault,
        said.message,
        said.hint,
        noise_floor=measured.floor,
        base_noise=measured.base_noise,
        deviation=measured.deviation,
        limit=measured.limit,
        power=measured.power,
        scale=measured.effect.slope,
        rows=len(answers.ids),
        tokens=answers.tokens,
        prompts=rendered.prompts,
    )
