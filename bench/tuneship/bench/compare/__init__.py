"""Whether a candidate is slower or worse than a baseline, and whether that can be told at all."""
