"""`python -m tuneship.train ATTEMPT`: one stage of a run as a process of its own."""

from tuneship.core.stage import child_main
from tuneship.train.base import build_for
from tuneship.train.merging.stage import merge_adapter
from tuneship.train.stages import fetch_all, train

if __name__ == "__main__":
    child_main({"fetch": fetch_all, "base": build_for, "train": train, "merge": merge_adapter})
