"""Rows of text files: JSON line by line, CSV, and one array of JSON, also packed by gzip.

None is ever in memory whole. A row that cannot be read costs itself alone, but in an array, where it is not known where
the next one begins. Lines are counted from 1.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tuneship.train.data.raw import Raw

PACKED = ".gz"
_CHUNK = 1 << 16
"""Characters of a JSON array at a time."""
_BOM = b"\xef\xbb\xbf"
"""What Windows puts before a text."""
_BETWEEN = re.compile(r"[\s,]*")
_SURROGATE = re.compile("[\udc80-\udcff]")


def lines(file: Path) -> Iterator[Raw]:
    """A row a line; empty ones are none."""
    with _opened(file) as content:
        for number, line in enumerate(content, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)  # noqa: PLW2901
            if not line.strip():
                continue
            place = f"{file.name}:{number}"
            try:
                yield Raw(place, json.loads(line.decode()))
            except UnicodeDecodeError:
                yield Raw(place, None, "not UTF-8")
            except (json.JSONDecodeError, RecursionError) as error:
                yield Raw(place, None, f"not JSON: {error}")


def table(file: Path, delimiter: str) -> Iterator[Raw]:
    """CSV; the first line names the columns."""
    csv.field_size_limit(sys.maxsize)  # the library's own, 128 KiB, is less than a conversation may take
    with _text(file, newline="") as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            line = rows.line_num + 1
            place = f"{file.name}:{line}"
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Raw(place, None, f"not CSV: {error}")
                continue
            if not fields:
                continue
            if not header:
                header = fields
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    yield Raw(place, None, f"the header has {twice[0]!r} twice")
                    return
                continue
            yield _fields(place, header, fields)


def _fields(place: str, header: list[str], fields: list[str]) -> Raw:
    if len(fields) != len(header):
        return Raw(place, None, f"{len(fields)} fields, and the header has {len(header)}")
    if any(map(_is_torn, fields)):
        return Raw(place, None, "not UTF-8")
    return Raw(place, dict(zip(header, fields, strict=True)))


def is_array(file: Path) -> bool:
    """Whether `array` shall read it, and not `lines`."""
    with _opened(file) as content:
        return content.read(_CHUNK).removeprefix(_BOM).lstrip().startswith(b"[")


def array(file: Path) -> Iterator[Raw]:
    """The elements of one JSON array, each by the line on which it begins; nothing is read after a mistake."""
    decoder = json.JSONDecoder()
    with _text(file) as content:
        buffer = content.read(_CHUNK)
        at = buffer.index("[") + 1
        line = 1 + buffer.count("\n", 0, at)
        while True:
            between = _BETWEEN.match(buffer, at)
            assert between
            line += between[0].count("\n")
            at = between.end()
            if buffer.startswith("]", at):
                return
            place, fault = f"{file.name}:{line}", "the array has no end"
            try:
                element, end = decoder.raw_decode(buffer, at)
            except (json.JSONDecodeError, RecursionError) as error:
                end, fault = len(buffer), str(error)
            if end == len(buffer):  # not all of it was there, or it is wrong
                more = content.read(max(_CHUNK, end - at))
                if not more:
                    yield Raw(place, None, f"not JSON: {fault}")
                    return
                buffer, at = buffer[at:] + more, 0
                continue
            yield Raw(place, None, "not UTF-8") if _is_torn(buffer[at:end]) else Raw(place, element)
            line += buffer.count("\n", at, end)
            at = end


def _opened(file: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(file) if file.name.lower().endswith(PACKED) else file.open("rb")


def _text(file: Path, newline: str | None = None) -> io.TextIOWrapper:
    """Bytes that are no UTF-8 come through as surrogates, so that one of them costs its own row and not the file."""
    return io.TextIOWrapper(_opened(file), encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _is_torn(text: str) -> bool:
    """Whether bytes that are no UTF-8 came through as surrogates."""
    return not text.isascii() and bool(_SURROGATE.search(text))
