"""The verbs, by import string: a verb's libraries are loaded when it runs and not before."""

from __future__ import annotations

import sys

from cyclopts import App

from tuneship.cli import failures
from tuneship.cli.console import ProgressBars, talk
from tuneship.core import progress

app = App(
    name="tuneship",
    help="Fine-tune a model, prove that what was trained is what answers, serve it, keep measuring it.",
    version_flags=["--version"],
)
_ANY_KEY = "Any key of the recipe can be given, too: --lora.rank 8 --train.steps 20."
app.command(
    "tuneship.cli.up:up",
    name="up",
    help="Train, merge, serve and bench a recipe in one command.",
    help_epilogue=_ANY_KEY,
)
app.command("tuneship.cli.up:train", name="train", help="Train a recipe's adapter.", help_epilogue=_ANY_KEY)
app.command("tuneship.cli.up:merge", name="merge", help="Merge a run's adapter into one bf16 checkpoint.")
app.command("tuneship.cli.up:plan", name="plan", help="What a recipe would do on this machine; loads no model.")
app.command("tuneship.cli.doctor:doctor", name="doctor", help="Is this machine fit to train and to serve?")
app.command("tuneship.train.commands:fetch", name="fetch", help="Bring a base model to this disk.")
app.command("tuneship.serve.commands:serve", name="serve", help="Serve a merged checkpoint, or adapters on one base.")
app.command("tuneship.serve.verify.commands:verify", name="verify", help="Is what a server answers what was trained?")
app.command("tuneship.serve.top:top", name="top", help="A running server on one screen: engine, versions, figures.")

data = App(name="data", help="What is learnt from a recipe's rows, and what is wrong with them.")
data.command("tuneship.cli.data:check", name="check", help="Read all rows; exit 1 where training would refuse some.")
data.command("tuneship.cli.data:show", name="show", help="Rows as the model reads them; what is learnt is marked.")
app.command(data)

base = App(name="base", help="Quantized bases.")
base.command("tuneship.train.commands:build_base", name="build", help="Write a base once as NF4, to serve it.")
app.command(base)

adapters = App(name="adapters", help="What a running server answers with.")
adapters.command("tuneship.serve.adapters_commands:load", name="load", help="Bring one into the running server.")
adapters.command("tuneship.serve.adapters_commands:list_", name="list", help="Versions, states and weights.")
adapters.command("tuneship.serve.adapters_commands:promote", name="promote", help="Let a version answer its alias.")
adapters.command("tuneship.serve.adapters_commands:weigh", name="weigh", help="Let a canary answer a share of it.")
adapters.command("tuneship.serve.adapters_commands:rollback", name="rollback", help="Back to what answered before.")
adapters.command("tuneship.serve.adapters_commands:unload", name="unload", help="Take a version or an alias out.")
adapters.command("tuneship.serve.adapters_commands:history", name="history", help="Who changed what, and when.")
app.command(adapters)

keys = App(name="keys", help="API keys of the served models.")
keys.command("tuneship.serve.keys_commands:add", name="add", help="Make a key and print it, once.")
keys.command("tuneship.serve.keys_commands:list_", name="list", help="The keys' names, and what each may use.")
keys.command("tuneship.serve.keys_commands:revoke", name="revoke", help="Make a key invalid, in running servers too.")
app.command(keys)

docker = App(name="docker", help="Our images. Each verb prints the plain command, too.")
docker.command("tuneship.cli.containers.verbs:build", name="build", help="Build the image that trains, or serves.")
docker.command("tuneship.cli.containers.verbs:run", name="run", help="Run a verb in its image, as you, in this folder.")
app.command(docker)

bench = App(name="bench", help="Measure an OpenAI-compatible endpoint; compare two reports.")
bench.command("tuneship.bench.commands:load", name="load", help="Latency and throughput under load; the knee.")
bench.command("tuneship.bench.commands:eval_", name="eval", help="Score a task's rows.")
bench.command("tuneship.cli.bench_train:bench_train", name="train", help="How fast this card trains a recipe.")
bench.command("tuneship.bench.commands:nll", name="nll", help="How likely a model finds held-out answers.")
bench.command(
    "tuneship.bench.compare.commands:compare", name="compare", help="Exit 1 when the candidate is slower or worse."
)
bench.command(
    "tuneship.bench.compare.commands:calibrate", name="calibrate", help="How noisy is this testbed? compare asks."
)
bench.command("tuneship.bench.report.commands:history", name="history", help="List and plot past reports.")
app.command(bench)


def main() -> None:
    """The console script."""
    if talk.is_terminal:
        progress.use(ProgressBars())
    failures.run(lambda: app(sys.argv[1:], result_action="return_value"))
