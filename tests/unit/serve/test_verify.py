"""The verdict on synthetic log-probabilities: planted faults are named, healthy servers pass, weak evidence says so."""

from __future__ import annotations

import asyncio
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.serve.worlds import PROMPT, FakeServer, World, judged, make_world
from tuneship.core.errors import ArtifactError, ParityError
from tuneship.core.parity import Deferred, read_reference, write_reference
from tuneship.serve.verify import Budget, Fault, Outcome, Verdict, read_deferred, read_evidence, verify, verify_merged
from tuneship.serve.verify.scorer import ServerFault, batches, prompt_ids

SERVED = ("good", "base", "half", "double", "other")


@pytest.mark.parametrize("noise", [0.0, 1e-5, 0.02, 0.05])
@pytest.mark.parametrize(
    ("selector", "fault"),
    [
        ("good", Fault.NONE),
        ("base", Fault.BASE),
        ("half", Fault.SCALE),
        ("double", Fault.SCALE),
        ("other", Fault.OTHER_ADAPTER),
        ("broken", Fault.UNKNOWN),
    ],
)
async def test_what_answers_is_named(selector, fault, noise):
    verdict = await judged(make_world(noise=noise), selector)
    assert (verdict.fault, verdict.passed) == (fault, fault is Fault.NONE), verdict.message
    assert verdict.message
    assert verdict.power > 1
    if fault:
        assert verdict.outcome is Outcome.FAILED
        assert verdict.verified.startswith("failed: ")
        with pytest.raises(ParityError, match=r"in its place|to do|something else"):
            verdict.require()
    else:
        assert verdict.verified == "passed"
        verdict.require()


async def test_how_much_of_the_effect_is_there():
    scales = [(await judged(make_world(), selector)).scale for selector in ("base", "half", "good", "double")]
    assert scales == sorted(scales)
    assert scales[0] == pytest.approx(0, abs=0.02)
    assert 0.4 < scales[1] < 0.75
    assert scales[2] == pytest.approx(1, abs=0.02)


async def test_another_adapter_of_that_server_is_called_by_name_and_asked_only_then():
    world = make_world()
    server = FakeServer(world)
    verdict = await verify(server, "alias", world.reference, others={"mail": "half", "sql": "other"})
    assert verdict.fault is Fault.OTHER_ADAPTER
    assert "'sql' answers in its place" in verdict.message
    assert server.asked == [None, "alias", "half", "other"]
    server.asked.clear()
    assert (await verify(server, "good", world.reference, others={"sql": "other"})).passed
    assert server.asked == [None, "good"]


async def test_the_right_adapter_under_another_name_is_not_what_answers_at_half_its_strength():
    verdict = await judged(make_world(), "half", others={"right": "good"})
    assert (verdict.fault, "right" in verdict.message) == (Fault.SCALE, False)


async def test_another_base_is_named_whatever_the_adapter_does():
    world = make_world()
    figures = [figure for row in make_world(seed=1).server[None] for figure in row]
    server = {name: [[*row] for row in rows] for name, rows in world.server.items()}
    server[None] = [
        [0.0, *random.Random(n).choices(figures, k=len(row) - 1)] for n, row in enumerate(world.server[None])
    ]
    for selector in ("good", "other", "base"):
        verdict = await judged(World(world.reference, server), selector)
        assert verdict.fault is Fault.OTHER_BASE, verdict.message


async def test_a_base_that_is_known_by_its_hash_is_not_called_another_one_however_far_quantization_puts_it():
    """SmolLM2-135M on another task than it was shown to us on: 2.0 nats per token between bf16 and NF4."""
    world = make_world(bits=4.0)
    assert (await judged(world, "good")).fault is Fault.OTHER_BASE
    assert (await judged(world, "good", own_base=True, same_bits=True)).fault is Fault.OTHER_BASE
    verdict = await judged(world, "good", own_base=True)
    assert (verdict.outcome, verdict.fault) == (Outcome.CANNOT_TELL, Fault.NONE), verdict.message
    assert "--quantization nf4" in verdict.hint
    for selector in ("base", None):  # an adapter that is not applied is seen through any bits
        assert (await judged(world, selector, own_base=True)).fault is Fault.BASE
    assert (await judged(world, "broken", own_base=True)).outcome is Outcome.FAILED
    learnt = make_world(bits=4.0, signal=6.0)
    passed = await judged(learnt, "good", own_base=True)
    assert passed.passed, passed.message
    assert "in other bits" in passed.message
    assert "too far to tell" in (await judged(learnt, "other", own_base=True)).message
    named = await judged(learnt, "other", own_base=True, others={"sql": "alias"})
    assert named.fault is Fault.OTHER_ADAPTER, named.message


