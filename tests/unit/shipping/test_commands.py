"""Every command of the README and the docs: what is ours is parsed by the real command line, what it names is there."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuneship.cli import overrides
from tuneship.cli.app import app
from tuneship.core import recipe_file

ROOT = Path(__file__).parents[3]
ROOMS = ("recipes", "train", "serve", "bench")
PAGES = (
    *(ROOT / "README.md", ROOT / "AGENTS.md"),
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "decisions"),
    *(ROOT / room / "README.md" for room in ROOMS),
)
QUICKSTART = str(ROOT / "recipes/quickstart.toml")
PLACEHOLDERS = {"RECIPE": QUICKSTART, "recipes/quickstart.toml": QUICKSTART}
"""Others are names, folders and URLs, and are taken as they stand."""
STUDY = re.compile(r"(?:bench/studies|docs/makers)[\w/]*(?:\.py)?")


def commands(page: Path) -> Iterator[str]:
    """What stands in `code` or is indented by four spaces, continued lines joined; `a\\|b` of a table is `a|b`."""
    text = page.read_text(encoding="utf-8").replace("\\|", "|")
    text = re.sub(r" \\\n\s*", " ", text)
    for match in re.finditer(r"^ {4,}(.+)$|`([^`\n]+)`", text, re.MULTILINE):
        yield (match[1] or match[2]).strip()


def split(command: str, program: str) -> list[list[str]]:
    """The words behind `program`, once for each choice of `a|b`; nothing where it is not called."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="&;>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        words = list(lexer)
    except ValueError:  # prose with an apostrophe
        return []
    found = next((at for at, word in enumerate(words) if word.rpartition("/")[2] == program), None)
    if found is None or "=" in "".join(words[:found]) or (found and words[0] not in {"docker", "run:", "-"}):
        return []
    ours = list(itertools.takewhile(lambda word: word.strip("&;>"), words[found + 1 :]))
    ours = [PLACEHOLDERS.get(word, word) for word in ours if word != "..."]
    return [list(each) for each in itertools.product(*(word.split("|") for word in ours))]


OURS = sorted({
    (page.relative_to(ROOT).as_posix(), tuple(words))
    for page in PAGES
    for command in commands(page)
    for words in split(command, "tuneship")
    if words
})  # fmt: skip


def test_the_commands_are_found():
    assert len(OURS) > 80
    assert ("README.md", ("up", QUICKSTART, "--lora.rank", "8", "--train.steps", "20")) in OURS
    verbs = {words[0] for _, words in OURS}
    assert verbs >= {name for name in app if not name.startswith("-")}


@pytest.mark.parametrize(("page", "words"), OURS, ids=[f"{page}: {' '.join(words)[:80]}" for page, words in OURS])
def test_a_command_of_ours_parses(page: str, words: tuple[str, ...]):
    chain, apps, rest = app.parse_commands(words)
    assert apps[-1] is not app, f"{page}: tuneship has no verb {words[0]}"
    if not rest:  # a verb that is only mentioned
        return
    assert apps[-1].default_command, f"{page}: {' '.join(chain)} has no verb {rest[0]}"
    _, bound, _ = app.parse_args(words, print_error=False, exit_on_error=False)
    if words[:2] != ("bench", "train") and QUICKSTART in words:
        recipe_file.load(Path(QUICKSTART), overrides.parse(bound.arguments.get("overrides", ())))


def test_a_renamed_flag_would_be_noticed():
    with pytest.raises(Exception, match="keep-servin"):
        app.parse_args(["serve", "BASE", "--keep-servin"], print_error=False, exit_on_error=False)
    with pytest.raises(Exception, match="rnak"):
        recipe_file.load(Path(QUICKSTART), overrides.parse(["--lora.rnak", "8"]))


def test_the_verbs_that_hints_name_are_there():
    """In the page of errors a hint is prose: `tuneship fetch <model_id>, or check the path`."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<!this )\btuneship ([a-z]+(?: [a-z]+)?)(?=[ `,;:.)]|$)", page, re.MULTILINE))
    groups = {name: app[name] for name in ("data", "base", "adapters", "keys", "docker", "bench")}
    for verb, _, second in (words.partition(" ") for words in named):
        assert verb in app, verb
        if verb in groups:
            assert second in groups[verb], f"{verb} {second}"
    assert {words.partition(" ")[0] for words in named} >= {"fetch", "serve", "adapters", "keys", "train", "plan"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_other_commands_name_is_there(page: Path):
    """Targets of make, studies with their options, extras of the package, files of docker compose."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    missing = []
    for command in commands(page):
        for words in split(command, "make"):
            missing += [f"make {word}" for word in words[:1] if re.fullmatch("[a-z-]+", word) and word not in targets]
        if re.match(r"(\S*/)?pip install", command):
            named = re.findall(r"tuneship\[([\w,]+)\]", command)
            missing += [
                extra for each in named for extra in each.split(",") if extra not in project["optional-dependencies"]
            ]
        for words in [*split(command, "python"), *split(command, "pytest")]:
            missing += list(_absent(page, words))
        if command.startswith("docker compose"):
            missing += [file for file in re.findall(r"-f (\S+)", command) if not (ROOT / file).is_file()]
    assert missing == []


def _absent(page: Path, words: list[str]) -> Iterator[str]:
    """Files of ours that are not there, options that a study's source does not name."""
    if not words or not re.match(r"(bench|tests|docs|recipes|studies)/", words[0]):
        return
    file = (page.parent if words[0].startswith("studies/") else ROOT) / words[0].partition("::")[0]
    if not file.exists():
        yield words[0]
    elif file.suffix == ".py" and "tests" not in file.parts:
        source = "".join(each.read_text(encoding="utf-8") for each in file.parent.glob("*.py"))
        for option in (word.partition("=")[0] for word in words[1:] if word.startswith("--")):
            name = option.removeprefix("--")
            if option not in source and not re.search(rf"\b{name.replace('-', '_')}\b", source):
                yield f"{words[0]} {option}"
