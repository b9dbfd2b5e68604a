"""`python -m tuneship.bench <attempt>`: one measuring stage of `tuneship up` as a process of its own."""

from tuneship.bench.stages import baseline, bench
from tuneship.core.stage import child_main

child_main({"baseline": baseline, "bench": bench})