async def test_other_bits_pass_where_the_signal_is_larger_and_are_told_where_they_must_not_be():
    world = make_world(bits=0.25)
    verdict = await judged(world, "good")
    assert verdict.passed, verdict.message
    assert verdict.base_noise.mean == pytest.approx(0.25 * math.sqrt(2 / math.pi) * 0.71, abs=0.02)  # 0.71: mean 1 - p
    assert verdict.noise_floor.mean < verdict.base_noise.mean, "the trained model is surer than its base"
    assert "in other bits" in verdict.message
    known = await judged(world, "good", same_bits=True)
    assert known.passed
    assert "this server's arithmetic" in known.message
    assert "other bits" not in known.message
    for selector, fault in (("base", Fault.BASE), ("other", Fault.OTHER_ADAPTER)):
        assert (await judged(world, selector)).fault is fault
    assert (await judged(make_world(bits=0.9), "good", same_bits=True)).fault is Fault.OTHER_BASE


async def test_a_floor_above_what_training_changed_is_no_pass():
    """The base itself would pass there."""
    cases = itertools.product(("good", "base"), ((0.25, "the served base is"), (0.0, "training changed these answers")))
    for selector, (bits, why) in cases:
        verdict = await judged(make_world(signal=0.1 if bits else 0.001, bits=bits), selector)
        assert why in verdict.message
        assert verdict.outcome is Outcome.CANNOT_TELL
        assert verdict.power < 1
        assert not verdict.passed
        assert verdict.verified.startswith("cannot tell: ")
        verdict.require()


@pytest.mark.parametrize("selector", ["good", "base"])
async def test_few_tokens_prove_nothing(selector):
    verdict = await judged(make_world(rows=2, answer=5), selector)
    assert verdict.tokens < 30
    assert verdict.outcome is Outcome.CANNOT_TELL
    assert "too few" in verdict.message


async def test_the_rendering_is_compared_up_to_the_answer():
    world = make_world()
    verdict = await verify(FakeServer(world, prompt=[1, 2]), "good", world.reference)
    assert (verdict.fault, verdict.prompts) == (Fault.TEMPLATE, 16)
    assert "conversation 0 " in verdict.message
    longer = [*world.reference[0].input_ids[:PROMPT], 7]
    verdict = await verify(FakeServer(world, prompt=longer), "good", world.reference)
    assert verdict.fault is Fault.TEMPLATE
    assert f"from token {PROMPT} on" in verdict.message
    silent = [row.model_copy(update={"messages": None}) for row in world.reference]
    verdict = await verify(FakeServer(world, prompt=[1]), "good", silent)
    assert (verdict.passed, verdict.prompts) == (True, 0)
    assert "the evidence has none" in verdict.message
    everywhere = [row.model_copy(update={"loss_mask": [1] * len(row.input_ids)}) for row in world.reference]
    assert (await verify(FakeServer(world), "good", everywhere)).passed
    assert (await verify(FakeServer(world, prompt=[1]), "good", everywhere)).fault is Fault.TEMPLATE


async def test_a_worse_fault_than_the_template_is_told_first():
    world = make_world()
    assert (await verify(FakeServer(world, prompt=[1]), "base", world.reference)).fault is Fault.BASE


@given(
    seed=st.integers(0, 10**6),
    noise=st.sampled_from([0.0, 1e-4, 0.01, 0.05]),
    rows=st.integers(2, 16),
    answer=st.integers(3, 60),
)
@settings(max_examples=150, deadline=None)
async def test_a_healthy_server_is_never_failed(seed, noise, rows, answer):
    verdict = await judged(make_world(seed, rows=rows, answer=answer, noise=noise), "good")
    assert verdict.outcome is not Outcome.FAILED, verdict.message


