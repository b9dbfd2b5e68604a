"""Why lm-eval failed, in one sentence, out of its log: that is all it leaves behind."""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path

from tuneship.core.errors import DataError, EndpointError, TuneshipError
from tuneship.core.process import describe_exit

_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Failure)\b")
_ASKING = "Requesting API"  # before that it asks others: for a data set
_ENDPOINT = re.compile(r"^(?:aiohttp\.|TimeoutError\b|asyncio\.\w*TimeoutError\b)")
# What the other requests in flight say once the first has given up; it may be the last that is said.
_CONSEQUENCE = "Session is closed"
_REFUSED = "API request failed! "
_NAMED_IN_YAML = re.compile(r"^(?:task|group):[ \t]*['\"]?([\w.-]+)['\"]?[ \t]*$", re.MULTILINE)
_NO_TASK = "Tasks not found:"
_LIKELIHOOD = ("Loglikelihood is not supported for chat completions", "Tokenizer is required for loglikelihood")
# It takes such an answer as an empty one, and would score it.
_NO_COMPLETION = "Could not parse generations"


def explain(name: str, url: str, code: int, log: Path) -> TuneshipError:
    """The error of an lm-eval that ended with `code`."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    last = last_words(text) or describe_exit(code)
    if _NO_TASK in text:
        return DataError(f"lm-eval has no task {name!r}", hint=_near(name) or "`lm-eval ls tasks` lists them all")
    if any(sign in text for sign in _LIKELIHOOD):
        return DataError(
            f"lm-eval's {name!r} compares likelihoods of given answers, which no chat endpoint tells",
            hint="take a variant that generates (often named ..._generative or ..._cot), or the scorer `choice`",
        )
    if _ASKING in text and (_ENDPOINT.match(last) or _CONSEQUENCE in last):
        return EndpointError(
            f"lm-eval {name}: requests to {url} failed: {_refusal(text) or last}",
            hint=f"is the server still running? see also {log}",
        )
    return TuneshipError(f"lm-eval {name}: {last}", hint=f"its log: {log}")


def explain_silent(name: str, url: str, log: Path) -> EndpointError | None:
    """What lm-eval only warns of although it makes the score worthless; None when there is no such thing."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        found = next((line.strip() for line in lines if _NO_COMPLETION in line), "")
    if not found:
        return None
    reason = found[found.index(_NO_COMPLETION) :]
    return EndpointError(f"lm-eval {name}: {url} answered what is no chat completion: {reason}", hint=f"its log: {log}")


def _refusal(text: str) -> str:
    """The last answer that was a refusal, or else the last exception of a request."""
    lines = [line.strip() for line in reversed(text.splitlines())]
    answered = next((line for line in lines if _REFUSED in line), "")
    if answered:
        return answered.partition(_REFUSED)[2].removesuffix(" Retrying...")[:500]
    return next((line[:500] for line in lines if _ENDPOINT.match(line)), "")


def last_words(text: str) -> str:
    """The last line that names an exception, else the last line at all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if _EXCEPTION.match(line)]
    return (named or lines or [""])[-1][:500]


def _near(name: str) -> str:
    """Names like it among what lm-eval ships; read off its files, since to import it takes half a minute."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return ""
    names: set[str] = set()
    for file in Path(spec.origin).with_name("tasks").rglob("*.yaml"):
        names.update(_NAMED_IN_YAML.findall(file.read_text(encoding="utf-8", errors="replace")))
    near = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(repr(one) for one in near)}?" if near else ""
