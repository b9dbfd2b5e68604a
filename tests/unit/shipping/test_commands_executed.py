"""Every command of the README and the docs is executed: in the walk, by `test_commands_run.py`, or it says why not.

The walk is tests/integration/test_docs_walk.py. A command of any other page counts as executed where each of its
options, with its choice, is given to its verb by one that is.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tuneship.cli.app import app

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(HERE), str(ROOT / "tests/integration")]
import docs_pages  # noqa: E402
import test_commands  # noqa: E402
from docs_not_run import NEEDS_GPU, NOT_RUN, OPTIONS, OTHERS  # noqa: E402

CHOICES = ("--quantization", "--until", "--from", "--rates", "--template", "--task")
"""Options whose value decides what is run."""
FAMILIES = {"--rates": {"sweep"}, "--task": {"lm-eval"}}
"""Of these only such values do, others are like each other."""
PAGE = """Prose.

    one \\
      --two
    cat <<'END'
    words # of it
    END
    say '{
      }'    # exit 1 or 3: it cannot tell
    serve    # leave it running

```text
ready at 9:59 now
```

    # Ctrl-C in its terminal

```toml
    not = "typed"
```
"""
PROGRAMS = {"make", "uv", "pip", "python", "python3", "pytest", "docker", "curl", "git", "hf", "export", "."}


def uses(words: Iterable[str]) -> set[str]:
    """`up`, `up --until merge`, `up --KEY`: the verb, and the verb with each of its options."""
    words = [*words]
    chain, _, rest = app.parse_commands(words)
    verb = " ".join(chain)
    found = {verb}
    for at, word in enumerate(rest):
        if not word.startswith("--"):
            continue
        option, _, value = word.partition("=")
        if "." in option:
            option = "--KEY"
        elif option in CHOICES:
            value = (value or next(iter(rest[at + 1 :]), "")).partition(":")[0]
            option += f" {value}" if value in FAMILIES.get(option, {value}) else ""
        found.add(f"{verb} {option}")
    return found


def walked() -> Iterator[docs_pages.Step]:
    for page in docs_pages.WALKED:
        yield from docs_pages.steps(page)


def called(command: str) -> Iterator[list[str]]:
    """The words behind each `tuneship` of a shell's line."""
    for found in re.finditer(r"\btuneship ((?:'[^']*'|[^'|;&)\n])*)", command):
        yield shlex.split(found[1])


def run_by_units() -> Iterator[list[str]]:
    tree = ast.parse((HERE / "test_commands_run.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("tuneship "):
            yield shlex.split(node.value.removeprefix("tuneship "))


EXECUTED = {
    use
    for words in [
        *(
            words
            for step in walked()
            if step.command not in {**NOT_RUN, **NEEDS_GPU} and "<<" not in step.command
            for words in called(step.command)
        ),
        *run_by_units(),
    ]
    for use in uses(words)
}
MENTIONED = {
    use: f"{page}: {' '.join(words)}"
    for page, words in test_commands.OURS
    if " ".join(["tuneship", *words]) not in {**NOT_RUN, **NEEDS_GPU}
    for use in uses(words)
}
FOREIGN = sorted(
    {
        (page.relative_to(ROOT).as_posix(), command.partition(" #")[0].strip())
        for page in test_commands.PAGES
        if page not in docs_pages.WALKED
        for command in test_commands.commands(page)
        if len(command.split()) > 1 and command.split()[0].rpartition("/")[2] in PROGRAMS
    }
)


def test_what_is_executed_is_found():
    assert len(EXECUTED) > 60
    assert {
        "serve --quantization nf4",
        "adapters load --weight",
        "keys add --models",
        "bench load --rates sweep",
    } <= EXECUTED


@pytest.mark.parametrize("use", sorted(MENTIONED))
def test_a_command_of_ours_is_executed_or_says_why_not(use: str):
    assert (use in EXECUTED) or (use in OPTIONS), f"nothing runs `tuneship {use}` of {MENTIONED[use]}"


@pytest.mark.parametrize(("page", "command"), FOREIGN)
def test_a_command_of_another_program_says_who_runs_it(page: str, command: str):
    assert any(re.match(pattern, command) for pattern in OTHERS), f"{page}: nothing runs `{command}`"


def test_the_lists_name_only_what_a_page_holds():
    printed = {step.command for step in walked()}
    assert not {*NOT_RUN, *NEEDS_GPU} - printed
    assert not set(OPTIONS) - set(MENTIONED), "no page has these"
    assert not set(OPTIONS) & EXECUTED, "these are executed"
    assert not [pattern for pattern in OTHERS if not any(re.match(pattern, command) for _, command in FOREIGN)]


def test_what_a_reason_names_is_there():
    reasons = [*NOT_RUN.values(), *NEEDS_GPU.values(), *OPTIONS.values(), *OTHERS.values()]
    named = {path for reason in reasons for path in re.findall(r"(?:tests|bench)/[\w./]+\.py", reason)}
    assert named
    assert not [path for path in named if not (ROOT / path).is_file()]


def test_a_command_that_nothing_runs_would_be_noticed():
    assert uses(["serve", "BASE", "--quantization", "fp8"]) - EXECUTED
    assert uses(["up", "RECIPE", "--from", "merge"]) - EXECUTED == {"up --from merge"}


def test_what_is_left_running_must_say_when_it_is_ready(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("    tuneship top    # leave it running\n", encoding="utf-8")
    with pytest.raises(ValueError, match="when it is ready"):
        docs_pages.steps(page)


def test_a_page_is_read_as_it_is_typed(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    found = docs_pages.steps(page)
    assert [(step.line, step.command, step.kind, step.exits) for step in found] == [
        (3, "one --two", "run", (0,)),
        (5, "cat <<'END'\nwords # of it\nEND", "run", (0,)),
        (8, "say '{\n  }'", "run", (1, 3)),
        (10, "serve", "leave running", (0,)),
        (16, "# Ctrl-C in its terminal", "interrupt", (0,)),
    ]
    assert found[3].missing("it is\nready at 10:01 now") == []
    assert found[3].missing("it is ready at 10:01") == ["ready at 9:59 now"]