@given(
    seed=st.integers(0, 10**6),
    noise=st.sampled_from([0.0, 1e-4, 0.01, 0.05]),
    bits=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    signal=st.sampled_from([0.01, 0.1, 0.5, 1.5]),
    rows=st.integers(1, 16),
    answer=st.integers(1, 60),
)
@settings(max_examples=200, deadline=None)
async def test_the_base_never_passes_for_an_adapter(seed, noise, bits, signal, rows, answer):
    world = make_world(seed, rows=rows, answer=answer, noise=noise, bits=bits, signal=signal)
    assert not (await judged(world, "base")).passed


async def test_merged():
    world = make_world(noise=0.02)

    async def of(selector: str, **options) -> Verdict:
        return await verify_merged(FakeServer(world), world.reference, selector=selector, **options)

    assert (await of("good")).passed
    assert (await of("base")).fault is Fault.BASE
    assert (await of("half")).fault is Fault.SCALE
    assert (await of("other")).fault is Fault.OTHER_ADAPTER
    assert (await of("broken")).fault is Fault.UNKNOWN
    exact = make_world(noise=0.0)
    assert (await verify_merged(FakeServer(exact), exact.reference, selector="good", float32=True)).passed
    assert not (await of("good", float32=True)).passed, "16 bits were taken for 32"
    weak = make_world(signal=0.02)
    assert (await verify_merged(FakeServer(weak), weak.reference, selector="good")).outcome is Outcome.CANNOT_TELL
    unmerged = [row.model_copy(update={"merged": None}) for row in world.reference]
    for reference in (unmerged, []):
        verdict = await verify_merged(FakeServer(world), reference, selector="good")
        assert (verdict.outcome, verdict.verified) == (Outcome.NO_EVIDENCE, "no evidence")


async def test_merged_where_merging_measured_nothing():
    """One-sided: by how much it is worse than the trained model, which alone is stored."""
    left = Deferred(merged_into="original", reason="it did not fit", limit=0.02)

    def unmerged(world: World) -> World:
        return world._replace(reference=[row.model_copy(update={"merged": None}) for row in world.reference])

    async def of(world: World, selector: str, limit: float = 0.02, **server) -> Verdict:
        asked = FakeServer(unmerged(world), **server)
        left_to = left.model_copy(update={"limit": limit})
        return await verify_merged(asked, asked.world.reference, selector=selector, left=left_to)

    world = make_world(rows=40, noise=0.02)
    good = await of(world, "good")
    assert good.passed
    assert good.power > 1
    assert abs(good.deviation.mean) < 0.02
    for selector in ("base", "half", "other", "broken"):
        verdict = await of(world, selector)
        assert (verdict.outcome, verdict.fault) == (Outcome.FAILED, Fault.MERGE), selector
        with pytest.raises(ParityError, match="nats per token worse than the trained model"):
            verdict.require()
    assert (await of(world, "double")).passed, "it is better than the trained model, which no limit forbids"
    assert (await of(world, "good", prompt=[1, 2])).fault is Fault.TEMPLATE
    few = make_world(rows=1, answer=8)
    assert (await of(few, "good", limit=0.001)).outcome is Outcome.CANNOT_TELL
    assert (await of(world, "base", limit=5)).outcome is Outcome.CANNOT_TELL, "the base itself would have passed"
    measured = await verify_merged(FakeServer(world), world.reference, selector="good", left=left)
    assert measured.passed
    assert measured.noise_floor.mean > 0, "what merging measured was not asked"


