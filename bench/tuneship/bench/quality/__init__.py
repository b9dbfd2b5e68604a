"""How good: tasks with scorers, lm-eval's tasks, and the likelihood of held-out text."""
