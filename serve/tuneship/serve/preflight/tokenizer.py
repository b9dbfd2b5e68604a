"""Was an adapter without a manifest trained on the text that the server will make? Its tokenizer files tell.

Trainers save the tokenizer beside the adapter; the server uses the base's. The two are compared by what they do, on
`PROBES` and every token that they added: one and the same tokenizer is written differently by different versions of
transformers, and with the padding of whoever saved it.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, RootModel, ValidationError

from tuneship.core import checkpoint
from tuneship.core.errors import ArtifactError
from tuneship.core.quoting import on_one_line
from tuneship.core.servable import MERGE, Reason

PROBES = (
    "The quick brown fox's 1,234,567.89 jumps over   the lazy dog!\n",
    "  leading and trailing  ",
    "def f(x):\n\tif x >= 10:\n        return {'a': [x**2, \"b\"]}\r\n\n\n",
    "SELECT name FROM users WHERE id != 42;--",
    "Gr\u00fc\u00dfe, na\u00efve cafe\u0301 \u00bfqu\u00e9? \u2026\u201c\u20ac 5\u201d",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \uc548\ub155 \U0001f680\u200d",
)


class _Added(RootModel[dict[str, int]]):
    """`added_tokens.json`: {token: id}."""

    root: dict[str, int] = {}


class _Token(BaseModel):
    content: str


class _Named(BaseModel):
    name: str
    template: str


class _Config(BaseModel):
    """What we go by in `tokenizer_config.json`."""

    added_tokens_decoder: dict[int, _Token] = {}
    chat_template: str | list[_Named] | None = None


_Form = TypeVar("_Form", bound=BaseModel)

_LEFT_OVER = "if its tokenizer files were not used in training, delete them from its directory"
_OTHER_BASE = f"serve it on the base that it was trained on; {_LEFT_OVER}"


def check(folder: Path, base: Path) -> list[Reason]:
    """How the tokenizer and chat template in `folder`, if there are any, differ from those of `base`.

    Raises:
        ArtifactError: one of the files cannot be read.

    """
    return [*_template(folder, base), *_added(folder, base), *_cut(folder, base)]


def added_tokens(folder: Path) -> dict[str, int]:
    """`added_tokens.json`: what older transformers wrote beside the tokenizer, and SGLang reads."""
    return _read(_Added, folder / "added_tokens.json").root


def _template(folder: Path, base: Path) -> list[Reason]:
    _read(_Config, folder / "tokenizer_config.json")
    try:
        own = checkpoint.chat_template(folder).strip()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{folder / checkpoint.TEMPLATE_FILE} cannot be read: {error}") from None
    served = checkpoint.chat_template(base).strip()
    if own in {"", served}:
        return []
    what = "another chat template than the base has" if served else "a chat template, and the base has none"
    return [Reason(f"was trained with {what}", f"{MERGE}: it carries its template with it; {_LEFT_OVER}")]


def _added(folder: Path, base: Path) -> list[Reason]:
    """Tokens that the server would not know, or would know as another id."""
    own = _tokens(folder)
    known = _tokens(base) if own else {}
    new = sorted((number, token) for token, number in own.items() if known.get(token) != number)
    if not new or not known:
        return []
    listed = ", ".join(f"{token!r} ({number})" for number, token in new[:3]) + (", ..." if len(new) > 3 else "")
    return [Reason(f"adds tokens that the base does not have, {len(new)}: {listed}", f"{MERGE}; {_LEFT_OVER}")]


def _cut(folder: Path, base: Path) -> list[Reason]:
    """Whether the same text becomes the same ids, of tokens that both have."""
    own, served = folder / "tokenizer.json", base / "tokenizer.json"
    if not (own.is_file() and served.is_file()):
        return _pieces(folder, base)
    if own.read_bytes() == served.read_bytes():
        return []
    ours, theirs = _load(served), _load(own)
    both = ours.get_vocab().items() & theirs.get_vocab().items()
    special = sorted(token.content for token in ours.get_added_tokens_decoder().values())
    texts = [*PROBES, *(f"a {token} b" for token in special if (token, ours.token_to_id(token)) in both)]
    for text in texts:
        ids, other = (tokenizer.encode(text, add_special_tokens=False).ids for tokenizer in (ours, theirs))
        if ids != other:
            return [Reason(f"was trained with another tokenizer: of {text!r} it makes other ids", _OTHER_BASE)]
    return []


def _pieces(folder: Path, base: Path) -> list[Reason]:
    """Without two `tokenizer.json` to compare, the files of the older kinds must be the same."""
    for name in ("tokenizer.model", "vocab.json", "merges.txt"):
        own, served = folder / name, base / name
        if own.is_file() and served.is_file() and own.read_bytes() != served.read_bytes():
            return [Reason(f"was trained with another tokenizer: its {name} is not the base's", _OTHER_BASE)]
    return []


def _tokens(folder: Path) -> dict[str, int]:
    """{token: id} of everything that the files in `folder` know."""
    vocabulary = folder / "tokenizer.json"
    listed = _read(_Config, folder / "tokenizer_config.json").added_tokens_decoder
    return {
        **{token.content: number for number, token in listed.items()},
        **added_tokens(folder),
        **(_load(vocabulary).get_vocab() if vocabulary.is_file() else {}),
    }


def _load(file: Path) -> Any:
    status = file.stat()
    return _loaded(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4)
def _loaded(file: Path, _size: int, _mtime_ns: int) -> Any:
    """A `tokenizers.Tokenizer` without the padding and truncation of whoever saved it."""
    from tokenizers import Tokenizer  # type: ignore[import-untyped]  # noqa: PLC0415 - only where two are compared

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as fault:  # noqa: BLE001 - what the library raises is a plain Exception
        error = on_one_line(str(fault))
        raise ArtifactError(f"{file} cannot be read: {error}", hint="save the tokenizer again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read(form: type[_Form], file: Path) -> _Form:
    """`file` as `form`, whose defaults stand for a file that is not there."""
    try:
        return form.model_validate_json(file.read_bytes()) if file.is_file() else form()
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(f"{file} cannot be read: {first['msg']}", hint="save the tokenizer again") from None