def test_what_was_left_to_verify_is_read_from_the_evidence(tmp_path):
    assert read_deferred(tmp_path) is None
    left = Deferred(merged_into="original", reason="it did not fit", limit=0.02)
    (tmp_path / "deferred-1.json").write_text(left.model_dump_json(by_alias=True))
    assert read_deferred(tmp_path) == left
    for text in ("{}", " " * (1 << 20 | 1)):
        (tmp_path / "deferred-1.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"deferred-1\.json cannot be read"):
            read_deferred(tmp_path)


def test_rows_are_chosen_evenly_within_their_budget(tmp_path):
    assert read_evidence(tmp_path) == []
    reference = make_world(rows=40, answer=30).reference
    silent = [1] + [0] * (len(reference[0].input_ids) - 1)
    write_reference(tmp_path, [*reference, reference[0].model_copy(update={"loss_mask": silent})])
    first = [row.input_ids[0] for row in read_evidence(tmp_path)]
    assert len(first) == 16
    assert (first[0], first[-1]) == (0, 37)
    assert first == [row.input_ids[0] for row in read_evidence(tmp_path)]
    everything = Budget(100, 10**6, 10**6)
    assert len(read_evidence(tmp_path, everything)) == 40, "the row without an answer is left out"
    few = read_evidence(tmp_path, everything._replace(tokens=200))
    assert 1 < len(few) < 10
    assert sum(len(row.input_ids) for row in few) <= 200
    assert few[-1].input_ids[0] > 20, "they are spread over all of it, not over its beginning"
    assert len(read_evidence(tmp_path, everything._replace(tokens=1))) == 1, "one row is asked about, however long"


@pytest.mark.parametrize(("answer", "count"), [(7, 16), (30, 16), (90, 10), (200, 8), (600, 6)])
def test_of_long_answers_fewer_rows_are_asked_about(tmp_path, answer: int, count: int):
    """900 answer tokens in 8 rows at least; 4,096 tokens are the end of it."""
    write_reference(tmp_path, make_world(rows=40, answer=answer).reference)
    found = read_evidence(tmp_path)
    assert abs(len(found) - count) <= 2
    assert 5 <= len(found) <= 16


@pytest.mark.parametrize("noise", [0.02, 0.05])
async def test_eight_long_rows_tell_what_sixteen_do(noise: float):
    for seed in range(5):
        found = [
            [(await judged(make_world(seed, rows=rows, answer=125, noise=noise), who)).fault for who in SERVED]
            for rows in (16, 8)
        ]
        assert found[0] == found[1] == [Fault.NONE, Fault.BASE, Fault.SCALE, Fault.SCALE, Fault.OTHER_ADAPTER]


@pytest.mark.parametrize("key", ["loss_mask", "base", "trained", "merged"])
def test_evidence_whose_lists_do_not_fit_is_refused(tmp_path, key):
    (row,) = make_world(rows=1).reference
    write_reference(tmp_path, [row.model_copy(update={key: getattr(row, key)[:-1]})])
    with pytest.raises(ArtifactError, match="not of one length"):
        read_evidence(tmp_path)


def test_evidence_from_before_conversations_were_kept_still_reads(tmp_path):
    (row,) = make_world(rows=1).reference
    old = row.model_dump_json(exclude={"messages", "merged"})
    assert "messages" not in old
    (tmp_path / "reference.jsonl").write_text(old + "\n")
    assert next(read_reference(tmp_path)).messages is None


@given(st.lists(st.integers(1, 1500), max_size=200))
def test_batches_hold_every_row_once_and_are_bounded(lengths):
    rows = [[0] * length for length in lengths]
    cut = [rows[part] for part in batches(rows)]
    assert [len(row) for part in cut for row in part] == lengths
    for part in cut:
        assert 0 < len(part) <= 64
        assert len(part) == 1 or sum(map(len, part)) <= 1024


async def test_a_server_whose_tokenize_fails_is_asked_for_an_answer():
    async def post(path, body):
        if path == "/v1/tokenize":
            raise ServerFault
        assert (body["max_tokens"], body["messages"]) == (1, ["m"])
        return {"choices": [{"prompt_token_ids": [3, 4]}]}

    assert await prompt_ids(post, "sql", ["m"]) == [3, 4]


async def test_a_row_is_asked_with_its_tools_and_one_of_plain_text_not_at_all():
    world = make_world(rows=16)
    tools = [{"type": "function", "function": {"name": "f"}}]
    changes = [{"tools": tools}, {"messages": None}]
    changed = [row.model_copy(update=change) for row, change in zip(world.reference, changes, strict=False)]
    world = world._replace(reference=[*changed, *world.reference[2:]])
    server = FakeServer(world)
    verdict = await verify(server, "good", world.reference)
    assert server.tools == [tools, *[None] * 14]
    assert verdict.prompts == 15


async def test_few_conversations_are_rendered_at_once():
    """They go through the process through which every client's request goes."""

    class Busy(FakeServer):
        waiting = most = 0

        async def tokenize(self, messages, tools=None):
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            await asyncio.sleep(0)
            self.waiting -= 1
            return await super().tokenize(messages, tools)

    world = make_world()
    server = Busy(world)
    verdict = await verify(server, "good", world.reference)
    assert (verdict.prompts, len(server.tools), server.most) == (16, 16, 2)
