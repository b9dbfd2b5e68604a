"""The way of a recipe: fetch -> train -> merge -> (baseline) -> serve -> bench, each step a child process.

A step whose input id is the one of its last success is not run again; its output is what that run left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tuneship.core import artifact as artifacts
from tuneship.core import checkpoint, data_source, model_source, recipe_file
from tuneship.core.artifact import Artifact, Base, Kind
from tuneship.core.errors import ArtifactError
from tuneship.core.files import sha256_text
from tuneship.core.identity import data_sha256, input_id
from tuneship.core.model_source import ModelSource
from tuneship.core.parity import REFERENCE_FILE, rows_sha256
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe
from tuneship.core.rundir import HELDOUT_FILE, RunDir
from tuneship.core.stage import GRACE_S, Job, StageProcess, run_job

_VERSION = {"train": 1, "merge": 2, "baseline": 2, "bench": 2}
"""Raised when a stage would make something else of the same inputs."""
_GRACE_S = 120
"""To finish a step and write a checkpoint."""


class Target(NamedTuple):
    """What a server serves: a merged checkpoint, or a base (a folder) with a folder of adapters."""

    model: Path
    name: str
    adapters: Path | None = None


@dataclass(frozen=True)
class Pipeline:
    """One recipe in one locked run directory."""

    run: RunDir
    recipe: Recipe
    force: bool = False
    resume: bool = False
    smoke: int = 0
    """Train on so many rows only; 0: on all."""

    def fetch(self) -> ModelSource:
        """The base, brought to this disk when it is not there, as are rows that lie on the hub."""
        model, data = self.recipe.model, self.recipe.data
        there = all(data_source.is_here(pattern) for pattern in (data.train, data.heldout) if data_source.hub(pattern))
        try:
            if there:
                return model_source.resolve(model.id, model.revision)
        except ArtifactError:
            pass
        run_job(self._job("fetch", "", {}), "tuneship.train")
        return model_source.resolve(model.id, model.revision)

    def train(self, source: ModelSource, base: Base) -> Artifact:
        """The adapter, or the checkpoint of full training."""
        inputs = {"resume": "yes"} if self.resume else {}
        inputs |= {"smoke": str(self.smoke)} if self.smoke else {}
        kind: Kind = "merged" if self.recipe.train.method == "full" else "adapter"
        return self._sealed("train", kind, self._train_id(source, base), inputs)

    def trained(self, source: ModelSource, base: Base) -> Path | None:
        """What `train` would keep instead of training."""
        return self.run.output("train", self._train_id(source, base))

    def merge(self, base: Base, adapter: Artifact) -> Artifact:
        """The merged checkpoint, whose parity passed (or was forced); full training made one already."""
        if adapter.manifest.kind == "merged":
            return adapter
        identity = input_id(
            "merge",
            _VERSION["merge"],
            self.recipe,
            ("model", "merge"),
            (base.weights_sha256, adapter.manifest.content_id),
        )
        return self._sealed("merge", "merged", identity, {"adapter": str(adapter.path)})

    def needs_baseline(self, base: Base, served: Artifact) -> bool:
        """Whether the untuned base still has to be measured."""
        identity = self._baseline_id(base, served)
        return self._has_quality(served) and self.run.output("baseline", identity) is None

    def baseline(self, base: Base, model: str, served: Artifact) -> Path | None:
        """How the untuned base, served as `model`, does on the recipe's tasks and held-out rows; None without any."""
        if not self._has_quality(served):
            return None
        inputs = self._bench_inputs(model, served)
        return self._step("baseline", self._baseline_id(base, served), "tuneship.bench", inputs)

    def bench_is_done(self, base: Base, served: Artifact) -> bool:
        """Whether the report is of exactly this artifact and this base."""
        return self.run.output("bench", self._tuned_id(base, served)) is not None

    def bench(self, base: Base, served: Artifact, baseline: Path | None) -> Path:
        """Load and quality of the running server; the run's report."""
        inputs = self._bench_inputs(served.manifest.name, served) | {"train_attempt": str(self._attempt_of("train"))}
        if baseline:
            inputs["baseline"] = str(baseline)
        return self._step("bench", self._tuned_id(base, served), "tuneship.bench", inputs)

    @contextmanager
    def serve(self, target: Target, port: int | None = None) -> Iterator[StageProcess]:
        """A running server, stopped at the end of the block; `port` overrides the recipe's."""
        self.run.endpoint.unlink(missing_ok=True)
        inputs = {
            "model": str(target.model),
            "name": target.name,
            "adapters": str(target.adapters or ""),
            "port": str(self.recipe.serve.port if port is None else port),
            "endpoint": str(self.run.endpoint),
        }
        grace_s = self.recipe.serve.drain_s + GRACE_S  # what is in flight first, then the engine
        with StageProcess(self._job("serve", "", inputs), "tuneship.serve", grace_s) as server:
            server.wait_for(self.run.endpoint)
            yield server

    def _train_id(self, source: ModelSource, base: Base) -> str:
        data = self.recipe.data
        return input_id(
            "train",
            _VERSION["train"],
            self.recipe,
            ("model", "quantization", "data", "lora", "train"),
            (
                base.weights_sha256,
                checkpoint.tokenizer_sha256(source.path),
                sha256_text(checkpoint.chat_template(source.path)),
                data_sha256(data.train),
                data_sha256(data.heldout),
                *([f"smoke {self.smoke}"] if self.smoke else []),
            ),
        )

    def _has_quality(self, served: Artifact) -> bool:
        return bool(self.recipe.bench.eval) or (served.evidence / REFERENCE_FILE).is_file()

    def _bench_inputs(self, model: str, served: Artifact) -> dict[str, str]:
        heldout = self._attempt_of("train") / HELDOUT_FILE
        inputs = {"endpoint": str(self.run.endpoint), "model": model, "artifact": str(served.path)}
        return inputs | ({"heldout": str(heldout)} if heldout.is_file() else {})

    def _baseline_id(self, base: Base, served: Artifact) -> str:
        # The rows, not the artifact: what the base says to them does not change when it is trained again.
        return self._bench_id("baseline", base, rows_sha256(served.evidence))

    def _tuned_id(self, base: Base, served: Artifact) -> str:
        return self._bench_id("bench", base, served.manifest.content_id)

    def _bench_id(self, stage: str, base: Base, *contents: str) -> str:
        files = map(data_sha256, recipe_file.bench_files(self.recipe))
        # What a base without a template of its own is asked with.
        template = [self.recipe.data.template] if self.recipe.data.template else []
        contents = (base.weights_sha256, *contents, *files, *template)
        return input_id(stage, _VERSION[stage], self.recipe, ("bench", "serve"), contents)

    def _attempt_of(self, stage: str) -> Path:
        """The attempt that made what `stage` last finished."""
        return self.run.path / "stages" / stage / f"attempt-{self.run.state().stages[stage].attempt}"

    def _sealed(self, stage: str, kind: Kind, identity: str, inputs: Mapping[str, str]) -> Artifact:
        """What `stage` makes, every byte checked. What it made before and was damaged since is made again.

        Raises:
            ArtifactError: what it made before cannot be used, and making it again would not mend that.

        """
        done = self.run.output(stage, identity)
        if done:
            try:
                kept = artifacts.open_artifact(done, kind=kind)
            except ArtifactError as error:
                if not artifacts.is_damaged(done):
                    raise
                say(f"{stage}: again, for {error.message}")
                self.run.forget((stage,))
            else:
                say(f"{stage}: unchanged, {done.name}")
                return kept
        return artifacts.open_artifact(self._step(stage, identity, "tuneship.train", inputs), kind=kind)

    def _step(self, stage: str, identity: str, module: str, inputs: Mapping[str, str]) -> Path:
        done = self.run.output(stage, identity)
        if done:
            say(f"{stage}: unchanged, {done.name}")
            return done
        job = self._job(stage, identity, inputs)
        output = run_job(job, module, _GRACE_S if stage == "train" else GRACE_S)
        self.run.finish(stage, identity, output, job.attempt)
        say(f"{stage}: {output.name}")
        return output

    def _job(self, stage: str, identity: str, inputs: Mapping[str, str]) -> Job:
        return Job(
            stage=stage,
            input_id=identity,
            run_path=self.run.path,
            attempt=self.run.new_attempt(stage),
            inputs=dict(inputs),
            force=self.force,
        )


def identify(source: ModelSource) -> Base:
    """The base's identity, read from its folder."""
    return checkpoint.identify(source.path, source.id, source.revision)
