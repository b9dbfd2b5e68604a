"""Is what answers what was trained? Held-out text is replayed through the server and its log-probabilities compared.

    reference = read_evidence(artifact.evidence)
    verdict = await verify(scorer, "sql@3fa9c1d20b77#1", reference, others={"mail": "mail@91c2e7aa0d13#1"})
    verdict.verified     # "passed", "no evidence", "cannot tell: ...", "failed: ..."
    verdict.require()    # ParityError, where it failed

A `Scorer` is the server: `engine.EngineScorer` behind the door, `door.DoorScorer` over its URL. The limit is not a
constant but twice the noise floor of the same server on the same rows (docs/decisions/0011-*).
"""

from tuneship.serve.verify.procedure import verify, verify_merged
from tuneship.serve.verify.rows import Budget, read_deferred, read_evidence
from tuneship.serve.verify.scorer import Scorer
from tuneship.serve.verify.unknown import Memory
from tuneship.serve.verify.verdict import Fault, Outcome, Verdict

__all__ = [
    "Budget",
    "Fault",
    "Memory",
    "Outcome",
    "Scorer",
    "Verdict",
    "read_deferred",
    "read_evidence",
    "verify",
    "verify_merged",
]
